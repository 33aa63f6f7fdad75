"""The plan of a configuration, and `parallel=auto`: that plan, taken when the configuration is composed.

No weight is read and no process group is made. The best placement that keeps the base exactly is
written into `parallel` and `extension.placement`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_ext.config import FrozenFormat, Placement, TrainConfig
from moe_ext.config_check import check
from moe_ext.planning.candidates import NEW_SHARE, Plan, make_plan, subject_of
from moe_ext.planning.sizes import base_config
from moe_ext.planning.table import describe, nothing_fits
from moe_ext.upcycle import planned_config


def plan_of(config: TrainConfig, new_share: float = NEW_SHARE, exact: bool = False) -> Plan:
    """The plan of a configuration.

    Args:
        exact: only the base as it is configured, no narrower frozen bank.

    Raises:
        ValueError: no such base or encoder, or one that has no row of its own.
    """
    subject = subject_of(config, _base_config(config), new_share)
    bits, parallel = config.base.frozen_bits, config.parallel
    lists, every = parallel.hot_lists, parallel.hot_experts
    layers = subject.base.sparse_layers if lists or every else ()
    hot = tuple(len(lists.get(layer, ())) if lists else every for layer in layers)
    kept = (bits,) if exact or bits else (0, 8, 4)
    nf4 = config.base.frozen_format is FrozenFormat.nf4
    return make_plan(subject, config.cluster, kept, hot, nf4)


def _base_config(config: TrainConfig) -> Any:
    """The Hugging Face configuration of the base; of one that is to be upcycled, as it will be."""
    if config.base.path:
        return base_config(config.base.path)
    return planned_config(config.base, Path(config.cache_dir))


def resolve_auto(config: TrainConfig) -> TrainConfig:
    """The configuration with its placement filled in, and in `parallel.planned` what was chosen.

    Deterministic: a function of the configuration and of the base's config.json, the same on every
    rank.

    Raises:
        ValueError: nothing fits that keeps the base as configured.
    """
    plan = plan_of(config, exact=True)
    best = plan.best
    if best is None:
        raise ValueError(f"parallel=auto for cluster={config.cluster.name}: {nothing_fits(plan)}")
    placed, cluster = best.placed, config.cluster
    plain = placed.ep_size == 1 or placed.frozen is Placement.replicate
    parallel = replace(
        config.parallel,
        hot_experts=0 if plain else config.parallel.hot_experts,
        hot_lists={} if plain else config.parallel.hot_lists,
        auto=False,
        planned=f"{describe(placed)} for cluster={cluster.name} ({cluster.num_ranks} ranks): "
        f"{best.memory.total / 2**30:.2f} of {cluster.memory_bytes / 2**30:.2f} GiB a rank, predicted "
        f"step {best.time.total:.3g} s",
        planned_ranks=cluster.num_ranks,
        ep_size=placed.ep_size,
        zero_stage=placed.zero_stage,
        frozen_placement=placed.frozen,
    )
    extension = replace(config.extension, placement=placed.new)
    planned = replace(config, parallel=parallel, extension=extension)
    check(planned)
    return planned
