"""4-bit NormalFloat as bitsandbytes keeps it (QLoRA, arXiv 2305.14314): its format, its kernels.

A number is one of 16 values, spread as a normal distribution's quantiles are, times the largest absolute
value of its 64 neighbours in fp32; the first of two goes to a byte's high half. The package is asked for
when a bank is packed (`base.frozen_format=nf4`), never at import: it is an extra.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Neighbouring numbers of a row that share a scale; bitsandbytes' smallest on every device."""


def check_installed() -> None:
    """Raise ValueError, with the remedy, where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "base.frozen_format=nf4 needs the package bitsandbytes, which is not installed here: "
            "pip install 'moe_ext[nf4]', or base.frozen_format=plain"
        )


@cache
def _library() -> Any:
    check_installed()
    import bitsandbytes.functional

    return bitsandbytes.functional


def pack_nf4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I / 2) uint8 and scales (O, I / 64) fp32."""
    num_out, width = weight_OI.shape
    codes, state = _library().quantize_4bit(
        weight_OI.float().contiguous(), blocksize=BLOCK, quant_type="nf4"
    )
    return codes.view(num_out, width // 2), state.absmax.view(num_out, width // BLOCK)


def unpack_nf4(codes: Tensor, scale: Tensor) -> Tensor:
    """(O, I) fp32; whole blocks, of any rows and columns."""
    library = _library()
    state = library.QuantState(
        absmax=scale.contiguous().view(-1),
        shape=torch.Size((codes.shape[0], 2 * codes.shape[1])),
        code=_values(codes.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return library.dequantize_4bit(codes.contiguous().view(-1, 1), state)


@cache
def _values(device: torch.device) -> Tensor:
    return _library().get_4bit_type("nf4", device=device)
