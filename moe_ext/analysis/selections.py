"""Which experts tokens choose: counts by layer, kind of token and expert, from the routing records.

Shape letters: L sparse layers, G kinds of token, X experts of the widest layer (frozen + new),
T tokens of a batch, S slots of a token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ext.analysis.reduce import Ranks
from moe_ext.batch import Batch
from moe_ext.config import Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.moe import extended_layers
from moe_ext.model.multimodal import MultimodalMoE

KINDS = ("image tokens", "text after an image", "text alone")
"""Kinds of token. "Image" stands for any modality that is not text."""
IMAGE, TEXT_AFTER, TEXT_ALONE = range(3)


@dataclass
class Selections:
    """Selection counts of a model over some batches, summed over ranks."""

    layers: list[int]
    num_frozen: list[int]
    num_new: list[int]
    count_LGX: Tensor
    """int64: selections of an expert by tokens of a kind; columns past a layer's experts are zero."""
    tokens_LG: Tensor
    """int64: tokens of a kind."""
    affected_LG: Tensor
    """int64: tokens whose chosen set lacks an expert that the frozen rows alone would choose."""

    @property
    def top_k(self) -> int:
        """Selections a token, rounded: a shared slot may add to it."""
        return round(int(self.count_LGX[0].sum()) / max(int(self.tokens_LG[0].sum()), 1))

    def share(self, kind: int) -> list[Tensor]:
        """A layer: (experts,) float64, each expert's share of the layer's selections by that kind."""
        shares = []
        for i in range(len(self.layers)):
            count = self.count_LGX[i, kind, : self.num_frozen[i] + self.num_new[i]].double()
            shares.append(count / count.sum().clamp(min=1))
        return shares

    def to_json(self) -> dict[str, Any]:
        """Counts, and per kind the shares of new experts and of affected tokens over extended layers."""
        extended = [i for i, new in enumerate(self.num_new) if new]
        new_share, affected_share = {}, {}
        for g, kind in enumerate(KINDS):
            chosen = int(self.count_LGX[extended, g].sum())
            new = sum(int(self.count_LGX[i, g, self.num_frozen[i] :].sum()) for i in extended)
            tokens = int(self.tokens_LG[extended, g].sum())
            if tokens:
                new_share[kind] = new / max(chosen, 1)
                affected_share[kind] = int(self.affected_LG[extended, g].sum()) / tokens
        return {
            "layers": [
                {
                    "layer": layer,
                    "num_frozen": self.num_frozen[i],
                    "num_new": self.num_new[i],
                    "count": {
                        kind: self.count_LGX[i, g, : self.num_frozen[i] + self.num_new[i]].tolist()
                        for g, kind in enumerate(KINDS)
                        if int(self.tokens_LG[i, g])
                    },
                }
                for i, layer in enumerate(self.layers)
            ],
            "new_share": new_share,
            "affected_share": affected_share,
        }


@torch.no_grad()
def count_selections(
    model: MultimodalMoE, batches: Iterable[Batch], ranks: Ranks | None = None
) -> Selections:
    """Selections over this rank's batches, added up over ranks by one reduction of one tensor.

    A collective: under expert parallelism every rank passes equally many batches.
    """
    layers = extended_layers(model.lm)
    num_frozen = [layer.num_frozen for layer in layers.values()]
    num_new = [layer.num_new for layer in layers.values()]
    widest = max(f + n for f, n in zip(num_frozen, num_new, strict=True))
    # X columns of counts, then tokens, then affected tokens
    total = torch.zeros(len(layers), len(KINDS), widest + 2, dtype=torch.int64)
    was_training = model.training
    model.eval()
    for batch in batches:
        context = model(batch, keeps_base_choice=True).context
        kind_T = token_kinds(context)
        for i, layer in enumerate(layers):
            num_experts = num_frozen[i] + num_new[i]
            counts_GX, tokens_G, affected_G = _count(context, layer, kind_T)
            total[i, :, :num_experts] += counts_GX
            total[i, :, -2] += tokens_G
            total[i, :, -1] += affected_G
    model.train(was_training)
    total = (ranks or Ranks()).add(total)
    return Selections(
        list(layers), num_frozen, num_new, total[:, :, :widest], total[:, :, -2], total[:, :, -1]
    )


def token_kinds(context: RoutingContext) -> Tensor:
    """(T,) int64: the kind of every token, -1 on padding."""
    modality_T = context.modality_BS.reshape(-1)
    new = tuple(modality_T.unique().tolist())
    after_T = context.allowed_T(Scope.preserve, tuple(m for m in new if m != 0))
    kind_T = torch.where(after_T, TEXT_AFTER, TEXT_ALONE)
    kind_T = torch.where(modality_T != 0, IMAGE, kind_T)
    return kind_T.masked_fill(~context.valid_T, -1)


def _count(context: RoutingContext, layer: int, kind_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int64, by kind, of one layer of one pass: choices (G, X), tokens (G,), affected tokens (G,)."""
    record = context.records[layer]
    expert_TS = record.expert_TS
    base_TK = record.base_expert_TK
    lost_T = torch.zeros_like(kind_T, dtype=torch.bool)
    if base_TK is not None:
        lost_T = ~(base_TK.unsqueeze(2) == expert_TS.unsqueeze(1)).any(2).all(1)
    kinds = len(KINDS)
    tokens_G = torch.bincount(kind_T[kind_T >= 0], minlength=kinds)
    affected_G = torch.bincount(kind_T[lost_T & (kind_T >= 0)], minlength=kinds)
    counts_GX = record.counts_by_kind(kind_T, kinds)
    return counts_GX.cpu(), tokens_G.cpu(), affected_G.cpu()
