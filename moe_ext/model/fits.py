"""Does a configuration fit its base's architecture, and its names torch? Told before anything starts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_ext.config import FrozenFormat, TrainConfig
from moe_ext.model.families import family_of, sparse_layers
from moe_ext.model.masks import takes_masks
from moe_ext.model.packed import group_of
from moe_ext.model.placement import cold_experts


def check_fits(config: TrainConfig, base: Any) -> None:
    """Raise ValueError for the first setting that the base has no layer, expert or width for.

    Args:
        base: the Hugging Face configuration of the base.
    """
    family = family_of(base)
    num_experts, shape = family.num_experts(base), family.expert_shape(base)
    num_frozen = dict.fromkeys(sparse_layers(base), num_experts)
    extension, parallel = config.extension, config.parallel
    names = {"extension.name": extension.name} | {
        f"encoder.{name}": name for name in config.encoder
    }
    for key, name in names.items():
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"{key}: {name!r} is a word that torch's modules use themselves; choose another name"
            )
    if not num_frozen:
        raise ValueError(
            f"base.path holds a {base.model_type} model without a sparse layer: there is no router to "
            "extend; give another base, or turn a dense model into one (base.dense)"
        )
    sources = extension.sources or {
        layer: [extension.source_expert] * extension.num_new_experts
        for layer in extension.layers or num_frozen
    }
    check_named(sources, num_frozen, by_layer=bool(extension.sources))
    if unknown := sorted(parallel.hot_lists.keys() - num_frozen.keys()):
        raise ValueError(
            f"parallel.hot_lists names layers {unknown}, which have no experts; sparse layers are "
            f"{list(num_frozen)}"
        )
    for hot in parallel.hot_lists.values():
        cold_experts(num_experts, parallel.ep_size, parallel.frozen_placement, hot)
    if config.base.frozen_bits:
        nf4 = config.base.frozen_format is FrozenFormat.nf4
        for width in (shape.hidden_dim, shape.intermediate_dim):
            group_of(width, config.base.frozen_bits, nf4)
    if config.data.pack and not takes_masks(base):
        raise ValueError(
            f"data.pack=true, but a {base.model_type} model has recurrent layers, which carry state from "
            "one packed sample into the next; use data.pack=false"
        )


def check_named(
    named: Mapping[int, Sequence[int]], num_frozen: Mapping[int, int], by_layer: bool
) -> None:
    """Raise ValueError for a layer without experts, or sources that it does not have.

    Args:
        named: layer -> the source of each of its new experts, -1 for one that is still to be chosen.
        num_frozen: sparse layer -> its experts.
        by_layer: `extension.sources` said so; else `extension.layers` and what goes with it.
    """
    keys = ("extension.layers", "extension.num_new_experts", "extension.source_expert")
    of_layers, of_count, of_id = ("extension.sources",) * 3 if by_layer else keys
    if wrong := named.keys() - num_frozen.keys():
        raise ValueError(
            f"{of_layers} names {sorted(wrong)}, which have no experts; sparse layers are {list(num_frozen)}"
        )
    for layer, experts in named.items():
        num = num_frozen[layer]
        if len(experts) > num:
            raise ValueError(
                f"{of_count}={len(experts)} exceeds the {num} experts that layer {layer} has to clone; "
                "choose fewer"
            )
        if max(experts) >= num:
            raise ValueError(
                f"{of_id}={max(experts)} is no expert of layer {layer}, which has {num}, numbered from 0; "
                "use -1 for its most selected one"
            )
