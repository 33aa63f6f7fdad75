"""What may train, by part, under names that do not depend on the placement.

A *logical tensor* is what a checkpoint knows: one router row matrix, one expert's `gate_up`. A
parameter of a rank is one logical tensor, or, for a bank, one per expert that the rank holds, in
order, back to back. Names are `connectors.image.out_weight`, `layers.3.vision.rows.weight`,
`layers.3.vision.experts.0.gate_up`; expert ids count the new experts of that layer and extension.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_ext.config import Placement, Trainable
from moe_ext.model.extend import extended_layers
from moe_ext.model.multimodal import MultimodalMoE

BIT_SUM_WORDS = 1 << 20


@dataclass(frozen=True)
class Logical:
    """Where a logical tensor lies in a parameter of this rank."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """First element in the flattened parameter."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """One parameter of this rank that some stage may train."""

    name: str
    parameter: nn.Parameter
    trainable: Trainable
    sharded: bool = False
    expert_ids: tuple[int, ...] | None = None
    """A bank's experts held here, along the first dimension; None for any other parameter."""
    extensions: frozenset[str] = frozenset()
    """Those it belongs to; a connector to all that have its modality, and to none before them."""

    def logical(self) -> list[Logical]:
        """The logical tensors of this parameter, in the order of their elements."""
        shape = tuple(self.parameter.shape)
        if self.expert_ids is None:
            return [Logical(self.name, shape, 0)]
        bank, _, tensor = self.name.rpartition(".")
        size = math.prod(shape[1:])
        return [
            Logical(f"{bank}.{expert}.{tensor}", shape[1:], index * size)
            for index, expert in enumerate(self.expert_ids)
        ]


def parts_of(model: MultimodalMoE, without: frozenset[str] = frozenset()) -> list[Part]:
    """Every parameter that is not the base's or an encoder's, in an order equal on all ranks.

    Args:
        without: extensions that are left out, with the connectors of their modalities.
    """
    parts = [
        Part(
            f"connectors.{modality}.{name}",
            parameter,
            Trainable.connector,
            extensions=frozenset(extensions_of(model, modality)),
        )
        for modality, connector in model.connectors.items()
        for name, parameter in connector.named_parameters()
    ]
    for index, layer in extended_layers(model.lm).items():
        prefix = f"layers.{index}"
        if layer.router.delta is not None:
            parts.append(Part(f"{prefix}.router_delta", layer.router.delta, Trainable.router_delta))
        for extension, rows in layer.router.rows.items():
            for name, parameter in rows.named_parameters():
                calibrates = name.startswith("calibration.")
                kind = Trainable.calibration if calibrates else Trainable.new_rows
                path = f"{extension}.{name if calibrates else f'rows.{name}'}"
                own = frozenset([extension])
                parts.append(Part(f"{prefix}.{path}", parameter, kind, extensions=own))
        for extension, bank in layer.new.items():
            sharded = bank.placement is Placement.shard and layer.ep_group is not None
            for name, parameter in bank.named_parameters():
                parts.append(
                    Part(
                        f"{prefix}.{extension}.experts.{name}",
                        parameter,
                        Trainable.new_experts,
                        sharded,
                        tuple(bank.expert_ids),
                        frozenset([extension]),
                    )
                )
    return [part for part in parts if not part.extensions & without]


def extensions_of(model: MultimodalMoE, modality: str) -> set[str]:
    """The extensions whose experts the modality's tokens open."""
    return {
        name
        for layer in extended_layers(model.lm).values()
        for name, rows in layer.router.rows.items()
        if model.modality_of[modality] in rows.modalities
    }


def statics_of(model: MultimodalMoE, without: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Tensors of the extension that no optimizer has: a connector's standardisation, and the
    corrections that loss-free balancing moves. `without`: as in `parts_of`."""
    statics = {
        f"connectors.{modality}.{name}": buffer
        for modality, connector in model.connectors.items()
        if not extensions_of(model, modality) & without
        for name, buffer in connector.named_buffers()
    }
    for index, layer in extended_layers(model.lm).items():
        for extension, rows in layer.router.rows.items():
            if rows.learns_correction and extension not in without:
                statics[f"layers.{index}.{extension}.rows.correction"] = rows.correction
    return statics


def choose(
    model: MultimodalMoE, train: list[Trainable], extension: str | None = None
) -> list[Part]:
    """The parts that `train` names; they, and nothing else of the model, then require gradients.

    Args:
        extension: others keep their experts, rows, calibrations and their modalities' connectors as
            they are; None: all there are may train.

    Raises:
        ValueError: a name of `train` that this model has no parameter for.
    """
    model.requires_grad_(False)
    own = frozenset([extension])
    chosen = [
        part
        for part in parts_of(model)
        if part.trainable in train and (extension is None or part.extensions <= own)
    ]
    for kind in train:
        if not any(part.trainable is kind for part in chosen):
            raise ValueError(
                f"a stage trains {kind.name}, but this model has no such parameter yet"
                + ("" if extension is None else f" that is extension.name={extension}'s alone")
            )
    for part in chosen:
        part.parameter.requires_grad_(True)
    return chosen


class FrozenWatch:
    """Notices a frozen tensor that changed: a rolling sample at checkpoints, everything at the end.

    A sum over the bits of a tensor is kept (`bit_sum`), not the tensor. `extension`: as in `choose`.
    """

    def __init__(self, model: MultimodalMoE, chosen: list[Part], extension: str | None = None):
        trained = {id(part.parameter) for part in chosen}
        corrections = r"\.rows\." if extension is None else rf"\.{extension}\.rows\."
        statics = statics_of(model).items()
        trained |= {id(tensor) for name, tensor in statics if re.search(corrections, name)}
        named = [*model.named_parameters(), *model.named_buffers()]
        for modality, encoder in model.encoders.items():
            named += [(f"encoders.{modality}.{n}", t) for n, t in encoder.named_parameters()]
        self.tensors = [(name, t) for name, t in named if id(t) not in trained]
        self.sums = [bit_sum(t) for _, t in self.tensors]
        self.next = 0

    def changed(self, share: float = 0.125) -> list[str]:
        """Compares the next `share` of the tensors with their state at the start: a line a finding."""
        count, found = max(1, round(share * len(self.tensors))), []
        for _ in range(min(count, len(self.tensors))):
            name, tensor = self.tensors[self.next]
            if bit_sum(tensor) != self.sums[self.next]:
                found.append(f"the frozen tensor {name} changed during training")
            if tensor.grad is not None:
                found.append(f"the frozen tensor {name} received a gradient")
            self.next = (self.next + 1) % len(self.tensors)
        return found


def bit_sum(tensor: Tensor) -> int:
    """A sum over a tensor's bits, each 4 or 8 bytes weighted by their place.

    Any one changed element changes it, and so do two that change places. Equal on all devices.
    """
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    if flat.storage_offset() % 8:  # a piece of another tensor: words must start at a multiple of 8
        flat = flat.clone()
    total = flat.numel()
    words = flat[: total - total % 8].view(torch.int64)
    for start in range(0, words.numel(), BIT_SUM_WORDS):  # a block at a time: no copy of the whole
        piece = words[start : start + BIT_SUM_WORDS]
        # odd factors, so that no bit is multiplied away; int64 wraps, which is the point
        factors = torch.arange(1, 2 * piece.numel(), 2, device=piece.device)
        block = int((piece * factors).sum())
        total = (total * 1_000_003 + block) % 2**64
    for byte in flat[flat.numel() - flat.numel() % 8 :].tolist():
        total = (total * 1_000_003 + byte) % 2**64
    return total
