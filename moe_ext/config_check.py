"""Which combinations of settings are impossible, and why: called once, before any process group exists.

Every function raises ValueError with the value, the rule, the remedy and the configuration key.
"""

import importlib.util
import math
import re
from pathlib import Path

from moe_ext.config import (
    CalibrationKind,
    EncoderConfig,
    ExpertInit,
    ExpertType,
    FrozenFormat,
    Placement,
    Precision,
    RowInit,
    StageConfig,
    StageKind,
    Trainable,
    TrainConfig,
)
from moe_ext.config_cluster import check_cluster
from moe_ext.config_launcher import check_launcher

BUILTIN_SPLITS = ("train", "probe", "heldout", "heldout_concept")
"""Streams that a built-in data set brings along."""


def check(config: TrainConfig) -> None:
    """Raise ValueError for the first rule that `config` breaks."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise ValueError(
            f"name={config.name!r} becomes a folder and a W&B name; use letters, digits, '.', '_' and '-'"
        )
    at_least("keep_checkpoints", config.keep_checkpoints, 1)
    _check_base(config)
    if not config.encoder:
        raise ValueError(
            "encoder is empty; name a modality, for example encoder@encoder.image=clip"
        )
    for modality, encoder in config.encoder.items():
        _check_encoder(modality, encoder)
    _check_extension(config)
    _check_data(config)
    _check_optim_and_parallel(config)
    check_launcher(config.launcher)
    _check_tracking(config)
    check_cluster(config.cluster)
    _check_chain(config)
    for name in config.chain:
        _check_stage(name, config.stages[name], config)


def check_world(config: TrainConfig, world_size: int, local_world_size: int | None = None) -> None:
    """Raise ValueError where the number of ranks does not fit; needs no process group."""
    ep_size, planned = config.parallel.ep_size, config.parallel.planned_ranks
    if planned not in (0, world_size):
        raise ValueError(
            f"parallel=auto planned for the {planned} ranks of cluster={config.cluster.name}, this job has "
            f"{world_size}; set cluster.nodes and cluster.ranks_per_node to the job's, or parallel.ep_size "
            "yourself instead of parallel=auto"
        )
    if world_size % ep_size:
        raise ValueError(
            f"parallel.ep_size={ep_size} does not divide the {world_size} rank(s) of this job; "
            f"start a multiple of {ep_size} ranks (deepspeed --num_accelerators {ep_size} ...) "
            f"or set parallel.ep_size to one of {[n for n in range(1, world_size + 1) if world_size % n == 0]}"
        )


def check_paths(config: TrainConfig) -> None:
    """Raise ValueError for the first local file or folder of the configuration that is not there."""
    base = config.base
    for key, folder in (("base.path", base.path), ("base.dense", base.dense)):
        named = folder and not folder.startswith("builtin:")
        if named and not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{key}={folder} holds no config.json; give the folder of a Hugging Face model"
            )
    for name, encoder in config.encoder.items():
        if encoder.path and not Path(encoder.path).exists():
            raise ValueError(f"encoder.{name}.path={encoder.path} does not exist")
    for name, stream in config.data.streams.items():
        if "://" not in stream.manifest and not Path(stream.manifest).is_file():
            raise ValueError(
                f"data.streams.{name}.manifest={stream.manifest} does not exist; "
                "`moe-ext shards` makes shards and their manifest"
            )
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tracking.tensorboard=true needs the package tensorboard, which is not installed here: "
            "pip install 'moe_ext[tensorboard]', or tracking.tensorboard=false"
        )


def _check_tracking(config: TrainConfig) -> None:
    tracking, alerts = config.tracking, config.tracking.alerts
    at_least("tracking.log_every", tracking.log_every, 1)
    at_least("tracking.wandb_timeout_s", tracking.wandb_timeout_s, 1)
    at_least("tracking.alerts.window", alerts.window, 2)
    for key in ("dead_expert", "slow_loader", "stalled_s"):
        at_least(f"tracking.alerts.{key}", getattr(alerts, key), 0)
    for key in ("loss_spike", "gradient_spike"):
        ratio = getattr(alerts, key)
        if ratio and not ratio > 1:
            raise ValueError(
                f"tracking.alerts.{key}={ratio} is a multiple of the usual value: above 1, or 0 for none"
            )


def at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{key}={value} must be at least {least}")


def _share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key}={value} is a share and must lie between 0 and 1")


def _check_base(config: TrainConfig) -> None:
    base = config.base
    if bool(base.path) == bool(base.dense):
        raise ValueError(
            f"base.path={base.path!r} and base.dense={base.dense!r}: give exactly one, the folder of an MoE "
            "checkpoint or a dense model to upcycle (base.dense=builtin:smollm2)"
        )
    at_least("base.num_experts", base.num_experts, 1)
    if not 1 <= base.top_k <= base.num_experts:
        raise ValueError(
            f"base.top_k={base.top_k} must lie between 1 and base.num_experts={base.num_experts}"
        )
    if base.frozen_bits not in (0, 4, 8):
        raise ValueError(
            f"base.frozen_bits={base.frozen_bits} must be 8 or 4, or 0 for the run's own precision"
        )
    if base.frozen_format is FrozenFormat.nf4 and base.frozen_bits != 4:
        raise ValueError(
            f"base.frozen_format=nf4 is a format of 4 bits, and base.frozen_bits={base.frozen_bits}; set "
            "base.frozen_bits=4, or base.frozen_format=plain"
        )
    at_least("base.sparse_every", base.sparse_every, 1)
    at_least("base.sparse_offset", base.sparse_offset, 0)


def _check_encoder(modality: str, encoder: EncoderConfig) -> None:
    key = f"encoder.{modality}"
    if not modality.isidentifier() or modality == "text":
        raise ValueError(f"{key}: the name of a modality must be an identifier other than 'text'")
    if encoder.name == "hf_vision" and not encoder.path:
        raise ValueError(
            f"{key}.path is empty; encoder hf_vision reads its tower from a local folder"
        )
    at_least(f"{key}.tokens_per_item", encoder.tokens_per_item, 1)
    if math.isqrt(encoder.tokens_per_item) ** 2 != encoder.tokens_per_item:
        raise ValueError(
            f"{key}.tokens_per_item={encoder.tokens_per_item} must be a square number: the feature grid is "
            "pooled to its square root on each side"
        )


def _check_extension(config: TrainConfig) -> None:
    extension = config.extension
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", extension.name):
        raise ValueError(
            f"extension.name={extension.name!r} becomes part of checkpoint keys; use an identifier"
        )
    at_least("extension.num_new_experts", extension.num_new_experts, 1)
    _share("extension.layer_share", extension.layer_share)
    _share("extension.drop_ratio", extension.drop_ratio)
    _share("extension.affected_share", extension.affected_share)
    if not extension.random_scale > 0:
        raise ValueError(
            f"extension.random_scale={extension.random_scale} must be above 0: with all weights zero an expert "
            "has no gradient"
        )
    at_least("extension.loss_free_rate", extension.loss_free_rate, 0.0)
    at_least("extension.source_expert", extension.source_expert, -1)
    lora = extension.expert_type is ExpertType.lora
    if lora and extension.expert_init is not ExpertInit.copy:
        raise ValueError(
            f"extension.expert_init={extension.expert_init.value} has no meaning with "
            "extension.expert_type=lora, which starts as its source; use copy"
        )
    _check_sources(config)
    shared = extension.row_init is RowInit.clone_shared
    if shared and extension.num_new_experts > 1 and extension.source_expert >= 0:
        raise ValueError(
            "extension.row_init=clone_shared gives a source one clone, but extension.source_expert="
            f"{extension.source_expert} names one for extension.num_new_experts={extension.num_new_experts}; "
            "use source_expert=-1 or row_init=clone"
        )
    if shared and extension.loss_free_rate > 0:
        raise ValueError(
            f"extension.loss_free_rate={extension.loss_free_rate} has nothing to move with "
            "extension.row_init=clone_shared, where a clone is chosen with its source's slot; use "
            "loss_free_rate=0, or row_init=clone"
        )
    if len(set(extension.layers)) != len(extension.layers) or any(i < 0 for i in extension.layers):
        raise ValueError(
            f"extension.layers={extension.layers} must be different decoder layers, counted from 0"
        )
    if extension.expert_type is ExpertType.lora:
        at_least("extension.lora_rank", extension.lora_rank, 1)
    if extension.placement is Placement.shard and config.parallel.ep_size == 1:
        raise ValueError(
            "extension.placement=shard needs parallel.ep_size > 1; use extension.placement=replicate on one rank"
        )


def _check_sources(config: TrainConfig) -> None:
    extension, sources = config.extension, config.extension.sources
    other = {
        "extension.layers": extension.layers,
        "extension.num_new_experts": extension.num_new_experts > 1,
        "extension.source_expert": extension.source_expert >= 0,
    }
    if twice := [key for key, given in other.items() if sources and given]:
        raise ValueError(
            f"extension.sources={sources} names layers, their new experts and sources; {twice[0]} would name "
            "them twice: leave it at its default"
        )
    for layer, experts in sources.items():
        named = [expert for expert in experts if expert >= 0]
        if layer < 0 or not experts or min(experts) < -1:
            raise ValueError(
                f"extension.sources={{{layer}: {experts}}} must give a decoder layer, counted from 0, one "
                "frozen expert a new one, or -1 for the layer's most selected"
            )
        if extension.row_init is RowInit.clone_shared and len(set(named)) < len(named):
            raise ValueError(
                f"extension.sources={{{layer}: {experts}}} with extension.row_init=clone_shared, which gives "
                "a source one clone; name different ones, or use row_init=clone"
            )


def _check_data(config: TrainConfig) -> None:
    data = config.data
    if data.builtin not in ("", "openmoji"):
        raise ValueError(
            f"data.builtin={data.builtin!r} is not known; use openmoji, or '' and data.streams"
        )
    for name, stream in data.streams.items():
        if not stream.weight > 0:
            raise ValueError(f"data.streams.{name}.weight={stream.weight} must be above 0")
    if data.pack and data.sequence_length < data.max_length:
        raise ValueError(
            f"data.sequence_length={data.sequence_length} is below data.max_length={data.max_length}: a sample "
            "would not fit into a packed row; raise the first or lower the second"
        )
    at_least("data.homogeneous_span", data.homogeneous_span, 1)
    if data.pack and data.homogeneous_span > 1:
        raise ValueError(
            f"data.homogeneous_span={data.homogeneous_span} with data.pack=true: a packed row takes samples of "
            "every stream; set one of them to its default"
        )
    at_least("data.num_workers", data.num_workers, 0)
    at_least("data.shuffle_window", data.shuffle_window, 1)
    at_least("data.bad_sample_budget", data.bad_sample_budget, 0)
    longest = max(encoder.tokens_per_item for encoder in config.encoder.values())
    if data.max_length < longest + 8:
        raise ValueError(
            f"data.max_length={data.max_length} leaves no room for text beside the {longest} tokens of one item; "
            f"use at least {longest + 8}"
        )


def _check_optim_and_parallel(config: TrainConfig) -> None:
    optim, parallel = config.optim, config.parallel
    for key in ("beta1", "beta2"):
        if not 0.0 <= getattr(optim, key) < 1.0:
            raise ValueError(f"optim.{key}={getattr(optim, key)} must lie in [0, 1)")
    at_least("optim.eps", optim.eps, 0.0)
    at_least("optim.weight_decay", optim.weight_decay, 0.0)
    at_least("optim.clip_norm", optim.clip_norm, 0.0)
    at_least("parallel.ep_size", parallel.ep_size, 1)
    at_least("parallel.threads_per_rank", parallel.threads_per_rank, 0)
    at_least("parallel.hot_experts", parallel.hot_experts, 0)
    if parallel.hot_experts and parallel.hot_lists:
        raise ValueError(
            f"parallel.hot_experts={parallel.hot_experts} and parallel.hot_lists name hot experts twice; "
            "give the number, or the lists"
        )
    travels = parallel.ep_size > 1 and parallel.frozen_placement is Placement.shard
    if (parallel.hot_experts or parallel.hot_lists) and not (travels or parallel.auto):
        raise ValueError(
            f"parallel.hot_experts={parallel.hot_experts or parallel.hot_lists} needs frozen experts that "
            "tokens travel to: parallel.ep_size above 1 and parallel.frozen_placement=shard"
        )
    if not parallel.timeout_s > 0:
        raise ValueError(f"parallel.timeout_s={parallel.timeout_s} must be above 0")
    check_zero(parallel.zero_stage, optim.clip_norm, parallel.precision is Precision.bf16)


def check_zero(zero_stage: int, clip_norm: float, bf16: bool) -> None:
    """Refuse what DeepSpeed would do wrong; the engine asks again, when `precision=auto` is settled."""
    if zero_stage == 3:
        raise ValueError(
            "parallel.zero_stage=3 is refused: it partitions the trainable part only to gather it again at every "
            "layer, and needs a trainable expert on every rank; what trains is small, use 1 or 2"
        )
    if zero_stage not in (0, 1, 2):
        raise ValueError(f"parallel.zero_stage={zero_stage} must be 0, 1 or 2")
    if zero_stage == 0 and bf16:
        raise ValueError(
            "parallel.zero_stage=0 with parallel.precision=bf16 is refused: it keeps no fp32 weights that a "
            "checkpoint could hold; use parallel.zero_stage=1"
        )
    if zero_stage == 0 and clip_norm > 0:
        raise ValueError(
            f"parallel.zero_stage=0 with optim.clip_norm={clip_norm} is refused: DeepSpeed 0.19.8 clips by a "
            "wrong norm there; use parallel.zero_stage=1, or optim.clip_norm=0"
        )


def _check_chain(config: TrainConfig) -> None:
    chain = config.chain
    if not chain:
        raise ValueError(
            "chain is empty; name the stages to run, for example chain=[align,probe,extend,tune]"
        )
    if len(set(chain)) != len(chain):
        raise ValueError(f"chain={chain} names a stage twice; give each its own name under stages")
    for name in chain:
        if name not in config.stages:
            raise ValueError(
                f"chain names {name!r}, which is not in stages ({', '.join(config.stages)})"
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(
                f"stages.{name}: a stage's name becomes a folder; use letters, digits, '_' and '-'"
            )
    kinds = [config.stages[name].kind for name in chain]
    if kinds.count(StageKind.extend) > 1:
        raise ValueError(
            f"chain={chain} holds more than one stage of kind extend; one run adds one extension"
        )
    before = (
        kinds[: kinds.index(StageKind.extend)] if StageKind.extend in kinds else [StageKind.probe]
    )
    if StageKind.probe not in before and not config.extension.named_layers:
        raise ValueError(
            f"chain={chain} extends without a probe before it, and extension.layers is empty; "
            "add a stage of kind probe, or list the layers in extension.layers"
        )
    extended = False
    for name, kind in zip(chain, kinds, strict=True):
        if kind is StageKind.probe and extended:
            raise ValueError(f"chain={chain}: stage {name} probes after the surgery; put it before")
        extended = extended or kind is StageKind.extend
        needs = {Trainable.new_experts, Trainable.new_rows, Trainable.calibration}
        if needs & set(config.stages[name].train) and not extended:
            raise ValueError(
                f"stages.{name}.train holds {sorted(t.name for t in needs & set(config.stages[name].train))}, "
                f"but chain={chain} has no stage of kind extend before {name}"
            )


def _check_stage(name: str, stage: StageConfig, config: TrainConfig) -> None:
    key = f"stages.{name}"
    if stage.kind is StageKind.extend:
        if stage.train or stage.steps:
            raise ValueError(
                f"{key} is of kind extend, which trains nothing; leave {key}.train and steps empty"
            )
        return
    at_least(f"{key}.steps", stage.steps, 1)
    at_least(f"{key}.sequences_per_rank", stage.sequences_per_rank, 1)
    at_least(f"{key}.accumulation", stage.accumulation, 1)
    at_least(f"{key}.checkpoint_every", stage.checkpoint_every, 0)
    at_least(f"{key}.max_bad_steps", stage.max_bad_steps, 0)
    at_least(f"{key}.spike_sigmas", stage.spike_sigmas, 0.0)
    at_least(f"{key}.spike_window", stage.spike_window, 2)
    at_least(f"{key}.balance_coefficient", stage.balance_coefficient, 0.0)
    at_least(f"{key}.z_coefficient", stage.z_coefficient, 0.0)
    at_least(f"{key}.router_kl_coefficient", stage.router_kl_coefficient, 0.0)
    _share(f"{key}.warmup_share", stage.warmup_share)
    _share(f"{key}.final_learning_rate_share", stage.final_learning_rate_share)
    if not stage.learning_rate > 0:
        raise ValueError(f"{key}.learning_rate={stage.learning_rate} must be above 0")
    if not stage.train:
        raise ValueError(
            f"{key}.train is empty; list what it trains: {', '.join(part.name for part in Trainable)}"
        )
    if (
        Trainable.calibration in stage.train
        and config.extension.calibration is CalibrationKind.none
    ):
        raise ValueError(
            f"{key}.train holds calibration, but extension.calibration=none has nothing to train; take it "
            "out of the list, or use mlp_add or vector_add"
        )
    if stage.kind is StageKind.probe:
        if stage.train != [Trainable.router_delta]:
            names = [part.name for part in stage.train]
            raise ValueError(
                f"{key} is of kind probe and trains exactly [router_delta], not {names}"
            )
        at_least(f"{key}.statistics_samples", stage.statistics_samples, 1)
    elif Trainable.router_delta in stage.train:
        raise ValueError(
            f"{key}.train holds router_delta, which only a stage of kind probe trains and discards"
        )
    _check_streams(f"{key}.data", stage.data, config)
    if stage.kind is StageKind.probe:
        _check_streams(f"{key}.statistics_data", stage.statistics_data, config)


def _check_streams(key: str, names: str, config: TrainConfig) -> None:
    """Every name of "name+name" is a stream of the configuration or a split of the built-in set."""
    known = [*config.data.streams, *(BUILTIN_SPLITS if config.data.builtin else ())]
    for name in names.split("+"):
        if name not in known:
            raise ValueError(
                f"{key}={names!r}: {name!r} is not a stream of data.streams "
                f"(known: {', '.join(known) or 'none'})"
            )
