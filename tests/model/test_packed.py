"""A frozen bank in 8 bits: what it computes, its gradients, its memory, and its error."""

import hashlib

import pytest
import torch

from moe_ext.config import CalibrationKind, ExtensionConfig, Placement
from moe_ext.model import packed
from moe_ext.model.activations import ExpertShape
from moe_ext.model.experts import FrozenBank, PackedBank
from moe_ext.model.extend import LayerPlan, add_extension, announce
from moe_ext.model.layouts import ExpertTensors
from moe_ext.model.load import extended_layers, fill_expert, load_base
from moe_ext.model.packed import pack_rows
from tests.model.layers import rows_of
from tests.model.tiny import save_tiny

EXPERTS, DIM, TOKENS, SLOTS = 5, 48, 60, 2


@pytest.mark.parametrize(("bits", "group"), [(8, 96), (4, 32)])
def test_a_number_is_off_by_half_a_step_at_most(bits, group):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * 3
    weight[7] = 0
    codes, scale = pack_rows(weight, bits)
    assert scale.shape == (40, 96 // group)
    assert codes.nbytes == 40 * 96 * bits // 8
    found = packed.Packed(codes.unsqueeze(0), scale.unsqueeze(0)).unpack(0, torch.float32)
    step = scale.float().repeat_interleave(group, 1)
    # a scale in bf16 may be too small for the largest number by 2^-9 of it: 7 * 2^-9 steps
    assert bool(((found - weight).abs() <= (0.5001 if bits == 8 else 0.52) * step).all())
    assert bool((found[7] == 0).all())
    assert float((found - weight).abs().max()) > 0


def test_odd_widths_are_refused_in_4_bits():
    with pytest.raises(ValueError, match="base.frozen_bits=4 .* 33 wide"):
        pack_rows(torch.zeros(2, 33), 4)


def banks(wide: int, dtype: torch.dtype, bias: bool, bits: int) -> tuple[PackedBank, FrozenBank]:
    """A packed bank, and a plain one that holds exactly what it unpacks to."""
    generator = torch.Generator().manual_seed(wide)
    shape = ExpertShape(DIM, wide, bias=bias)
    sizes = (shape, list(range(EXPERTS)), EXPERTS, Placement.shard)
    tight = PackedBank(*sizes, dtype=dtype, bits=bits)
    plain = FrozenBank(*sizes, dtype=dtype)
    for slot in range(EXPERTS):
        names = {"gate": (wide, DIM), "up": (wide, DIM), "down": (DIM, wide)}
        if bias:
            names |= {"gate_bias": (wide,), "up_bias": (wide,), "down_bias": (DIM,)}
        drawn = {n: 0.3 * torch.randn(*size, generator=generator) for n, size in names.items()}
        fill_expert(tight, slot, ExpertTensors(**drawn), "test")
        fill_expert(plain, slot, ExpertTensors(**drawn), "test")
        plain.gate_up[slot] = tight.gate_up.unpack(slot, dtype)
        plain.down[slot] = tight.down.unpack(slot, dtype)
    return tight, plain


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("wide", "bias"), [(40, False), (40, True), (1024, False)])
def test_it_computes_with_what_it_unpacks_to(monkeypatch, wide, bias, dtype, bits):
    """Widths from 1,024 take gate and up rows apart; segments are small here, several a matrix."""
    largest = []
    segment = packed.Packed._segment

    def watched(self, *where):
        largest.append(segment(self, *where).nbytes)
        return segment(self, *where)

    tight, plain = banks(wide, dtype, bias, bits)
    monkeypatch.setattr(packed, "SEGMENT_BYTES", 4096)
    monkeypatch.setattr(packed.Packed, "_segment", watched)
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, TOKENS, DIM, generator=generator).to(dtype).unbind(0)
    expert = torch.stack([torch.randperm(EXPERTS, generator=generator)[:SLOTS] for _ in x])
    weight = torch.rand(TOKENS, SLOTS, generator=generator)
    found = []
    for bank in (tight, plain):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = bank(*inputs, rows_of(bank, expert))
        out.backward(grad)
        found.append((out.detach(), inputs[0].grad, inputs[1].grad))
    for actual, expected in zip(*found, strict=True):
        off = float((actual - expected).abs().max() / expected.abs().max())
        assert off < (1e-5 if dtype is torch.float32 else 2e-2), off
    # in 4 bits at least one group of every output: 64 columns of 1,024 rows here
    least = max(4096, 64 * 2 * wide * dtype.itemsize if bits == 4 else 0)
    assert max(largest) <= least < EXPERTS * 2 * wide * DIM * dtype.itemsize


