"""How checkpoints keep routed experts: per expert, or stacked; read and written one expert at a time.

Shape letters: E experts, D hidden size, I intermediate size of one expert.

Inside the model an expert is always `gate_up` [2I, D] (gate rows first) and `down` [D, I]; a layout
knows where these numbers lie in a checkpoint's tensors. Reading yields views of the mapped file, so
that a rank can copy the experts it holds straight to their place and never touches the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_ext.model.quantised import unpack_mxfp4


class Source(Protocol):
    """Where tensors come from: a checkpoint folder (`load.Checkpoint`) or a plain dictionary's wrapper."""

    def __contains__(self, key: str) -> bool: ...

    def tensor(self, key: str) -> Tensor:
        """The whole tensor of `key`."""

    def row(self, key: str, index: int) -> Tensor:
        """Entry `index` of the tensor's first dimension, without reading the others."""


@dataclass
class ExpertTensors:
    """One expert's numbers, as views or copies; biases are None where the family has none."""

    gate: Tensor
    """[I, D]"""
    up: Tensor
    """[I, D]"""
    down: Tensor
    """[D, I]"""
    gate_bias: Tensor | None = None
    """[I]"""
    up_bias: Tensor | None = None
    """[I]"""
    down_bias: Tensor | None = None
    """[D]"""

    def map(self, change: Callable[[Tensor], Tensor]) -> "ExpertTensors":
        """Every tensor that is there, changed."""
        changed = {name: change(v) for name, v in vars(self).items() if v is not None}
        return ExpertTensors(**changed)


ReadExpert = Callable[[int], ExpertTensors]
"""Logical expert id -> its numbers."""


@dataclass(frozen=True)
class PerExpert:
    """Three matrices an expert; the keys, relative to the decoder layer, hold `{expert}`."""

    gate: str
    up: str
    down: str

    def key(self) -> str:
        """A key that a checkpoint of this layout has in every sparse layer."""
        return self.gate.format(expert=0)

    def keys(self, prefix: str, num_experts: int) -> list[str]:
        """Full keys of all experts of a layer."""
        spelt = (self.gate, self.up, self.down)
        return [prefix + key.format(expert=e) for e in range(num_experts) for key in spelt]

    def read(self, source: Source, prefix: str, expert: int) -> ExpertTensors:
        """Expert `expert` of the layer whose keys start with `prefix`."""
        gate, up, down = (
            source.tensor(prefix + key.format(expert=expert))
            for key in (self.gate, self.up, self.down)
        )
        return ExpertTensors(gate, up, down)

    def write(self, prefix: str, num_experts: int, read: ReadExpert) -> dict[str, Tensor]:
        """The checkpoint's tensors of a layer with `num_experts` experts, by full key."""
        tensors = {}
        for expert in range(num_experts):
            weights = read(expert)
            for key, value in (
                (self.gate, weights.gate),
                (self.up, weights.up),
                (self.down, weights.down),
            ):
                tensors[prefix + key.format(expert=expert)] = value.contiguous()
        return tensors


@dataclass(frozen=True)
class Stacked:
    """All experts of a layer in one tensor each: `gate_up` [E, 2I, D] and `down` [E, D, I]."""

    gate_up: str
    down: str
    gate_up_bias: str = ""
    """[E, 2I], where the family has biases."""
    down_bias: str = ""
    """[E, D]"""
    transposed: bool = False
    """The tensors are [E, D, 2I] and [E, I, D]."""
    interleaved: bool = False
    """Gate and up rows alternate: gate 0, up 0, gate 1, ..."""
    mxfp4: bool = False
    """The matrices are stored as `<key>_blocks` and `<key>_scales`; read only."""

    def key(self) -> str:
        """A key that a checkpoint of this layout has in every sparse layer."""
        return self.gate_up + ("_blocks" if self.mxfp4 else "")

    def keys(self, prefix: str, num_experts: int) -> list[str]:
        """Full keys of all experts of a layer."""
        biases = [key for key in (self.gate_up_bias, self.down_bias) if key]
        parts = ("_blocks", "_scales") if self.mxfp4 else ("",)
        matrices = [key + part for key in (self.gate_up, self.down) for part in parts]
        return [prefix + key for key in [*matrices, *biases]]

    def read(self, source: Source, prefix: str, expert: int) -> ExpertTensors:
        """Expert `expert` of the layer whose keys start with `prefix`."""
        gate_up, down = (
            self._matrix(source, prefix + k, expert) for k in (self.gate_up, self.down)
        )
        if self.transposed:
            gate_up, down = gate_up.T, down.T
        gate, up = self._halves(gate_up)
        if not self.gate_up_bias:
            return ExpertTensors(gate, up, down)
        gate_bias, up_bias = self._halves(source.row(prefix + self.gate_up_bias, expert))
        down_bias = source.row(prefix + self.down_bias, expert)
        return ExpertTensors(gate, up, down, gate_bias, up_bias, down_bias)

    def write(self, prefix: str, num_experts: int, read: ReadExpert) -> dict[str, Tensor]:
        """The checkpoint's tensors of a layer with `num_experts` experts, by full key."""
        assert not self.mxfp4, "written in another layout"
        experts = [read(expert) for expert in range(num_experts)]
        gate_up = torch.stack([self._joined(weights.gate, weights.up) for weights in experts])
        down = torch.stack([weights.down for weights in experts])
        if self.transposed:
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        tensors = {prefix + self.gate_up: gate_up, prefix + self.down: down}
        if self.gate_up_bias:
            biases = [self._joined(weights.gate_bias, weights.up_bias) for weights in experts]
            tensors[prefix + self.gate_up_bias] = torch.stack(biases)
            down_biases = [weights.down_bias for weights in experts]
            tensors[prefix + self.down_bias] = torch.stack(down_biases)  # type: ignore[arg-type]
        return tensors

    def _matrix(self, source: Source, key: str, expert: int) -> Tensor:
        if not self.mxfp4:
            return source.row(key, expert)
        return unpack_mxfp4(
            source.row(key + "_blocks", expert), source.row(key + "_scales", expert)
        )

    def _halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return gate_up[0::2], gate_up[1::2]
        gate, up = gate_up.chunk(2)
        return gate, up

    def _joined(self, gate: Tensor | None, up: Tensor | None) -> Tensor:
        assert gate is not None, "a layout with biases got an expert without"
        assert up is not None
        if self.interleaved:
            return torch.stack([gate, up], dim=1).flatten(0, 1)
        return torch.cat([gate, up])


ExpertLayout = PerExpert | Stacked
