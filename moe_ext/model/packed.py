"""A frozen bank in 8 or 4 bits: weights stay packed in memory and are unpacked a few rows at a time.

Shape letters: E experts held here, O and I a matrix's output and input width, G scales of a row,
R rows (of one part), o and i a segment of O and I.

In 8 bits a row (one output) of a matrix is int8 numbers between -127 and 127 and one fp32 scale, its
largest absolute value over 127. In 4 bits it is numbers between -7 and 7, two a byte, the first in the
low half and 8 added to both, with a bf16 scale for every 64 neighbours (fewer where the width is no
multiple of 64). What is computed is exactly the matrix `codes * scale`, rounded to the run's precision: a
packed bank equals a plain one that holds these numbers, and its error against the original is that of
rounding the weights, half a step at most. `nf4.py` has another 4-bit format, a library's, that is unpacked
and multiplied in the same way.

The product of an expert unpacks segments of about `SEGMENT_BYTES`, of outputs going forward and of
inputs going backward, so that no sum is cut: there is never more than one segment in full, and never a
copy of the bank. On a GPU the same loop is correct and slow; a kernel that multiplies packed weights
(bitsandbytes' LLM.int8 or 4-bit GEMM, torchao's int8 weight-only, Marlin) would take its place there. None of
them was tried here.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from moe_ext.model.nf4 import BLOCK, pack_nf4, unpack_nf4
from moe_ext.model.row_plan import Part

SEGMENT_BYTES = 1 << 20
"""Of unpacked weights at a time: with the rows they multiply they stay in a processor's cache."""

MOST = {8: 127, 4: 7}
"""Largest absolute code; the lowest one of the type is not used, so that a row is symmetrical."""

GROUP = 64
"""Neighbouring 4-bit numbers of a row that share a scale."""


def group_of(width: int, bits: int, nf4: bool = False) -> int:
    """Numbers of a row of that width that share a scale.

    Raises:
        ValueError: 4 bits and an odd width; NF4 and one that is no multiple of its block.
    """
    if nf4:
        if width % BLOCK:
            raise ValueError(
                f"base.frozen_format=nf4 gives every {BLOCK} neighbours of a row a scale, but a matrix of "
                f"this base is {width} wide; use base.frozen_format=plain"
            )
        return BLOCK
    group = width if bits == 8 else gcd(width, GROUP)
    if bits == 4 and group % 2:
        raise ValueError(
            f"base.frozen_bits=4 packs two neighbouring numbers into a byte, but a matrix of this base "
            f"is {width} wide; use base.frozen_bits=8"
        )
    return group


def packed_shapes(
    size: tuple[int, ...], bits: int, nf4: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of what a bank keeps of a stack of matrices (E, O, I)."""
    experts, num_out, num_in = size
    groups = num_in // group_of(num_in, bits, nf4)
    if bits == 8:
        codes = ((experts, num_out, num_in), torch.int8)
        return {"codes": codes, "scale": ((experts, num_out, groups), torch.float32)}
    codes = ((experts, num_out, num_in // 2), torch.uint8)
    scale = torch.float32 if nf4 else torch.bfloat16
    return {"codes": codes, "scale": ((experts, num_out, groups), scale)}


def pack_rows(weight_OI: Tensor, bits: int = 8, nf4: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (O, I) int8, or (O, I / 2) uint8 in 4 bits, and scales (O, G); plain zeros have scale 1."""
    num_out, width = weight_OI.shape
    if nf4:
        group_of(width, bits, nf4)
        return pack_nf4(weight_OI)
    grouped = weight_OI.float().reshape(num_out, -1, group_of(width, bits))
    scale_OG = grouped.abs().amax(2) / MOST[bits]
    scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))
    if bits == 4:
        scale_OG = scale_OG.to(torch.bfloat16)
    codes = (grouped / scale_OG.float().unsqueeze(2)).round_().clamp_(-MOST[bits], MOST[bits])
    codes = codes.to(torch.int8).view(num_out, width)
    if bits == 8:
        return codes, scale_OG
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4), scale_OG


