"""From the configuration's `data` group to streams and loaders; deeper code gets numbers."""

import logging
import os
from pathlib import Path

from ..config import DataConfig, StreamConfig
from .batches import Loader
from .fetch import Fetcher
from .manifest import Manifest
from .order import hash64
from .packing import PackedRows, measure_lengths
from .s3 import S3Access
from .samples import SampleBuilder
from .sources import prepare_openmoji
from .streams import MixedStream, ShardStream

log = logging.getLogger(__name__)


def open_streams(
    data: DataConfig, names: str, *, seed: int, cache_dir: str | Path = "runs/cache"
) -> ShardStream | MixedStream:
    """The stream that a stage reads: one of `data.streams`, or several as "name+name", by weight.

    With `data.builtin` a split of the built-in set (`train`, `probe`, `heldout`, `heldout_concept`)
    is a stream of that name, unless `data.streams` has its own.

    Raises:
        ValueError: a name is not among the streams.
        ManifestError: a manifest is missing or damaged.
    """
    configs = stream_configs(data, [names], cache_dir)
    fetcher = fetcher_of(data, cache_dir)
    streams = [
        ShardStream(
            Manifest.load(config.manifest, fetcher.read, lengths_dir=Path(cache_dir) / "lengths"),
            split=config.split,
            seed=hash64(seed, number),
            window=data.shuffle_window,
            shuffle=config.shuffle,
            name=name,
            local=fetcher,
        )
        for number, (name, config) in enumerate(configs.items())
    ]
    if len(streams) == 1:
        return streams[0]
    return MixedStream(
        streams,
        [config.weight for config in configs.values()],
        seed=seed,
        span=data.homogeneous_span,
    )


def stream_configs(
    data: DataConfig, names: list[str], cache_dir: str | Path
) -> dict[str, StreamConfig]:
    """Settings of each stream that `names` ("name" or "name+name") mention, in their order.

    Raises:
        ValueError: a name is not among the streams.
    """
    configs: dict[str, StreamConfig] = {}
    for name in (name for joined in names for name in joined.split("+")):
        if name in data.streams:
            configs[name] = data.streams[name]
        elif data.builtin:
            path = str(builtin_manifest(data, cache_dir))
            configs[name] = StreamConfig(manifest=path, split=name, shuffle=name == "train")
        else:
            raise ValueError(
                f"stream {name!r} (stages.*.data) is not in data.streams={list(data.streams)}"
            )
    return configs


def fetcher_of(data: DataConfig, cache_dir: str | Path) -> Fetcher:
    """What fetches remote shards and leaves local ones where they are; both are checked once."""
    return Fetcher(
        data.shard_cache or Path(cache_dir) / "shards",
        limit_bytes=data.shard_cache_bytes,
        timeout_s=data.fetch_timeout_s,
        tries=data.fetch_tries,
        ahead=data.shards_ahead,
        verify_local=data.verify_local,
        s3=S3Access.from_environment(os.environ),
    )


def open_loader(
    data: DataConfig,
    names: str,
    build: SampleBuilder,
    *,
    sequences_per_rank: int,
    rank: int,
    world_size: int,
    seed: int,
    cache_dir: str | Path = "runs/cache",
    stop_alone: bool = True,
) -> Loader:
    """The endless loader of a stage's stream for one rank.

    Args:
        stop_alone: see `Loader`.

    Raises:
        ValueError: see `open_streams`; or a sample may not fit into a packed row.
        ManifestError: a manifest is missing, or `data.pack` finds no token lengths.
    """
    stream = open_streams(data, names, seed=seed, cache_dir=cache_dir)
    together = sequences_per_rank * world_size
    straddles = data.homogeneous_span > 1 and data.homogeneous_span % together
    if straddles and rank == 0 and isinstance(stream, MixedStream):
        log.warning(
            "data.homogeneous_span=%d is no multiple of the %d samples of a micro-batch of all ranks: "
            "some micro-batches hold samples of two streams", data.homogeneous_span, together,
        )  # fmt: skip
    rows, length = None, None
    if data.pack:
        length = data.sequence_length
        rows = PackedRows(stream, build, length=length, seed=seed)
    return Loader(
        stream,
        build,
        sequences_per_rank=sequences_per_rank,
        rank=rank,
        world_size=world_size,
        num_workers=data.num_workers,
        rows=rows,
        length=length,
        bad_sample_budget=data.bad_sample_budget,
        stop_alone=stop_alone,
    )


def prepare_lengths(
    data: DataConfig, names: str, build: SampleBuilder, *, cache_dir: str | Path = "runs/cache"
) -> None:
    """Measures the token lengths that `data.pack` plans from, if missing. One process calls it."""
    stream = open_streams(data, names, seed=0, cache_dir=cache_dir)
    for source in stream.streams if isinstance(stream, MixedStream) else [stream]:
        measure_lengths(source.manifest, build, local=source.files.local)


def builtin_manifest(data: DataConfig, cache_dir: str | Path) -> Path:
    """Where the manifest of the built-in set lies once `prepare_builtin` has written it."""
    return Path(cache_dir) / f"{data.builtin}-{data.limit or 'all'}" / f"{data.builtin}.json"


def prepare_builtin(data: DataConfig, cache_dir: str | Path) -> Path:
    """Path of the built-in set's manifest, drawn now unless it is there. One process calls it.

    Raises:
        ValueError: `data.builtin` names no known set.
    """
    if data.builtin != "openmoji":
        raise ValueError(f"data.builtin={data.builtin!r} is not known; choose openmoji")
    return prepare_openmoji(builtin_manifest(data, cache_dir).parent, limit=data.limit)
