"""Sizes of a base, an extension and the encoders, from their configurations alone.

The Hugging Face model is built on torch's meta device: every tensor has its shape and no memory, so
that what is counted is what the architecture really has, and no weight file is opened.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from moe_ext.config import (
    CalibrationKind,
    EncoderConfig,
    ExpertType,
    ExtensionConfig,
    RowInit,
    Trainable,
)
from moe_ext.model import efficientnet
from moe_ext.model.activations import ExpertShape
from moe_ext.model.families import Config, Family, family_of, sparse_layers
from moe_ext.model.load import build_on_meta


@dataclass(frozen=True)
class BaseSizes:
    """A pretrained model in numbers. Counts are elements unless a name says bytes or layers."""

    model_type: str
    hidden_dim: int
    vocabulary: int
    num_layers: int
    sparse_layers: tuple[int, ...]
    num_experts: int
    """Routed experts of a sparse layer."""
    top_k: int
    expert: ExpertShape
    router: int
    """Weight, bias and correction of one sparse layer's router."""
    dense: int
    """Everything but routed experts and routers: embeddings, attention, norms, shared experts."""
    always_fp32: int
    """Elements of `dense` and of all routers that stay fp32 in a bf16 model."""
    buffer_bytes: int
    """Fixed buffers that no checkpoint holds (rotary frequencies)."""
    linear: int
    """Elements of `dense` that multiply every token: neither embeddings nor the output layer."""
    attention_width: int
    """Of a layer: query heads times (width of a query + width of a value)."""
    saved_widths: tuple[int, ...]
    """Layer by layer: numbers a token that a frozen layer's own dense part saves for backward in
    the model's dtype (query, key, value, attention output, three of every gated MLP)."""
    saved_norms: tuple[int, ...]
    """Layer by layer: numbers a token that norms save, in fp32."""
    saved_weights: int
    """Heads whose attention weights a layer saves, one number a position; 0 with a fused kernel."""
    num_groups: int = 1
    groups_kept: int = 1
    """Only experts of the best groups may be chosen (DeepSeek-V2 and V3)."""
    router_fp32: bool = False
    """Router rows stay fp32 in a bf16 model."""
    router_product_fp32: bool = False
    """Routers multiply in fp32: of their input, where new rows train, they keep a copy in it."""
    router_corrected: bool = False
    """Scores are corrected when experts are chosen (DeepSeek-V3)."""

    @property
    def expert_elements(self) -> int:
        """Of one routed expert."""
        return _elements(self.expert)

    @property
    def total(self) -> int:
        """Parameters of the model."""
        sparse = len(self.sparse_layers)
        return self.dense + sparse * (self.num_experts * self.expert_elements + self.router)

    @property
    def active(self) -> int:
        """Parameters that one token meets."""
        sparse = len(self.sparse_layers)
        return self.dense + sparse * (self.top_k * self.expert_elements + self.router)


def base_config(path: str | Path) -> Config:
    """The configuration in a local folder; its weights need not be there.

    Raises:
        ValueError: no configuration there.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"base.path={path} has no config.json; give the folder of a Hugging Face model (planning "
            "needs no other file of it)"
        )
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its loader reads plain numbers out of it
    return config


def base_sizes(config: Config) -> BaseSizes:
    """Sizes of the model that a configuration describes.

    Raises:
        ValueError: an architecture without a row in FAMILIES.
    """
    family = family_of(config)
    lm: Any = build_on_meta(config, torch.bfloat16)
    sparse, expert, rule = sparse_layers(config), family.expert_shape(config), family.rule(config)
    blocks = [getattr(lm.model.layers[index], family.block) for index in sparse]
    num_experts, width = family.num_experts(config), config.hidden_size
    keys = family.router
    router = num_experts * (width + bool(keys.bias) + bool(keys.correction_bias))
    routed = 0
    for block in blocks:
        shared = family.shared(block)
        own = _numel(block) + _fixed(block) - (0 if shared is None else _numel(shared))
        assert own == num_experts * _elements(expert) + router, "the family's row misses a tensor"
        routed += own
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    matrices = sum(p.numel() for p in lm.parameters() if p.dim() >= 2) - head.numel()
    matrices -= 0 if head is embedding else embedding.numel()
    of_experts = num_experts * 3 * width * expert.intermediate_dim
    matrices -= len(sparse) * (of_experts + num_experts * width)
    strict = lm._keep_in_fp32_modules_strict or ()
    fp32 = sum(p.numel() for n, p in lm.named_parameters() if any(part in n for part in strict))
    fp32 += len(sparse) * router if keys.fp32 else sum(map(_fixed, blocks))
    query, _, value, heads = _attention_widths(config)
    return BaseSizes(
        model_type=config.model_type,
        hidden_dim=width,
        vocabulary=config.vocab_size,
        num_layers=config.num_hidden_layers,
        sparse_layers=tuple(sparse),
        num_experts=num_experts,
        top_k=rule.top_k,
        expert=expert,
        router=router,
        dense=_numel(lm) + sum(map(_fixed, blocks)) - routed,
        always_fp32=fp32,
        buffer_bytes=sum(b.nbytes for n, b in lm.named_buffers() if "inv_freq" in n),
        linear=matrices,
        attention_width=heads * (query + value),
        saved_widths=tuple(
            _saved_width(layer, family, config, index in sparse)
            for index, layer in enumerate(lm.model.layers)
        ),
        saved_norms=tuple(_saved_norms(layer, config) for layer in lm.model.layers),
        saved_weights=heads if lm.config._attn_implementation == "eager" else 0,
        num_groups=rule.num_groups,
        groups_kept=rule.groups_kept,
        router_fp32=keys.fp32,
        router_product_fp32=rule.fp32_logits,
        router_corrected=bool(keys.correction_bias),
    )


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _fixed(block: nn.Module) -> int:
    """Elements of a sparse block's persistent buffers: its correction bias, where it is one."""
    persistent = block.state_dict().keys() - dict(block.named_parameters()).keys()
    return sum(block.get_buffer(name).numel() for name in persistent)


