"""One row per Hugging Face architecture: where sparse blocks sit, its routing rule, its weights.

To add an architecture, write one `Family` into FAMILIES (the rows below are the examples) and a tiny
configuration of it into `tests/model/tiny.py`; every test of every family then runs on it. A row
holds nothing but facts about the architecture; the loading, the surgery and the layer are general.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.model.experts import ExpertShape
from moe_ext.model.layouts import ExpertLayout, PerExpert, Stacked
from moe_ext.model.routing import RoutingRule

Config = Any
"""A transformers PretrainedConfig."""


class GatedShared(nn.Module):
    """A shared expert whose output a sigmoid gate scales (Qwen2-MoE, Qwen3-Next)."""

    def __init__(self, expert: nn.Module, gate: nn.Module):
        super().__init__()
        self.expert = expert
        self.gate = gate

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D], in the order of operations of transformers."""
        out_TD = self.expert(x_TD)
        return F.sigmoid(self.gate(x_TD)) * out_TD


@dataclass(frozen=True)
class RouterKeys:
    """Checkpoint keys of a layer's router, relative to the decoder layer; empty: there is none.

    Each is a list of spellings, the one that `save_pretrained` writes first.
    """

    weight: tuple[str, ...]
    """[E, D]"""
    bias: tuple[str, ...] = ()
    """[E], added to the logits."""
    correction_bias: tuple[str, ...] = ()
    """[E], added to the scores when experts are chosen, not when they are weighted."""
    fp32: bool = False
    """The router's weight stays fp32 whatever the model's dtype is."""


