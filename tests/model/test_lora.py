"""Low-rank experts against the dense experts that they stand for."""

import pytest
import torch

from moe_ext.config import ExpertInit, ExpertType, ExtensionConfig, Placement, Scope
from moe_ext.model.experts import ExpertShape, NewBank
from moe_ext.model.extend import LayerPlan, add_extension, announce, extended_layers, load_base
from moe_ext.model.lora import LoraBank
from tests.model.layers import rows_of
from tests.model.tiny import save_tiny

_SHAPES = [
    ExpertShape(12, 7, "silu"),
    ExpertShape(12, 7, "swiglu_clamped", bias=True, limit=1.0),
]
_T, _S, _N = 9, 2, 3


def _bank(shape: ExpertShape) -> LoraBank:
    bank = LoraBank(
        shape, list(range(_N)), _N, Placement.replicate, rank=2, alpha=5.0, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*bank.parameters(), *bank.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return bank


def _inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_T, 12, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(_T, _S, generator=generator, dtype=torch.float64).requires_grad_()
    expert = torch.tensor(
        [[0, 1], [1, 0], [-1, 1], [7, -3], [0, -1], [1, -1], [0, 1], [1, 3], [-1, -1]]
    )
    return x, expert, weight  # expert 2 gets no token


@pytest.mark.parametrize("shape", _SHAPES, ids=["silu", "gpt_oss"])
def test_output_and_gradients_equal_merged_dense_experts(shape):
    bank = _bank(shape)
    x, expert, weight = _inputs()
    out = bank(x, weight, rows_of(bank, expert))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    out.backward(grad)
    ours = {name: p.grad for name, p in bank.named_parameters()} | {"x": x.grad, "w": weight.grad}
    for parameter in bank.parameters():
        parameter.grad = None

    # The honest way: add the products up, run ordinary experts, let autograd differentiate it all.
    x2, expert, weight2 = _inputs()
    dense = NewBank(shape, [0, 1, 2], _N, Placement.replicate, dtype=torch.float64)
    difference = (bank.gate_up_b @ bank.gate_up_a).flatten(1, 2)
    parts = {
        "gate_up": bank.gate_up + 2.5 * difference,
        "down": bank.down + 2.5 * bank.down_b @ bank.down_a,
    }
    if shape.bias:
        parts |= {"gate_up_bias": bank.gate_up_bias, "down_bias": bank.down_bias}
    expected = torch.func.functional_call(dense, parts, (x2, weight2, rows_of(dense, expert)))
    torch.testing.assert_close(out, expected)
    expected.backward(grad)
    theirs = {name: p.grad for name, p in bank.named_parameters()}
    theirs |= {"x": x2.grad, "w": weight2.grad}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")
    assert all((g[2] == 0).all() for name, g in ours.items() if name[0] in "gd")
    for name in ("gate_up_a", "gate_up_b", "down_a", "down_b"):
        assert (ours[name][:2].flatten(1).abs().sum(1) > 0).all()


def test_merged_is_what_it_computes_with():
    bank = _bank(_SHAPES[0])
    for slot in range(_N):
        gate_up, down = bank.merged(slot)
        a, b = bank.gate_up_a[slot].detach().float(), bank.gate_up_b[slot].detach().float()
        gate = bank.gate_up[slot, :7].float() + 2.5 * b[0] @ a[0]
        up = bank.gate_up[slot, 7:].float() + 2.5 * b[1] @ a[1]
        torch.testing.assert_close(gate_up, torch.cat([gate, up]))
        own = bank.down_b[slot].detach().float() @ bank.down_a[slot].detach().float()
        torch.testing.assert_close(down, bank.down[slot].float() + 2.5 * own)


def test_a_rank_whose_tokens_choose_none_has_zero_gradients():
    bank = _bank(_SHAPES[0])
    x, expert, weight = _inputs()
    bank(x, weight, rows_of(bank, torch.full_like(expert, -1))).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in bank.parameters())


def test_it_starts_as_its_source_and_only_the_difference_trains(tmp_path):
    save_tiny(tmp_path, "qwen2_moe")
    whole = load_base(tmp_path, dtype=torch.float32)
    settings = ExtensionConfig(scope=Scope.joint, expert_type=ExpertType.lora, lora_rank=4)
    plans = [LayerPlan(layer, 2, [3, 5]) for layer in extended_layers(whole)]
    add_extension(whole, tmp_path, "vision", plans, settings, seed=2)
    full = load_base(tmp_path, dtype=torch.float32)
    add_extension(full, tmp_path, "vision", plans, ExtensionConfig(scope=Scope.joint), seed=2)
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, full(ids).logits, rtol=0, atol=1e-5)
    bank = extended_layers(whole)[0].new["vision"]
    assert torch.equal(bank.gate_up, extended_layers(whole)[0].frozen.gate_up[[3, 5]])
    assert sorted(name for name, _ in bank.named_parameters()) == [
        "down_a",
        "down_b",
        "gate_up_a",
        "gate_up_b",
    ]
    new = 2 * 2 * (3 * 4 * (32 + 16))
    assert f"new experts: {new:,} trainable" in announce(whole)

    # on two ranks: each holds its half, drawn alike
    for rank in (0, 1):
        lm = load_base(tmp_path, dtype=torch.float32, ep_rank=rank, ep_size=2)
        sharded = ExtensionConfig(
            scope=Scope.joint,
            expert_type=ExpertType.lora,
            lora_rank=4,
            placement=Placement.shard,
        )
        add_extension(lm, tmp_path, "vision", plans, sharded, seed=2)
        part = extended_layers(lm)[0].new["vision"]
        assert torch.equal(part.down_a[0], bank.down_a[rank])
        assert torch.equal(part.down[0], bank.down[rank])

    bad = ExtensionConfig(expert_type=ExpertType.lora, expert_init=ExpertInit.random)
    with pytest.raises(ValueError, match="starts as its source; use copy"):
        add_extension(load_base(tmp_path, dtype=torch.float32), tmp_path, "a", plans, bad)
