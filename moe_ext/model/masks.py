"""A boolean attention mask in the form that a Hugging Face decoder takes it.

The library passes a four-dimensional mask through as it is: it adds it to the scores in the `eager`
implementation, where a boolean one would be read as 0 and 1, and it forgets sliding windows.

Shape letters: B sequences, S positions.
"""

from typing import Any

import torch
from torch import Tensor

_ATTENTION = {"full_attention", "sliding_attention", "indexed_attention"}
"""Kinds of layers that see a sample through the mask; an index chooses among the keys it allows."""


def takes_masks(config: Any) -> bool:
    """Whether every layer of the architecture attends through a mask; a recurrent layer does not."""
    return set(getattr(config, "layer_types", None) or ()) <= _ATTENTION


def decoder_mask(
    config: Any, mask_B1SS: Tensor | None, position_BS: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor] | None:
    """`attention_mask` for the decoder of `config`; None (plain causal attention) stays None.

    Args:
        mask_B1SS: bool, True where a query (third dimension) sees a key.
        position_BS: positions, from which a sliding window counts: it sees `sliding_window` of them.
        dtype: the model's.

    Raises:
        ValueError: the architecture has recurrent layers, whose state no mask can separate.
    """
    if mask_B1SS is None:
        return None
    if not takes_masks(config):
        raise ValueError(
            f"a {config.model_type} model has recurrent layers, which carry state from one packed "
            "sample into the next; use data.pack=false"
        )
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if window is not None and not types:
        types = {"sliding_attention"}
    masks = {"full_attention": mask_B1SS}
    if window is not None and "sliding_attention" in types:
        near = position_BS.unsqueeze(2) - position_BS.unsqueeze(1) < window
        masks["sliding_attention"] = mask_B1SS & near.unsqueeze(1)
    if config._attn_implementation == "eager":
        masks = {kind: _additive(mask, dtype) for kind, mask in masks.items()}
    if len(types) > 1:
        return masks
    return masks["sliding_attention" if "sliding_attention" in masks else "full_attention"]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen, the lowest number of the dtype elsewhere."""
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros_like(lowest), lowest)
