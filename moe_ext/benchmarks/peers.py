"""The same layer, as others compute it: peers of `bench layer`.

Every peer gets the same weights, computes the same function (softmax over all experts, top-k,
renormalised; tests/benchmarks holds outputs and gradients together) and includes its gate and its
dispatch. What a peer cannot freeze, it trains:

- `moextend_mask`, `moextend_one_hot`: our restatements of MoExtend's two loops (its ZeRO-3 and its
  ZeRO-2 path), pretrained experts and gate rows frozen; without its calibration, which starts as
  the identity, on every side;
- `deepspeed_moe`: DeepSpeed's `MoE` layer, no token dropped, pretrained experts frozen; its gate is
  one matrix and trains whole;
- `grouped_mm`, `eager`: transformers' two expert paths on its Mixtral block, all experts trainable
  (one tensor holds them all);
- `autoep`: DeepSpeed's AutoEP layer at its defaults, all experts trainable (it refuses to mix);
- `all_trainable`: our own kernels with every expert trainable, and `masking`, the same with the
  pretrained experts' gradients set to zero after each backward pass.

Shape letters: B sequences, S positions, T tokens, K top_k, D hidden width, I intermediate width,
E pretrained experts, N new ones, X = E + N.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext.config import Placement, Scope
from moe_ext.model.context import ContextHolder
from moe_ext.model.experts import ExpertShape, FrozenBank, NewBank
from moe_ext.model.moe import ExtendedMoE
from moe_ext.model.routing import Router, RoutingRule
from moe_ext.model.row_plan import plan_rows
from moe_ext.model.rows import NewRows


@dataclass
class LayerWeights:
    """What all peers compute with."""

    gate_up: Tensor
    """(X, 2I, D), gate rows first."""
    down: Tensor
    """(X, D, I)."""
    rows: Tensor
    """(X, D) router rows."""
    num_new: int
    top_k: int

    @property
    def num_frozen(self) -> int:
        return self.rows.shape[0] - self.num_new


@dataclass
class Peer:
    """One way to compute the layer."""

    forward: Callable[[Tensor], Tensor]
    """(B, S, D) -> (B, S, D)."""
    parameters: list[nn.Parameter]
    """All that gets a gradient."""
    new_gradients: Callable[[], dict[str, Any]]
    """After a backward pass: gradients of the new experts' `gate_up` (N, 2I, D), `down` (N, D, I)
    and `rows` (N, D)."""
    after_backward: Callable[[], None] = field(default=lambda: None)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def ours(weights: LayerWeights) -> Peer:
    """The extended layer, every token free to choose new experts."""
    num_experts, double, dim = weights.gate_up.shape
    num_frozen, dtype = weights.num_frozen, weights.gate_up.dtype
    shape = ExpertShape(dim, double // 2)
    frozen = FrozenBank(
        shape, list(range(num_frozen)), num_frozen, Placement.replicate, dtype=dtype
    )
    new = NewBank(
        shape, list(range(weights.num_new)), weights.num_new, Placement.replicate, dtype=dtype
    )
    for name in ("gate_up", "down"):
        getattr(frozen, name).copy_(getattr(weights, name)[:num_frozen])
        getattr(new, name).data.copy_(getattr(weights, name)[num_frozen:])
    router = Router(RoutingRule(weights.top_k), num_frozen, dim, dtype=dtype)
    router.frozen_weight.copy_(weights.rows[:num_frozen])
    rows = NewRows(
        weights.rows[num_frozen:].clone(), torch.zeros(num_experts - num_frozen), Scope.joint, ()
    )
    layer = ExtendedMoE(0, router, frozen, None, ContextHolder())
    layer.add_bank("new", new, rows)

    def new_gradients() -> dict[str, Any]:
        return {"gate_up": new.gate_up.grad, "down": new.down.grad, "rows": rows.weight.grad}

    return Peer(layer, _trainable(layer), new_gradients)


class _AllTrainable(nn.Module):
    """The layer with our kernels and nothing frozen."""

    def __init__(self, weights: LayerWeights):
        super().__init__()
        num_experts, double, dim = weights.gate_up.shape
        shape, dtype = ExpertShape(dim, double // 2), weights.gate_up.dtype
        everything = list(range(num_experts))
        self.bank = NewBank(shape, everything, num_experts, Placement.replicate, dtype=dtype)
        self.bank.gate_up.data.copy_(weights.gate_up)
        self.bank.down.data.copy_(weights.down)
        self.rows = nn.Parameter(weights.rows.clone())
        self.top_k = weights.top_k

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        x_TD = hidden_BSD.flatten(0, 1)
        prob_TX = F.linear(x_TD, self.rows).softmax(-1, dtype=torch.float32)
        weight_TK, expert_TK = prob_TX.topk(self.top_k, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        (plan,) = plan_rows(expert_TK, [(0, len(self.rows))])
        return self.bank(x_TD, weight_TK, plan).view_as(hidden_BSD)


def all_trainable(weights: LayerWeights) -> Peer:
    layer = _AllTrainable(weights)
    new = slice(weights.num_frozen, None)

    def new_gradients() -> dict[str, Any]:
        bank = layer.bank
        grads = {"gate_up": bank.gate_up.grad, "down": bank.down.grad, "rows": layer.rows.grad}
        return {name: grad[new] for name, grad in grads.items()}

    return Peer(layer, _trainable(layer), new_gradients)


def masking(weights: LayerWeights) -> Peer:
    """FlexOlmo's way to freeze: compute every gradient, then set the frozen part to zero."""
    peer = all_trainable(weights)

    def after_backward() -> None:
        for parameter in peer.parameters:
            parameter.grad[: weights.num_frozen].zero_()  # type: ignore[index]

    peer.after_backward = after_backward
    return peer