def test_memory_is_a_byte_or_half_a_number():
    held = {}
    for bits in (8, 4):
        tight, plain = banks(1024, torch.bfloat16, False, bits)
        held[bits] = sum(buffer.nbytes for buffer in tight.buffers())
    numbers = EXPERTS * 3 * DIM * 1024
    assert sum(buffer.nbytes for buffer in plain.buffers()) == 2 * numbers
    assert held[8] == numbers + EXPERTS * 4 * (2 * 1024 + DIM)
    scales = 2 * 1024 * (DIM // 16) + DIM * (1024 // 64)  # 48 is no multiple of 64 but of 16
    assert held[4] == numbers // 2 + EXPERTS * 2 * scales


def logits(lm, seed: int = 3) -> torch.Tensor:
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return lm(ids).logits.float()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_base_in_8_bits_is_near_the_base(tmp_path, model_type):
    save_tiny(tmp_path, model_type)
    exact = logits(load_base(tmp_path, dtype=torch.float32))
    errors = {}
    for name, settings in {
        "fp32, 8 bits": {"dtype": torch.float32, "frozen_bits": 8},
        "bf16": {"dtype": torch.bfloat16},
        "bf16, 8 bits": {"dtype": torch.bfloat16, "frozen_bits": 8},
        "fp32, 4 bits": {"dtype": torch.float32, "frozen_bits": 4},
    }.items():
        off = logits(load_base(tmp_path, **settings)) - exact
        errors[name] = float(off.norm() / exact.norm())
    print(model_type, "relative error of the logits:", errors)
    assert 0 < errors["fp32, 8 bits"] < 0.1
    assert errors["fp32, 8 bits"] < errors["fp32, 4 bits"] < 1.5
    assert errors["bf16, 8 bits"] < 0.1 + errors["bf16"]


def test_text_is_the_packed_base_bit_for_bit(tmp_path):
    save_tiny(tmp_path, "mixtral")
    lm = load_base(tmp_path, dtype=torch.float32, frozen_bits=8)
    before = hashlib.sha256(logits(lm).numpy().tobytes()).hexdigest()
    settings = ExtensionConfig(calibration=CalibrationKind.none)
    add_extension(lm, str(tmp_path), "vision", [LayerPlan(1, 1, [2])], settings)
    new = extended_layers(lm)[1].new["vision"]
    new.down.data.mul_(3)  # as if it had been trained
    assert hashlib.sha256(logits(lm).numpy().tobytes()).hexdigest() == before
    assert new.gate_up.dtype == torch.float32  # new experts are in full, from the unrounded source


def test_ranks_hold_their_share_packed(tmp_path):
    save_tiny(tmp_path, "mixtral")
    half = load_base(tmp_path, dtype=torch.float32, frozen_bits=8, ep_rank=1, ep_size=2)
    whole = load_base(tmp_path, dtype=torch.float32, frozen_bits=8)
    for layer, block in extended_layers(half).items():
        other = extended_layers(whole)[layer].frozen
        assert block.frozen.expert_ids == [3, 4]
        assert torch.equal(block.frozen.gate_up.codes, other.gate_up.codes[3:])
        assert torch.equal(block.frozen.down.scale, other.down.scale[3:])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_says_what_rounding_did(tmp_path, bits):
    """The error of all experts together, in the line that announces what trains."""
    save_tiny(tmp_path, "mixtral")
    exact, packed = (load_base(tmp_path, dtype=torch.float32, frozen_bits=n) for n in (0, bits))
    square = off = off_bf16 = 0.0
    for layer, plain in zip(
        extended_layers(packed).values(), extended_layers(exact).values(), strict=True
    ):
        for name in ("gate_up", "down"):
            for e, weight in enumerate(getattr(plain.frozen, name)):
                kept = getattr(layer.frozen, name).unpack(e, torch.float32)
                square += float(weight.square().sum())
                off += float((kept - weight).square().sum())
                off_bf16 += float((weight.bfloat16().float() - weight).square().sum())
    errors = [(part / square) ** 0.5 for part in (off, off_bf16)]
    assert 0 < errors[1] < errors[0] < (0.01 if bits == 8 else 0.15)
    wanted = f"in {bits} bits: relative error {errors[0]:.2%} (in bf16 {errors[1]:.2%})"
    assert wanted in announce(packed)
    assert "relative error" not in announce(exact)
