"""The Batch that data makes and training hands to the model: tensors and their meaning.

Shape letters: B sequences of this rank's micro-batch, S positions of a sequence (right-padded),
M media items (images) of one modality in the micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

TEXT = 0
"""Modality id of text. New modalities are 1, 2, ... in the order of `encoder` in the configuration."""

IGNORED_LABEL = -100
"""Label of a position whose next token is not a target (the value PyTorch's cross entropy ignores)."""


@dataclass
class Batch:
    """One forward pass of one rank.

    A sequence holds one sample, or several packed ones, each a *segment*. A media item occupies one
    unbroken run of placeholder positions; the n-th run of a modality, in row-major order, belongs to
    row n of `media[modality]`.
    """

    input_ids: Tensor
    """(B, S) int64. Placeholders hold some valid token id; their embeddings are written over."""
    labels: Tensor
    """(B, S) int64: the token that position s shall predict (already shifted), or IGNORED_LABEL."""
    modality_ids: Tensor
    """(B, S) int64: TEXT, or the modality whose placeholder stands here."""
    segment_ids: Tensor
    """(B, S) int64: 0 on padding, else 1, 2, ... counting the samples packed into the row."""
    position_ids: Tensor
    """(B, S) int64: restarts at 0 with every segment."""
    media: dict[int, Tensor] = field(default_factory=dict)
    """Modality id -> (M, ...) encoder input, for example (M, 3, H, W) pixels. May lack a modality
    or hold zero rows: a batch without images is an ordinary batch."""
    sample_keys: list[str] = field(default_factory=list)
    """Key of every sample in row-major order, for logs and reports. Not a tensor; never sent."""

    @property
    def num_targets(self) -> int:
        """Positions that carry a target on this rank, in this micro-batch."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segment_ids != 0).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy runs beside what follows where the batch is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked host memory; called by a DataLoader that pins."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, act: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("input_ids", "labels", "modality_ids", "segment_ids", "position_ids")
        media = {modality: act(tensor) for modality, tensor in self.media.items()}
        tensors: dict[str, Any] = {name: act(getattr(self, name)) for name in names}
        return replace(self, media=media, **tensors)