@dataclass(frozen=True)
class Family:
    """The facts about one architecture that the extended layer and the loader need."""

    rule: Callable[[Config], RoutingRule]
    experts_key: str
    """Attribute of the configuration that counts the routed experts of a layer."""
    expert_shape: Callable[[Config], ExpertShape]
    layouts: tuple[ExpertLayout, ...]
    """Ways that checkpoints keep the experts; the first is what `save_pretrained` writes."""
    router: RouterKeys
    is_sparse: Callable[[Config, int], bool] = lambda config, layer: True
    block: str = "mlp"
    """Attribute of the decoder layer that holds the sparse block."""
    shared: Callable[[Any], nn.Module | None] = lambda block: None
    """The Hugging Face block -> the module that computes its shared expert, or None."""
    renames: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement): checkpoint keys -> names in the model with our blocks."""
    returns_tuple: bool = False
    """The decoder layer unpacks (hidden, router scores)."""

    def num_experts(self, config: Config) -> int:
        """Routed experts of every sparse layer."""
        return getattr(config, self.experts_key)


LAYER_PREFIX = "model.layers.{layer}."
"""Start of the checkpoint keys of a decoder layer, in every family below."""

_PROJ = PerExpert(
    "mlp.experts.{expert}.gate_proj.weight",
    "mlp.experts.{expert}.up_proj.weight",
    "mlp.experts.{expert}.down_proj.weight",
)
_W123 = PerExpert(
    "block_sparse_moe.experts.{expert}.w1.weight",
    "block_sparse_moe.experts.{expert}.w3.weight",
    "block_sparse_moe.experts.{expert}.w2.weight",
)
# What transformers 5 holds in memory, and writes with `save_original_format=False`.
_STACKED = Stacked("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_GPT_OSS = partial(
    Stacked,
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
    "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down_proj_bias",
    interleaved=True,
)
_GATED_SHARED_RENAMES = (
    (r"\.mlp\.shared_expert\.", ".mlp.shared.expert."),
    (r"\.mlp\.shared_expert_gate\.", ".mlp.shared.gate."),
)
_SHARED_EXPERTS_RENAMES = ((r"\.mlp\.shared_experts\.", ".mlp.shared."),)


def _shape(config: Config, intermediate_dim: int) -> ExpertShape:
    return ExpertShape(config.hidden_size, intermediate_dim, config.hidden_act)


def _moe_shape(config: Config) -> ExpertShape:
    return _shape(config, config.moe_intermediate_size)


def _wide_shape(config: Config) -> ExpertShape:
    return _shape(config, config.intermediate_size)


def _softmax_rule(config: Config) -> RoutingRule:
    """Softmax over all experts, top-k, divided by its sum where the configuration says so."""
    return RoutingRule(config.num_experts_per_tok, renormalise=config.norm_topk_prob)


def _renormalised_rule(config: Config) -> RoutingRule:
    return RoutingRule(config.num_experts_per_tok)


def _chosen_softmax_rule(config: Config) -> RoutingRule:
    """Softmax over the chosen logits only."""
    return RoutingRule(config.num_experts_per_tok, score="topk_softmax")


def _deepseek_v2_rule(config: Config) -> RoutingRule:
    """Softmax in fp32, never renormalised (transformers ignores norm_topk_prob here), scaled."""
    groups = config.topk_method == "group_limited_greedy"
    return RoutingRule(
        config.num_experts_per_tok,
        renormalise=False,
        scale=config.routed_scaling_factor,
        num_groups=config.n_group if groups else 1,
        groups_kept=config.topk_group if groups else 1,
        group_score="max",
        masked_score=0.0,
        fp32_logits=True,
    )


def _deepseek_v3_rule(config: Config) -> RoutingRule:
    """Sigmoid in fp32, a correction bias on the choice, the best groups only, scaled."""
    return RoutingRule(
        config.num_experts_per_tok,
        score="sigmoid",
        renormalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        eps=1e-20,
        num_groups=config.n_group,
        groups_kept=config.topk_group,
        group_score="top2_sum",
        fp32_logits=True,
    )


def _qwen_is_sparse(config: Config, layer: int) -> bool:
    listed = layer in (config.mlp_only_layers or ())
    return not listed and (layer + 1) % config.decoder_sparse_step == 0


def _after_first_dense(config: Config, layer: int) -> bool:
    return layer >= config.first_k_dense_replace


def _ernie_is_sparse(config: Config, layer: int) -> bool:
    inside = config.moe_layer_start_index <= layer <= config.moe_layer_end_index
    return inside and (layer + 1) % config.moe_layer_interval == 0


def _deepseek_v3_like(is_sparse: Callable[[Config, int], bool] = _after_first_dense) -> Family:
    return Family(
        rule=_deepseek_v3_rule,
        experts_key="n_routed_experts",
        expert_shape=_moe_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(
            ("mlp.gate.weight",), correction_bias=("mlp.gate.e_score_correction_bias",)
        ),
        is_sparse=is_sparse,
        shared=lambda block: block.shared_experts,
        renames=_SHARED_EXPERTS_RENAMES,
    )


def _granite_like() -> Family:
    return Family(
        rule=_chosen_softmax_rule,
        experts_key="num_local_experts",
        expert_shape=_wide_shape,
        layouts=(
            Stacked(
                "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"
            ),
            Stacked("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        ),
        router=RouterKeys(
            ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight")
        ),
        block="block_sparse_moe",
    )


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        rule=_renormalised_rule,
        experts_key="num_local_experts",
        expert_shape=_wide_shape,
        layouts=(_W123, _STACKED),
        router=RouterKeys(("block_sparse_moe.gate.weight", "mlp.gate.weight")),
    ),
    "qwen2_moe": Family(
        rule=_softmax_rule,
        experts_key="num_experts",
        expert_shape=_moe_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(("mlp.gate.weight",)),
        is_sparse=_qwen_is_sparse,
        shared=lambda block: GatedShared(block.shared_expert, block.shared_expert_gate),
        renames=_GATED_SHARED_RENAMES,
    ),
    "qwen3_moe": Family(
        rule=_softmax_rule,
        experts_key="num_experts",
        expert_shape=_moe_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(("mlp.gate.weight",)),
        is_sparse=_qwen_is_sparse,
    ),
    "olmoe": Family(
        rule=_softmax_rule,
        experts_key="num_experts",
        expert_shape=_wide_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(("mlp.gate.weight",)),
    ),
    "flex_olmo": Family(
        rule=_softmax_rule,
        experts_key="num_experts",
        expert_shape=_wide_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(("mlp.gate.weight",)),
    ),
    "deepseek_v2": Family(
        rule=_deepseek_v2_rule,
        experts_key="n_routed_experts",
        expert_shape=_moe_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(("mlp.gate.weight",)),
        is_sparse=_after_first_dense,
        shared=lambda block: block.shared_experts,
        renames=_SHARED_EXPERTS_RENAMES,
    ),
    "deepseek_v3": _deepseek_v3_like(),
    "deepseek_v32": _deepseek_v3_like(),
    "glm4_moe": _deepseek_v3_like(),
    "glm4_moe_lite": _deepseek_v3_like(),
    "dots1": _deepseek_v3_like(),
    "granitemoe": _granite_like(),
    "granitemoe_swa": _granite_like(),
    "granitemoeshared": _granite_like(),  # the shared expert is the decoder layer's own
    "gpt_oss": Family(
        rule=_chosen_softmax_rule,
        experts_key="num_local_experts",
        expert_shape=lambda config: ExpertShape(
            config.hidden_size,
            config.intermediate_size,
            "swiglu_clamped",
            bias=True,
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
        ),
        layouts=(
            _GPT_OSS(transposed=True),
            _GPT_OSS(mxfp4=True),
        ),
        router=RouterKeys(("mlp.router.weight",), bias=("mlp.router.bias",)),
        returns_tuple=True,
    ),
    "ernie4_5_moe": Family(
        rule=lambda config: RoutingRule(config.moe_k, fp32_logits=True),
        experts_key="moe_num_experts",
        expert_shape=_moe_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(
            ("mlp.gate.weight",),
            correction_bias=(
                "mlp.moe_statics.e_score_correction_bias",
                "mlp.gate.moe_statics.e_score_correction_bias",
            ),
            fp32=True,
        ),
        is_sparse=_ernie_is_sparse,
        shared=lambda block: block.shared_experts,
        renames=_SHARED_EXPERTS_RENAMES,
    ),
    "qwen3_next": Family(
        rule=_softmax_rule,
        experts_key="num_experts",
        expert_shape=_moe_shape,
        layouts=(_PROJ, _STACKED),
        router=RouterKeys(("mlp.gate.weight",)),
        is_sparse=_qwen_is_sparse,
        shared=lambda block: GatedShared(block.shared_expert, block.shared_expert_gate),
        renames=_GATED_SHARED_RENAMES,
    ),
}


def family_of(config: Config) -> Family:
    """The row of a Hugging Face configuration.

    Raises:
        ValueError: its model_type has no row; the message lists those that have.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"base.path holds a model of type {config.model_type!r}, which has no row in FAMILIES "
            f"(moe_ext/model/families.py); supported are {', '.join(sorted(FAMILIES))}. A dense model "
            "can be turned into a base by base.dense=<folder>"
        )
    return family


def sparse_layers(config: Config) -> list[int]:
    """Indices of the decoder layers that have a sparse block, ascending."""
    family = family_of(config)
    return [layer for layer in range(config.num_hidden_layers) if family.is_sparse(config, layer)]