def _elements(shape: ExpertShape) -> int:
    weights = 3 * shape.hidden_dim * shape.intermediate_dim
    return weights + (2 * shape.intermediate_dim + shape.hidden_dim if shape.bias else 0)


def _attention_widths(config: Config) -> tuple[int, int, int, int]:
    """Width of a head's query, of all keys and of a head's value, and the number of query heads."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # latent attention: keys and values for every head
        query = config.qk_nope_head_dim + config.qk_rope_head_dim
        return query, heads * query, config.v_head_dim, heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return width, config.num_key_value_heads * width, width, heads


def _saved_width(layer: nn.Module, family: Family, config: Config, is_sparse: bool) -> int:
    query, keys, value, heads = _attention_widths(config)
    values = keys if keys == config.num_key_value_heads * value else heads * value
    saved = heads * query + keys + values + heads * value
    mlp = getattr(layer, family.block)
    gated = family.shared(mlp) if is_sparse else mlp
    if gated is not None:
        widths = [m.out_features for n, m in gated.named_modules() if n.endswith("gate_proj")]
        saved += 3 * sum(widths)
    return saved


def _saved_norms(layer: Any, config: Config) -> int:
    """Every norm keeps its input in fp32; norms of heads see all of them."""
    _, keys, _, heads = _attention_widths(config)
    saved = 0
    for name, module in layer.named_modules():
        if "Norm" not in type(module).__name__ or not hasattr(module, "weight"):
            continue
        width = module.weight.numel()
        if name.endswith("k_norm"):
            width = keys
        elif name.endswith("q_norm") and width < config.hidden_size:
            width *= heads
        saved += width
    return saved


@dataclass(frozen=True)
class ExtendedLayer:
    """What an extension adds to one layer, in elements."""

    layer: int
    num_new: int
    rows: tuple[int, ...]
    """Tensors of its trainable router rows: weights and biases."""
    calibration: tuple[int, ...]
    """Tensors of its trainable calibration."""
    calibration_units: int
    """Hidden units of the calibration."""


@dataclass(frozen=True)
class ExtensionSizes:
    """What an extension adds, layer by layer, in elements."""

    layers: tuple[ExtendedLayer, ...]
    """In order. Before a probe has chosen them they are the last sparse ones; only what lies below a
    stage that trains no connector depends on which they are."""
    trained_expert: tuple[int, ...]
    """Trainable tensors of one new expert."""
    fixed_expert: int
    """Its elements that stay: a low-rank expert's copy of its source."""
    lora_rank: int
    """Of low-rank experts; 0: they are whole."""
    rows_fp32: bool
    """Router rows stay fp32 in a bf16 model, as the family's own do."""
    corrected: bool
    """Every new expert has a correction of its choice, an fp32 number that no optimizer has."""
    shares_slots: bool
    """A clone takes a slot of its own beside its source's."""

    @property
    def num_new(self) -> int:
        """New experts of all layers."""
        return sum(layer.num_new for layer in self.layers)

    @property
    def most_new(self) -> int:
        """New experts of the layer that has most."""
        return max(layer.num_new for layer in self.layers)

    @property
    def new_of(self) -> dict[int, int]:
        """Layer -> its number of new experts."""
        return {layer.layer: layer.num_new for layer in self.layers}