class Packed:
    """(E, O, I) matrices in 8 or 4 bits; views of the buffers of a bank. NF4 is told by fp32 scales."""

    requires_grad = False

    def __init__(self, codes: Tensor, scale_EOG: Tensor):
        self.codes, self.scale = codes, scale_EOG
        self.bits = 8 if codes.dtype is torch.int8 else 4
        self.nf4 = self.bits == 4 and scale_EOG.dtype is torch.float32
        width = codes.shape[2] * (8 // self.bits)
        self.shape = (*codes.shape[:2], width)
        self.group = width // scale_EOG.shape[2]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def chunk(self, number: int, dim: int) -> tuple["Packed", ...]:
        """Equal parts of the outputs (dim 1), as views."""
        assert dim == 1
        halves = zip(self.codes.chunk(number, 1), self.scale.chunk(number, 1), strict=True)
        return tuple(Packed(codes, scale) for codes, scale in halves)

    def unpack(self, expert: int, dtype: torch.dtype) -> Tensor:
        """(O, I): one expert's matrix in full; for tests and for writing it down."""
        return self._segment(expert, slice(None), slice(0, self.shape[2]), dtype)

    def linear(self, rows: Tensor, part: Part, out: Tensor | None) -> Tensor:
        """(R, O): every expert's rows times its own matrix, rows[e] @ weight[e].T."""
        _, num_out, num_in = self.shape
        out = rows.new_empty(len(rows), num_out) if out is None else out
        step, every = _step(num_in, rows), slice(0, num_in)
        for expert, mine, into in _by_expert(part, rows, out):
            for first in range(0, num_out, step):
                outputs = slice(first, first + step)
                matrix = self._segment(expert, outputs, every, rows.dtype)
                torch.mm(mine, matrix.t(), out=into[:, outputs])
        return out

    def linear_backward_input(
        self, grad: Tensor, part: Part, out: Tensor | None, add: bool = False
    ) -> Tensor:
        """(R, I): gradient of `linear` for its rows, grad[e] @ weight[e]; `add`s it to `out`."""
        _, num_out, num_in = self.shape
        out = grad.new_empty(len(grad), num_in) if out is None else out
        step = _step(num_out, grad)
        step = max(self.group, step // self.group * self.group) if self.bits == 4 else step
        for expert, mine, into in _by_expert(part, grad, out):
            for first in range(0, num_in, step):
                inputs = slice(first, min(first + step, num_in))
                matrix = self._segment(expert, slice(None), inputs, grad.dtype)
                if add:
                    into[:, inputs].addmm_(mine, matrix)
                else:
                    torch.mm(mine, matrix, out=into[:, inputs])
        return out

    def _segment(self, expert: int, outputs: slice, inputs: slice, dtype: torch.dtype) -> Tensor:
        """(o, i) in the run's precision: the product is taken in fp32 and rounded once.

        `inputs` begins and ends with a group in 4 bits; in 8 bits a row is one group.
        """
        scale_oG = self.scale[expert, outputs]
        if self.bits == 8:
            return (self.codes[expert, outputs, inputs] * scale_oG).to(dtype)
        pairs = self.codes[expert, outputs, inputs.start // 2 : inputs.stop // 2]
        groups = slice(inputs.start // self.group, inputs.stop // self.group)
        if self.nf4:
            return unpack_nf4(pairs, scale_oG[:, groups]).to(dtype)
        codes = torch.stack([pairs & 15, pairs >> 4], dim=2).view(len(pairs), -1, self.group)
        scale_og1 = scale_oG[:, groups].float().unsqueeze(2)
        return ((codes.to(torch.int8) - 8) * scale_og1).flatten(1).to(dtype)


@dataclass
class Rounding:
    """What packing did to the matrices seen so far, beside what bf16 would have done."""

    square: float = 0.0
    square_off: float = 0.0
    square_off_bf16: float = 0.0

    def note(self, weight_OI: Tensor, packed: Packed) -> None:
        exact = weight_OI.to(packed.device, torch.float32)
        self.square += float(exact.double().square().sum())
        for name, kept in (
            ("square_off", packed.unpack(0, torch.float32)),
            ("square_off_bf16", exact.bfloat16().float()),
        ):
            off = float((kept - exact).double().square().sum())
            setattr(self, name, getattr(self, name) + off)

    def add(self, other: "Rounding") -> None:
        self.square += other.square
        self.square_off += other.square_off
        self.square_off_bf16 += other.square_off_bf16

    @property
    def relative(self) -> tuple[float, float]:
        """Norm of the error over the norm of the numbers: as packed, and in bf16."""
        square = max(self.square, 1e-30)
        return (self.square_off / square) ** 0.5, (self.square_off_bf16 / square) ** 0.5


def _step(width: int, like: Tensor) -> int:
    return max(1, SEGMENT_BYTES // (width * like.element_size()))


def _by_expert(part: Part, rows: Tensor, out: Tensor):
    """Expert, its rows and its part of the result, for experts that have rows."""
    assert part.count_list is not None, "packed banks are multiplied expert by expert"
    counts = part.count_list
    first = part.experts.start
    for index, (mine, into) in enumerate(zip(rows.split(counts), out.split(counts), strict=True)):
        if len(mine):
            yield first + index, mine, into
