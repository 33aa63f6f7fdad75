"""The two quantised forms that pretrained MoE models are published in, read into plain numbers.

MXFP4 (GPT-OSS): blocks of 32 four-bit numbers (E2M1) that share one power of two. FP8 (DeepSeek-V3):
E4M3 numbers with one fp32 factor for every block of, usually, 128 x 128.
"""

from typing import Any

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7; codes 8 to 15 are the same with a minus sign."""


BLOCKS_AT_ONCE = 1024
"""Of 32 numbers: what an unpacking needs beside its result is some hundred KiB."""


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """(..., 32 G) bf16, exact, of blocks (..., G, 16) uint8 and scales (..., G) uint8.

    A byte holds two numbers, the low four bits first; a scale s stands for the factor 2^(s - 127).
    """
    value = torch.tensor([*_E2M1, *(-v for v in _E2M1)], dtype=torch.bfloat16)
    pair_of_byte = torch.stack([value.repeat(16), value.repeat_interleave(16)], dim=-1)
    out = torch.empty(*blocks.shape[:-2], 32 * blocks.shape[-2], dtype=torch.bfloat16)
    pairs, packed, exponents = out.view(-1, 16, 2), blocks.reshape(-1, 16), scales.reshape(-1)
    for first in range(0, len(packed), BLOCKS_AT_ONCE):
        some = slice(first, first + BLOCKS_AT_ONCE)
        exponent = exponents[some].to(torch.int32) - 127
        factor = torch.ldexp(torch.ones(exponent.shape), exponent).bfloat16()
        torch.mul(pair_of_byte[packed[some].long()], factor.view(-1, 1, 1), out=pairs[some])
    return out


def unpack_fp8(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(R, C): every block of the weight times its factor in fp32, rounded to `dtype`; the last blocks
    may be smaller."""
    out = torch.empty(weight.shape, dtype=dtype)
    for number, factor in enumerate(scale_inv.float()):
        rows = slice(number * block[0], (number + 1) * block[0])
        spread = factor.repeat_interleave(block[1])[: weight.shape[1]]
        out[rows] = weight[rows].float().mul_(spread)
    return out


def fp8_block(quantisation: dict[str, Any] | None, where: str) -> tuple[int, int] | None:
    """Block size of an FP8 checkpoint, None for one that needs no factors.

    Args:
        quantisation: `quantization_config` of config.json.

    Raises:
        ValueError: a form of quantisation that cannot be read.
    """
    if quantisation is None:
        return None
    method = quantisation.get("quant_method")
    if method == "mxfp4":
        return None
    size = quantisation.get("weight_block_size")
    if method == "fp8" and size is not None:
        return int(size[0]), int(size[1])
    raise ValueError(
        f"base.path={where} is quantised ({quantisation}); mxfp4 and fp8 with weight_block_size can be "
        "read, anything else must be converted to bf16 safetensors first"
    )