class _Expert(nn.Module):
    """Mixtral's expert: three matrices of its own."""

    def __init__(self, gate_up: Tensor, down: Tensor, trains: bool):
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.w1, self.w2, self.w3 = (
            nn.Linear(*weight.t().shape, bias=False) for weight in (gate, down, up)
        )
        for linear, weight in ((self.w1, gate), (self.w2, down), (self.w3, up)):
            linear.weight = nn.Parameter(weight.clone(), requires_grad=trains)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _expert_gradients(experts: list[Any]) -> dict[str, Tensor]:
    """Gradients in the layout of `LayerWeights`."""
    pairs = [torch.cat([e.w1.weight.grad, e.w3.weight.grad]) for e in experts]
    return {
        "gate_up": torch.stack(pairs),
        "down": torch.stack([e.w2.weight.grad for e in experts]),
    }


class _MoExtend(nn.Module):
    """MoExtend's sparse block: a list of experts, a frozen gate and a gate of the new experts."""

    def __init__(self, weights: LayerWeights):
        super().__init__()
        num_frozen = weights.num_frozen
        self.num_experts, self.top_k = weights.rows.shape[0], weights.top_k
        self.experts = nn.ModuleList(
            _Expert(weights.gate_up[e], weights.down[e], e >= num_frozen)
            for e in range(self.num_experts)
        )
        self.gate = nn.Parameter(weights.rows[:num_frozen].clone(), requires_grad=False)
        self.gate_vision = nn.Parameter(weights.rows[num_frozen:].clone())

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.cat([F.linear(x_TD, self.gate), F.linear(x_TD, self.gate_vision)], dim=1)
        weight_TK, expert_TK = logits.softmax(1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return weight_TK.to(x_TD.dtype), expert_TK


class MoExtendMask(_MoExtend):
    """Repeats every token k times, then runs every expert on a boolean selection."""

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        x_TD = hidden_BSD.flatten(0, 1)
        weight_TK, expert_TK = self.route(x_TD)
        repeated = x_TD.repeat_interleave(self.top_k, dim=0)
        y = torch.empty_like(repeated)
        flat = expert_TK.flatten()
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(repeated[flat == e])
        y_TKD = y.view(*weight_TK.shape, -1)
        return (y_TKD * weight_TK.unsqueeze(-1)).sum(dim=1).view_as(hidden_BSD)


class _MoExtendOneHot(_MoExtend):
    """Runs every chosen expert on lists of token indices (transformers' loop of that time)."""

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        x_TD = hidden_BSD.flatten(0, 1)
        weight_TK, expert_TK = self.route(x_TD)
        y_TD = torch.zeros_like(x_TD)
        mask = F.one_hot(expert_TK, num_classes=self.num_experts).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            tokens, slots = token.tolist(), slot.tolist()
            current = x_TD[None, tokens].reshape(-1, x_TD.shape[1])
            y_TD.index_add_(0, token, expert(current) * weight_TK[tokens, slots, None])
        return y_TD.view_as(hidden_BSD)


def _moextend(layer: _MoExtend, weights: LayerWeights) -> Peer:
    def new_gradients() -> dict[str, Any]:
        experts = list(layer.experts)[weights.num_frozen :]
        return _expert_gradients(experts) | {"rows": layer.gate_vision.grad}  # type: ignore

    return Peer(layer, _trainable(layer), new_gradients)


def moextend_mask(weights: LayerWeights) -> Peer:
    return _moextend(MoExtendMask(weights), weights)


def moextend_one_hot(weights: LayerWeights) -> Peer:
    return _moextend(_MoExtendOneHot(weights), weights)


def deepspeed_moe(weights: LayerWeights) -> Peer:
    """Needs a process group (`layer.single_rank_group`)."""
    from deepspeed.moe.layer import MoE

    num_experts, dim = weights.rows.shape
    expert = _Expert(weights.gate_up[0], weights.down[0], trains=True)
    layer: Any = MoE(dim, expert, num_experts, k=weights.top_k, drop_tokens=False, min_capacity=0,
                top2_2nd_expert_sampling=False)  # fmt: skip
    layer.set_deepspeed_parallelism()
    experts = list(layer.deepspeed_moe.experts.deepspeed_experts)
    for e, expert in enumerate(experts):
        gate, up = weights.gate_up[e].chunk(2)
        for linear, weight in ((expert.w1, gate), (expert.w2, weights.down[e]), (expert.w3, up)):
            linear.weight.data.copy_(weight)
            linear.weight.requires_grad_(e >= weights.num_frozen)
    gate_rows: Any = layer.deepspeed_moe.gate.wg.weight
    gate_rows.data = weights.rows.clone()

    def new_gradients() -> dict[str, Any]:
        grads = _expert_gradients(experts[weights.num_frozen :])
        return grads | {"rows": gate_rows.grad[weights.num_frozen :]}

    return Peer(lambda hidden_BSD: layer(hidden_BSD)[0], _trainable(layer), new_gradients)


def _mixtral_config(weights: LayerWeights, implementation: str):
    from transformers import MixtralConfig

    num_experts, double, dim = weights.gate_up.shape
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=dim,
        intermediate_size=double // 2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=num_experts,
        num_experts_per_tok=weights.top_k,
    )
    config._experts_implementation = implementation
    return config


