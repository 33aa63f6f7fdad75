"""The peers of the layer benchmark compute the same function as our layer, gradients too."""

import pytest
import torch

from moe_ext.benchmarks.layer import once, single_rank_group
from moe_ext.benchmarks.peers import PEERS
from moe_ext.benchmarks.workload import (
    LOADS,
    NEW_SHARE,
    SHAPES,
    Shape,
    Work,
    make_work,
)

SMALL = Shape(num_frozen=8, num_new=2, top_k=2, hidden_dim=32, intermediate_dim=48)


@pytest.fixture(scope="module")
def work() -> Work:
    torch.manual_seed(0)
    return make_work(SMALL, "skew8", torch.float32, num_tokens=96)


def outcome(name: str, work: Work) -> dict[str, torch.Tensor]:
    peer = PEERS[name](work.weights)
    hidden = work.hidden_BSD.clone().requires_grad_()
    output = peer.forward(hidden)
    output.backward(work.grad_BSD)
    peer.after_backward()
    return {"output": output.detach(), "input": hidden.grad, **peer.new_gradients()}


@pytest.fixture(scope="module")
def plain(work: Work) -> dict[str, torch.Tensor]:
    """A loop over tokens in double precision, with autograd through everything."""
    weights = work.weights
    gate_up, down, rows = (
        getattr(weights, name).double().requires_grad_() for name in ("gate_up", "down", "rows")
    )
    hidden = work.hidden_BSD.double().requires_grad_()
    out = []
    for x in hidden[0]:
        prob = (rows @ x).softmax(0)
        chosen = prob.topk(weights.top_k).indices
        share = prob[chosen] / prob[chosen].sum()
        y = torch.zeros_like(x)
        for e, w in zip(chosen.tolist(), share, strict=True):
            gate, up = (gate_up[e] @ x).chunk(2)
            y = y + w * (down[e] @ (gate * gate.sigmoid() * up))
        out.append(y)
    output = torch.stack(out).unsqueeze(0)
    output.backward(work.grad_BSD.double())
    new = slice(weights.num_frozen, None)
    grads = {"gate_up": gate_up.grad[new], "down": down.grad[new], "rows": rows.grad[new]}
    return {"output": output.detach(), "input": hidden.grad, **grads}


@pytest.mark.parametrize("name", list(PEERS))
def test_peer_computes_the_layer(name, work, plain):
    if name == "deepspeed_moe":
        single_rank_group()
    got = outcome(name, work)
    assert got.keys() == plain.keys()
    for key, value in plain.items():
        error = (got[key].double() - value).abs().max() / value.abs().max()
        assert error < 1e-5, f"{name}: {key} is off by {error:.1e} of its largest value"


def test_what_a_peer_may_freeze_is_frozen(work):
    single_rank_group()
    weights = work.weights
    new_experts = weights.gate_up[0].numel() + weights.down[0].numel()
    new_experts *= weights.num_new
    all_experts = weights.gate_up.numel() + weights.down.numel()
    for name, build in PEERS.items():
        trained = sum(parameter.numel() for parameter in build(weights).parameters)
        freezes = name in ("ours", "moextend_mask", "moextend_one_hot", "deepspeed_moe")
        experts = new_experts if freezes else all_experts
        assert experts < trained <= experts + weights.rows.numel() + weights.num_new, name


def test_masking_zeroes_the_frozen_part(work):
    peer = PEERS["masking"](work.weights)
    once(peer, work)
    for parameter in peer.parameters:
        assert parameter.grad[: work.weights.num_frozen].abs().max() == 0
        assert parameter.grad[work.weights.num_frozen :].abs().max() > 0


@pytest.mark.parametrize("load", list(LOADS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_loads_are_what_they_are_called(shape, load):
    sizes = SHAPES[shape]
    small = Shape(sizes.num_frozen, sizes.num_new, sizes.top_k, hidden_dim=256, intermediate_dim=2)
    work = make_work(small, load, torch.bfloat16, num_tokens=1024)
    assert sum(work.rows_X) == 1024 * sizes.top_k
    assert work.new_share == pytest.approx(NEW_SHARE, rel=0.03)
    if load != "balanced":
        assert work.skew == pytest.approx(
            min(LOADS[load], sizes.num_frozen / sizes.top_k), rel=0.03
        )
    logits = work.hidden_BSD[0].float() @ work.weights.rows.float().t()
    chosen = logits.topk(sizes.top_k).indices
    assert torch.bincount(chosen.flatten(), minlength=sizes.num_experts).tolist() == work.rows_X
