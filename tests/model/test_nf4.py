"""Frozen experts in bitsandbytes' NF4: what it rounds to, what a bank computes with it, its memory, its error.

Skipped without the package (extra `nf4`), but for what is said when it is missing.
"""

import importlib.util

import pytest
import torch

from moe_ext.config import FrozenFormat, Placement
from moe_ext.model import nf4
from moe_ext.model.activations import ExpertShape
from moe_ext.model.experts import FrozenBank, PackedBank
from moe_ext.model.extend import announce
from moe_ext.model.layouts import ExpertTensors
from moe_ext.model.load import extended_layers, fill_expert, load_base
from moe_ext.model.packed import Packed, pack_rows
from moe_ext.planning.memory import expert_bytes
from moe_ext.planning.sizes import base_config, base_sizes
from tests.model.layers import rows_of
from tests.model.tiny import save_tiny

EXPERTS, DIM, WIDE, TOKENS, SLOTS = 3, 128, 192, 40, 2
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra nf4"
)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"pip install 'moe_ext\[nf4\]', or base.frozen_format=plain"
    ):
        nf4.check_installed()


@needs_library
def test_every_number_is_the_nearest_of_sixteen():
    weight = 0.1 * torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))
    codes, scale = pack_rows(weight, 4, nf4=True)
    assert (codes.dtype, scale.dtype) == (torch.uint8, torch.float32)
    block = weight.view(6, -1, 64)
    assert torch.equal(scale, block.abs().amax(2))
    values = nf4._values(torch.device("cpu"))
    nearest = (block / scale.unsqueeze(2)).unsqueeze(3).sub(values).abs().argmin(3).view(6, DIM)
    own = torch.stack([codes >> 4, codes & 15], 2).view(6, DIM)
    # bitsandbytes decides at thresholds of few digits: a number midway may go either way
    assert (own.long() != nearest).float().mean() < 0.01
    kept = Packed(codes[None], scale[None])
    wanted = values[own.long()] * scale.repeat_interleave(64, 1)
    assert torch.equal(kept.unpack(0, torch.float32), wanted)
    part = kept._segment(0, slice(2, 5), slice(64, 128), torch.float32)
    assert torch.equal(part, wanted[2:5, 64:])


def banks(dtype: torch.dtype) -> tuple[PackedBank, FrozenBank]:
    """A bank in NF4, and a plain one that holds exactly what it unpacks to."""
    generator = torch.Generator().manual_seed(1)
    sizes = (ExpertShape(DIM, WIDE), list(range(EXPERTS)), EXPERTS, Placement.shard)
    tight, plain = (
        PackedBank(*sizes, dtype=dtype, bits=4, nf4=True),
        FrozenBank(*sizes, dtype=dtype),
    )
    for slot in range(EXPERTS):
        names = {"gate": (WIDE, DIM), "up": (WIDE, DIM), "down": (DIM, WIDE)}
        drawn = {n: 0.3 * torch.randn(*size, generator=generator) for n, size in names.items()}
        fill_expert(tight, slot, ExpertTensors(**drawn), "test")
        plain.gate_up[slot] = tight.gate_up.unpack(slot, dtype)
        plain.down[slot] = tight.down.unpack(slot, dtype)
    return tight, plain


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_what_it_unpacks_to(monkeypatch, dtype):
    monkeypatch.setattr("moe_ext.model.packed.SEGMENT_BYTES", 4096)  # several segments a matrix
    generator = torch.Generator().manual_seed(2)
    x, grad = torch.randn(2, TOKENS, DIM, generator=generator).to(dtype).unbind(0)
    expert = torch.stack([torch.randperm(EXPERTS, generator=generator)[:SLOTS] for _ in x])
    weight = torch.rand(TOKENS, SLOTS, generator=generator)
    found = []
    for bank in banks(dtype):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = bank(*inputs, rows_of(bank, expert))
        out.backward(grad)
        found.append((out.detach(), inputs[0].grad, inputs[1].grad))
    for actual, expected in zip(*found, strict=True):
        off = float((actual - expected).abs().max() / expected.abs().max())
        assert off < (1e-5 if dtype is torch.float32 else 2e-2), off


@needs_library
def test_a_base_errs_less_than_in_plain_4_bits_and_takes_what_the_planner_says(tmp_path):
    save_tiny(tmp_path, "mixtral", hidden_size=64, intermediate_size=128)
    errors, bytes_of = {}, {}
    for form in FrozenFormat:
        lm = load_base(tmp_path, dtype=torch.bfloat16, frozen_bits=4, frozen_format=form)
        banks = [layer.frozen for layer in extended_layers(lm).values()]
        errors[form] = banks[0].rounding.relative[0]
        bytes_of[form] = sum(b.nbytes for bank in banks for b in bank.buffers())
        said = (
            "4 bits (NF4): relative error" if form is FrozenFormat.nf4 else "4 bits: relative error"
        )
        assert said in announce(lm)
        sizes = base_sizes(base_config(tmp_path))
        planned = expert_bytes(sizes, 2, 4, form is FrozenFormat.nf4)
        assert bytes_of[form] == planned * sum(len(bank.expert_ids) for bank in banks)
    print("relative error:", errors)
    assert 0.05 < errors[FrozenFormat.nf4] < 0.95 * errors[FrozenFormat.plain]