def _transformers(weights: LayerWeights, implementation: str) -> Peer:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    block: Any = MixtralSparseMoeBlock(_mixtral_config(weights, implementation))
    _fill_mixtral(block, weights)
    new = slice(weights.num_frozen, None)

    def new_gradients() -> dict[str, Any]:
        experts = block.experts
        grads = {"gate_up": experts.gate_up_proj.grad, "down": experts.down_proj.grad}
        grads["rows"] = block.gate.weight.grad
        return {name: grad[new] for name, grad in grads.items()}

    return Peer(block, _trainable(block), new_gradients)


def _fill_mixtral(block: Any, weights: LayerWeights) -> None:
    experts, gate = block.experts, block.gate
    experts.gate_up_proj.data = weights.gate_up.clone()
    experts.down_proj.data = weights.down.clone()
    gate.weight.data = weights.rows.clone()


def grouped_mm(weights: LayerWeights) -> Peer:
    return _transformers(weights, "grouped_mm")


def eager(weights: LayerWeights) -> Peer:
    return _transformers(weights, "eager")


def shim_autoep() -> None:
    """Let AutoEP 0.19 convert models of transformers 5.23.

    As installed it fails: `TypeError: _CanRecordRegistry.get() takes 2 positional arguments but 3
    were given`; it passes a class name and a default where the registry now wants a model.
    """
    from transformers.utils import output_capturing

    def key(model) -> str:
        return model if isinstance(model, str) else str(model.__class__)

    def get(self, model, default=None):
        fallback = {} if default is None else default
        return dict.get(self, key(model), fallback) or fallback

    registry = output_capturing._CanRecordRegistry
    registry.get = get
    registry.__setitem__ = lambda self, model, value: dict.__setitem__(self, key(model), value)


def autoep(weights: LayerWeights) -> Peer:
    """AutoEP's layer as its own conversion builds it from a one-layer Mixtral, with the shim."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from transformers import MixtralForCausalLM

    shim_autoep()
    model = MixtralForCausalLM(_mixtral_config(weights, "grouped_mm"))
    block_name = next(n for n, m in model.named_modules() if type(m).__name__.endswith("MoeBlock"))
    _fill_mixtral(model.get_submodule(block_name), weights)
    settings = parse_autoep_config({"enabled": True, "autoep_size": 1, "preset_model": "mixtral"})
    conversion = AutoEP(model, settings)
    conversion.replace_moe_layers(conversion.ep_parser(), ep_size=1, ep_rank=0)
    layer: Any = model.get_submodule(block_name)
    new = slice(weights.num_frozen, None)

    def new_gradients() -> dict[str, Any]:
        experts = layer.experts
        gate_up = torch.cat([experts.w1.grad, experts.w3.grad], dim=1)
        grads = {"gate_up": gate_up, "down": experts.w2.grad, "rows": layer.router.gate.weight.grad}
        return {name: grad[new] for name, grad in grads.items()}

    def forward(hidden_BSD: Tensor) -> Tensor:
        out = layer(hidden_BSD)
        return out[0] if isinstance(out, tuple) else out

    return Peer(forward, _trainable(layer), new_gradients)


PEERS: dict[str, Callable[[LayerWeights], Peer]] = {
    "ours": ours,
    "moextend_mask": moextend_mask,
    "moextend_one_hot": moextend_one_hot,
    "deepspeed_moe": deepspeed_moe,
    "grouped_mm": grouped_mm,
    "eager": eager,
    "autoep": autoep,
    "masking": masking,
    "all_trainable": all_trainable,
}