def extension_sizes(base: BaseSizes, extension: ExtensionConfig) -> ExtensionSizes:
    """Sizes of the configured extension; before a probe has chosen them, layers are only counted."""
    if extension.sources:
        new_of = {layer: len(extension.sources[layer]) for layer in sorted(extension.sources)}
    else:
        count = max(1, int(extension.layer_share * len(base.sparse_layers) + 1e-9))
        layers = extension.named_layers or base.sparse_layers[-count:]
        new_of = dict.fromkeys(sorted(layers), extension.num_new_experts)
    low = extension.expert_type is ExpertType.lora
    dim, wide = base.expert.hidden_dim, base.expert.intermediate_dim
    trained: tuple[int, ...] = (2 * wide * dim, dim * wide)
    if base.expert.bias:
        trained += (2 * wide, dim)
    fixed, rank = 0, extension.lora_rank if low else 0
    if low:
        trained, fixed = (2 * rank * dim, 2 * rank * wide, rank * wide, rank * dim), sum(trained)
    found = []
    for layer, num_new in new_of.items():
        total = base.num_experts + num_new
        units = max(2 * total - 2, 2) if extension.calibration is CalibrationKind.mlp_add else 0
        calibration: tuple[int, ...] = (total * units, total * units) if units else ()
        if extension.calibration is CalibrationKind.vector_add:
            calibration = (total,)
        rows = (num_new * base.hidden_dim, num_new)
        found.append(ExtendedLayer(layer, num_new, rows, calibration, units))
    return ExtensionSizes(
        layers=tuple(found),
        trained_expert=trained,
        fixed_expert=fixed,
        lora_rank=rank,
        rows_fp32=base.router_fp32,
        corrected=base.router_corrected or extension.loss_free_rate > 0,
        shares_slots=extension.row_init is RowInit.clone_shared,
    )


@dataclass(frozen=True)
class EncoderSizes:
    """One frozen encoder and the connector behind it."""

    elements: int
    feature_dim: int
    tokens_per_item: int
    flops_per_item: float
    connector: tuple[int, ...]
    """Trainable tensors of the connector."""
    connector_buffer_bytes: int


def encoder_sizes(encoder: EncoderConfig, connector_dim: int, llm_dim: int) -> EncoderSizes:
    """Sizes of an encoder from its configuration, and of a connector of width `connector_dim`.

    Products of an image: twice the elements for every patch of a vision transformer; EfficientNet-Lite0
    at 224 pixels is built and counted layer by layer.
    """
    if encoder.name == "efficientnet_lite0":
        network, feature_dim = _efficientnet_on_meta(), efficientnet.FEATURE_DIM
        flops = _convolution_flops(network, encoder.image_size)
    else:
        network, tower = _tower_on_meta(encoder.path)
        feature_dim = tower.hidden_size
        patches = (tower.image_size // tower.patch_size) ** 2
        flops = 2.0 * _numel(network) * patches
    wide = connector_dim
    connector = (feature_dim * wide, wide, wide * llm_dim, llm_dim, feature_dim * llm_dim)
    return EncoderSizes(
        elements=_numel(network),
        feature_dim=feature_dim,
        tokens_per_item=encoder.tokens_per_item,
        flops_per_item=flops,
        connector=connector,
        connector_buffer_bytes=2 * 4 * feature_dim,
    )


def _efficientnet_on_meta() -> nn.Module:
    with torch.device("meta"):
        return efficientnet.EfficientNetLite0()


def _convolution_flops(network: nn.Module, image_size: int) -> float:
    """Twice the products of every convolution, by a pass that computes shapes and no numbers."""
    total = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += 2 * prod(out.shape[1:]) * prod(module.weight.shape[1:])  # type: ignore[union-attr,arg-type]

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)]
    network(torch.empty(1, 3, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    return float(total)


def _tower_on_meta(path: str) -> tuple[nn.Module, Config]:
    from transformers import CLIPVisionModel, SiglipVisionModel

    if not Path(path, "config.json").is_file():
        raise ValueError(
            f"encoder.path={path!r} holds no config.json; give a CLIP or SigLIP folder"
        )
    config = AutoConfig.from_pretrained(path)
    tower = getattr(config, "vision_config", config)
    model_class = CLIPVisionModel if config.model_type.startswith("clip") else SiglipVisionModel
    with torch.device("meta"):
        return model_class(tower), tower


def trainable_tensors(
    base: BaseSizes, extension: ExtensionSizes, encoders: list[EncoderSizes], held: list[int]
) -> dict[Trainable, list[int]]:
    """Part that a stage may train -> elements of its tensors on a rank, in the optimizer's order.

    Args:
        held: new experts of every extended layer that the rank holds.
    """
    return {
        Trainable.connector: [size for encoder in encoders for size in encoder.connector],
        Trainable.router_delta: [base.num_experts * base.hidden_dim for _ in base.sparse_layers],
        Trainable.new_rows: [size for layer in extension.layers for size in layer.rows],
        Trainable.calibration: [size for layer in extension.layers for size in layer.calibration],
        Trainable.new_experts: [n * size for n in held for size in extension.trained_expert],
    }
