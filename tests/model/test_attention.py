"""Short attention against transformers' own, output and gradients, with and without a mask."""

import pytest
import torch

from moe_ext.model import attention
from moe_ext.model.load import load_base
from moe_ext.model.upcycle import upcycle
from tests.model.test_upcycle import DENSE, save_dense


class Module:
    is_causal = True

    def __init__(self, groups: int):
        self.num_key_value_groups = groups


def honest(query, key, value, allowed, scaling):
    """One head and one position at a time."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for s in range(length):
                seen = allowed[b, s].nonzero().squeeze(1)
                score = key[b, h // groups, seen] @ query[b, h, s] * scaling
                out[b, s, h] = score.softmax(0) @ value[b, h // groups, seen]
    return out


@pytest.mark.parametrize("block", [64, 3])
@pytest.mark.parametrize("masked", [None, "packed", "looks ahead"])
def test_output_and_gradients_are_those_of_a_loop(masked, block, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "BLOCK", block)
    inputs = [torch.randn(2, heads, 7, 5, dtype=torch.float64) for heads in (6, 2, 2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    allowed = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    mask = None
    if masked:
        segment = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 3, 3]])
        allowed = allowed & (segment[:, :, None] == segment[:, None])
        if masked == "looks ahead":
            allowed[1, 0, 6] = True
        mask = allowed[:, None]

    def forbidden(*_, **__):
        raise AssertionError("the fused kernel was called")

    monkeypatch.setattr(attention, "sdpa_attention_forward", forbidden)
    out, _ = attention.attention(Module(3), *inputs, mask, scaling=0.3)
    expected = honest(*inputs, allowed, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_position_that_sees_nothing_is_finite():
    query, key, value = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)[None, None]
    out, _ = attention.attention(Module(1), query, key, value, mask)
    out.sum().backward()
    assert out.isfinite().all()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_loaded_base_trains_with_it_and_evaluates_as_before(tmp_path, masked, monkeypatch):
    save_dense(tmp_path / "dense", DENSE["llama"])
    path = upcycle(tmp_path / "dense", tmp_path / "moe", layers=[1, 3])
    lm = load_base(path, dtype=torch.float32)
    torch.manual_seed(0)
    inputs = torch.randn(2, 9, 32, requires_grad=True)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() if masked else None
    if masked:
        mask[:, :, 5:, :5] = False  # two packed segments
    calls = []
    plain = attention.plain_attention

    def counted(*args):
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(attention, "plain_attention", counted)

    def run():
        out = lm.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
        return out.last_hidden_state

    with torch.no_grad():
        expected = run()
    assert not calls
    out = run()
    assert len(calls) == 4
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(attention, "LONGEST", 8)
    fused = run()
    assert len(calls) == 4
    (got,) = torch.autograd.grad(out.square().sum(), inputs)
    (wanted,) = torch.autograd.grad(fused.square().sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
