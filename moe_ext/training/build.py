"""What a run needs before it trains: base, data, encoders, and the model of a stage, built fresh."""

import contextlib
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_ext.config import DataConfig, Features, Precision, StageKind, TrainConfig
from moe_ext.data import SampleBuilder, prepare_builtin
from moe_ext.data.configured import builtin_manifest, prepare_lengths
from moe_ext.data.samples import load_tokenizer
from moe_ext.model.connectors import Connector
from moe_ext.model.encoders import build_encoder
from moe_ext.model.extend import load_base
from moe_ext.model.fits import check_fits
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.planning.sizes import base_config
from moe_ext.training.feature_cache import with_cached_features
from moe_ext.training.topology import Topology

_ROUND = itertools.count()
"""Numbers the calls of `share_work`, the same on all ranks: keys of the store are used once."""
POLL_S = 0.05


def _nothing(lm: nn.Module, connectors: nn.ModuleDict) -> None:
    pass


@dataclass(frozen=True)
class Beside:
    """Finished extensions that are in the model of every stage and stay as they are."""

    names: frozenset[str] = frozenset()
    widths: dict[str, int] = field(default_factory=dict)
    """Modality -> hidden width of the connector that one of them brings along."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What they are, whatever their folders are called."""
    put: Callable[[Any, nn.ModuleDict], None] = _nothing
    """Puts them into a base that is fresh, and their connectors among the model's; frozen."""

    def own_modalities(self, encoders: Sequence[str]) -> list[int]:
        """Ids of the modalities whose tokens open the run's new experts: those that none of these has a
        connector for, or all where there is none left (another extension for the same modality)."""
        ids = dict(enumerate(encoders, start=1))
        return [i for i, name in ids.items() if name not in self.widths] or list(ids)


@dataclass
class Prepared:
    """What all stages share."""

    base_path: Path
    dtype: torch.dtype
    encoders: dict[int, nn.Module]
    """Modality id -> frozen encoder on the device."""
    build: SampleBuilder
    data: DataConfig
    """The configuration's, with the manifests of cached features where `data.features` asks for them."""
    own_modalities: tuple[int, ...] = (1,)
    """Ids of those whose tokens open the new experts. Samples are of the first."""
    beside: Beside = field(default_factory=Beside)

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16


