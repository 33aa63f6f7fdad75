"""What surrounds a forward pass: which token is what, and what every layer did with it.

Shape letters: B sequences, S positions or slots of a token, T = B * S tokens, K = top_k, X all
experts of a layer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_ext.batch import TEXT
from moe_ext.config import Scope


@dataclass
class LayerRecord:
    """What one layer routed in one forward pass."""

    expert_TS: Tensor
    """(T, S) int64 logical ids, -1 for an empty slot."""
    num_experts: int
    """E + N of the layer."""
    base_expert_TK: Tensor | None = None
    """(T, K) what the frozen rows alone choose; None where no token needed it (`keeps_base_choice`)."""
    prob_sum_X: Tensor | None = None
    """(X,) fp32 with graph: sum over the counted tokens of the router's probabilities, which sum to
    one a token."""
    z_sum: Tensor | None = None
    """() fp32 with graph: sum of squared log-sum-exp over the counted tokens."""
    kl_sum: Tensor | None = None
    """() fp32 with graph: sum of KL(base's routing || extended routing) over the counted tokens, in
    nats; None in a layer without new experts."""
    counted_T: Tensor | None = None
    """(T,) bool: tokens the losses count: not padding, candidates not restricted."""

    def counts_by_kind(self, kind_T: Tensor, num_kinds: int) -> Tensor:
        """(G, X) int64: how often the tokens of each kind chose each expert; a negative kind: uncounted."""
        chosen_TS = (self.expert_TS >= 0) & (kind_T >= 0).unsqueeze(1)
        flat_TS = kind_T.unsqueeze(1) * self.num_experts + self.expert_TS
        # a sum and no bincount of the chosen ones: nothing waits for the device
        counts = flat_TS.new_zeros(num_kinds * self.num_experts)
        place_TS = flat_TS.masked_fill(~chosen_TS, 0)
        return counts.scatter_add_(0, place_TS.view(-1), chosen_TS.long().view(-1)).view(
            num_kinds, -1
        )


@dataclass
class RoutingContext:
    """Set around a forward pass; layers leave their records in it. Lives until the pass's backward."""

    modality_BS: Tensor
    segment_BS: Tensor
    """0 marks padding, which is routed nowhere."""
    seen_B: dict[int, Tensor] = field(default_factory=dict)
    """Modality -> (B,) bool: it stood in an earlier part of the sequence (decoding with a cache)."""
    live_T: Tensor | None = None
    """(T,) bool: tokens whose gradient can reach something that trains; None is all of them."""
    with_losses: bool = False
    """Record what the balance loss and the z-loss need."""
    keeps_base_choice: bool = False
    """Record what the frozen rows alone would choose also where no token is left to them."""
    records: dict[int, LayerRecord] = field(default_factory=dict)
    replays: bool = False
    """A part of the pass is computed again in backward: layers choose what their records say."""
    _allowed: dict[tuple[Scope, tuple[int, ...]], Tensor] = field(default_factory=dict)

    @property
    def valid_T(self) -> Tensor:
        return self.segment_BS.reshape(-1) != 0

    def allowed_T(self, scope: Scope, modalities: tuple[int, ...]) -> Tensor:
        """(T,) bool: tokens that may choose the experts of an extension of these modalities."""
        key = (scope, modalities)
        if key not in self._allowed:
            self._allowed[key] = self._compute_allowed(scope, modalities).reshape(-1)
        return self._allowed[key]

    def all_allowed(self, allowed_T: Tensor, scopes: Iterable[Scope]) -> bool:
        """Whether no real token is left to the frozen rows alone. On a GPU only the scopes are asked:
        to look at the tokens would wait for the device.

        Args:
            allowed_T: tokens that may choose the experts of any extension.
        """
        if any(scope is Scope.joint for scope in scopes):
            return True
        return allowed_T.device.type == "cpu" and bool((allowed_T | ~self.valid_T).all())

    def _compute_allowed(self, scope: Scope, modalities: tuple[int, ...]) -> Tensor:
        valid = self.segment_BS != 0
        if scope is Scope.joint:
            return valid
        new = torch.isin(self.modality_BS, self.modality_BS.new_tensor(modalities))
        if scope is Scope.modality:
            return new & valid
        # preserve: it looks back inside the segment, never ahead
        count = new.cumsum(1)
        starts = torch.ones_like(new)
        starts[:, 1:] = self.segment_BS[:, 1:] != self.segment_BS[:, :-1]
        before_segment = torch.where(starts, count - new.long(), 0).cummax(1).values
        allowed = count > before_segment
        for modality in modalities:
            if modality in self.seen_B:
                allowed = allowed | self.seen_B[modality].unsqueeze(1)
        return allowed & valid


def text_context(batch_size: int, length: int, device: torch.device) -> RoutingContext:
    """The context of plain text without padding: what a layer assumes when nobody set one."""
    zeros = torch.full((batch_size, length), TEXT, dtype=torch.int64, device=device)
    return RoutingContext(zeros, torch.ones_like(zeros))


class ContextHolder:
    """Where all extended layers of one model find the context of the pass under way.

    An object shared by the layers, and not a global: activation checkpointing runs a layer again in
    backward, on a thread of autograd's own.
    """

    def __init__(self) -> None:
        self.context: RoutingContext | None = None

    @contextmanager
    def during(self, context: RoutingContext) -> Iterator[None]:
        """Inside, layers find `context`. It ends with its pass: the next one is of other tokens."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    @contextmanager
    def replaying(self, context: RoutingContext) -> Iterator[None]:
        """Inside, a part of that pass is computed again: its tokens go where they went."""
        with self.during(context):
            context.replays = True
            try:
                yield
            finally:
                context.replays = False