def chosen_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """bf16 or fp32; `auto` is bf16 where the hardware multiplies it natively, on all ranks."""
    if precision is not Precision.auto:
        return torch.bfloat16 if precision is Precision.bf16 else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    vote = torch.tensor([int(native)], device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if vote.item() else torch.float32


def prepare(
    config: TrainConfig,
    topology: Topology,
    prepare_base: Callable[[], Path],
    beside: Beside | None = None,
) -> Prepared:
    """Base and shards made where they are missing, by one rank each while the others wait.

    Args:
        prepare_base: the folder of the base, made now unless it is there.
        beside: extensions to stand beside the run's own.

    Raises:
        ValueError: a base, encoder or data set that cannot be had.
    """
    cache = Path(config.cache_dir)
    jobs: dict[str, tuple[int, Callable[[], Any]]] = {"base": (0, prepare_base)}
    if config.data.builtin:
        jobs["data"] = (topology.world_size - 1, lambda: prepare_builtin(config.data, cache))
    path = share_work(topology, jobs)["base"]
    check_fits(config, base_config(path))
    dtype = chosen_dtype(config.parallel.precision, topology.device)
    encoders: dict[int, nn.Module] = {}
    for modality, (name, settings) in enumerate(config.encoder.items(), start=1):
        try:
            encoders[modality] = build_encoder(
                settings.name,
                settings.path,
                settings.image_size,
                settings.tokens_per_item,
                settings.feature_layer,
                dtype=dtype,
            ).to(topology.device)
        except ValueError as error:
            raise ValueError(f"encoder.{name}: {error}") from error
    beside = beside or Beside()
    own = beside.own_modalities(list(config.encoder))
    first: Any = encoders[own[0]]
    build = SampleBuilder(
        load_tokenizer(path),
        first.preprocess,
        first.tokens_per_item,
        modality_id=own[0],
        prompt=config.data.prompt,
        max_length=config.data.max_length,
        chat_template=config.base.chat_template,
    )
    stages = [config.stages[name] for name in config.chain]
    names = {stage.data for stage in stages if stage.steps}
    names |= {stage.statistics_data for stage in stages if stage.kind is StageKind.probe}
    data = config.data
    if data.features is not Features.live:
        data = with_cached_features(config, sorted(names), encoders, build, topology, share_work)
    if data.pack:
        share_work(
            topology,
            {
                f"lengths of {stream}": (
                    rank,
                    partial(prepare_lengths, data, stream, build, cache_dir=cache),
                )
                for rank, stream in enumerate(sorted(names))
            },
        )
    return Prepared(Path(path), dtype, encoders, build, data, tuple(own), beside)


def build_model(
    config: TrainConfig,
    prepared: Prepared,
    topology: Topology,
    hot: dict[int, list[int]] | None = None,
) -> MultimodalMoE:
    """The base with connectors, without new experts but those of finished extensions beside them,
    frozen. Equal on all ranks but for shares.

    Args:
        hot: layer -> frozen experts that every rank holds.
    """
    lm = load_base(
        prepared.base_path,
        dtype=prepared.dtype,
        device=topology.device,
        ep_rank=topology.ep_rank,
        ep_size=topology.ep_size,
        ep_group=topology.ep_group,
        frozen_placement=config.parallel.frozen_placement,
        frozen_bits=config.base.frozen_bits,
        frozen_format=config.base.frozen_format,
        hot=hot,
    )
    connectors = nn.ModuleDict()
    for modality, (name, encoder) in enumerate(
        zip(config.encoder, prepared.encoders.values(), strict=True), start=1
    ):
        dim: Any = encoder.feature_dim
        connectors[name] = Connector(
            dim,
            prepared.beside.widths.get(name, config.connector.hidden_dim),
            lm.config.hidden_size,
            seed=config.seed * 1000 + modality,
            dtype=prepared.dtype,
        )
    connectors.to(topology.device)
    prepared.beside.put(lm, connectors)
    return MultimodalMoE(
        lm, prepared.encoders, connectors, config.parallel.activation_checkpointing
    )


def heldout_manifest(config: TrainConfig) -> Path | None:
    """The manifest whose held-out splits are evaluated; None when there is none."""
    if config.data.builtin:
        return builtin_manifest(config.data, config.cache_dir)
    stream = config.data.streams.get("heldout")
    return Path(stream.manifest) if stream is not None else None


@contextlib.contextmanager
def _signs_of_life(store: dist.Store, topology: Topology) -> Iterator[None]:
    """Inside, this rank's counter in the store goes up several times in every `timeout_s`.

    It says that the rank is at its work. That its process lives (`peers.py`) is less: for a rank that
    hangs on its way here the others would wait without end.
    """
    over = threading.Event()

    def count() -> None:
        while not over.wait(topology.timeout_s / 10):
            store.add(f"moe_ext/alive/{topology.rank}", 1)

    thread = threading.Thread(target=count, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def share_work(
    topology: Topology, jobs: dict[str, tuple[int, Callable[[], Any]]]
) -> dict[str, str]:
    """Results, as text, of jobs that one rank each does, side by side; equal on all ranks.

    A job may take longer than a collective may wait, while its rank shows signs of life.

    Args:
        jobs: name -> (rank that does it, work).

    Raises:
        RuntimeError: another rank's job failed, with its reason, or that rank showed no sign of life
            for `parallel.timeout_s`.
    """
    store = dist.distributed_c10d._get_default_store()
    round_ = next(_ROUND)
    mine = {n: work for n, (o, work) in jobs.items() if o % topology.world_size == topology.rank}
    with _signs_of_life(store, topology):
        for name, work in mine.items():
            try:
                store.set(f"moe_ext/{round_}/{name}", f"1{work()}")
            except BaseException:
                reason = traceback.format_exc().strip().splitlines()[-1]
                store.set(f"moe_ext/{round_}/{name}", "0" + reason)
                raise
    results = {}
    for name, (owner, _) in jobs.items():
        key, worker = f"moe_ext/{round_}/{name}", owner % topology.world_size
        last, since = -1, time.monotonic()
        while not store.check([key]):
            time.sleep(POLL_S)
            if (sign := store.add(f"moe_ext/alive/{worker}", 0)) != last:
                last, since = sign, time.monotonic()
            if time.monotonic() - since > topology.timeout_s:
                raise RuntimeError(
                    f"rank {worker} showed no sign of life for parallel.timeout_s={topology.timeout_s} "
                    f"seconds while the others waited for its work on {name}: it died or was stopped"
                )
        answer = store.get(key).decode()
        if answer[0] == "0":
            raise RuntimeError(f"rank {owner % topology.world_size}, {name}: {answer[1:]}")
        results[name] = answer[1:]
    return results
