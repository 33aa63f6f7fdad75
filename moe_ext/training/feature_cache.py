"""The frozen encoder's features, computed once and streamed as shards (`data.features=cache`).

A cached shard holds the samples of its source shard, in their order, with features in the images'
place, so the stream's order and the position in a checkpoint stay what they are. The folder's name
is a hash of source, encoder weights, preprocessing and number format: nothing stale is ever found.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_ext.config import DataConfig, Features, StreamConfig, TrainConfig
from moe_ext.data import BadSample, Manifest, ManifestError, SampleBuilder, index_shards
from moe_ext.data.configured import fetcher_of, stream_configs
from moe_ext.data.images import image_members
from moe_ext.data.samples import UNUSABLE
from moe_ext.data.shards import Local, RawSample, ShardError, ShardFiles, write_tar
from moe_ext.model.encoders import Encoder, encoder_sha256
from moe_ext.training.topology import Topology

IMAGES_AT_ONCE = 32
"""Images whose pixels are held in memory together."""

ShareWork = Callable[[Topology, dict[str, tuple[int, Callable[[], Any]]]], dict[str, str]]


def with_cached_features(
    config: TrainConfig,
    names: list[str],
    encoders: dict[int, Any],
    build: SampleBuilder,
    topology: Topology,
    share_work: ShareWork,
) -> DataConfig:
    """`config.data` with the streams `names` reading cached features, made now where they are missing.

    Ranks divide the shards; every rank calls it.

    Raises:
        ValueError: more than one modality; the cache knows which encoder made what by there being one.
    """
    if len(encoders) != 1:
        raise ValueError(
            f"data.features={config.data.features.value} holds one modality's features, and encoder has "
            f"{len(encoders)}; set data.features=live"
        )
    encoder, dtype = encoders[1], np.dtype(np.float32)
    if config.data.features is Features.cache_fp16:
        dtype = np.dtype(np.float16)
    fetcher = fetcher_of(config.data, config.cache_dir)
    streams: dict[str, StreamConfig] = {}
    for name, stream in stream_configs(config.data, names, config.cache_dir).items():
        source = Manifest.load(stream.manifest, fetcher.read)
        folder = Path(config.cache_dir) / "features" / cache_key(source, encoder, dtype)
        path = folder / "features.json"
        jobs: dict[str, tuple[int, Callable[[], Any]]] = {
            f"features {rank} of {name}": (
                rank,
                partial(
                    _write_shards, source, encoder, build, folder, dtype, fetcher,
                    rank, topology.world_size,
                ),
            )
            for rank in range(topology.world_size)
        }  # fmt: skip
        share_work(topology, jobs)
        share_work(topology, {f"index of {name}": (0, partial(_write_index, source, folder, path))})
        streams[name] = replace(stream, manifest=str(path))
    return replace(config.data, streams={**config.data.streams, **streams})


def cache_key(source: Manifest, encoder: Encoder, dtype: np.dtype) -> str:
    """20 hexadecimal digits of everything that decides the cached bytes."""
    parts = [source.identity, encoder_sha256(encoder), dtype.name, 1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _write_shards(
    source: Manifest,
    encoder: Encoder,
    build: SampleBuilder,
    folder: Path,
    dtype: np.dtype,
    local: Local,
    rank: int,
    world_size: int,
) -> None:
    """Cached shards rank, rank + world_size, ... of a source; those that are there already stay."""
    if (folder / "features.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = ShardFiles(source, local=local)
    for number in range(rank, len(source.shards), world_size):
        path = folder / f"features-{number:06d}.tar"
        if not path.exists():
            write_tar(_converted(source, files, number, encoder, build, dtype), path)


def _write_index(source: Manifest, folder: Path, path: Path) -> None:
    """The cached shards' manifest, published last: splits and licence as in the source."""
    try:
        Manifest.load(path)
        return
    except ManifestError:
        pass
    shards = [str(folder / f"features-{n:06d}.tar") for n in range(len(source.shards))]
    cached = Manifest.load(index_shards(shards, folder / f".{os.getpid()}.json"))
    counts = [shard.num_samples for shard in cached.shards]
    assert counts == [shard.num_samples for shard in source.shards], "a sample was lost or split"
    whole = replace(
        cached, split_N=source.split_N, split_names=source.split_names, info=source.info
    )
    whole.save(path)
    for left in folder.glob(f".{os.getpid()}.*"):
        left.unlink()


def _converted(
    source: Manifest,
    files: ShardFiles,
    number: int,
    encoder: Encoder,
    build: SampleBuilder,
    dtype: np.dtype,
) -> Iterator[RawSample]:
    """A shard's samples with features for images. What cannot be used stays so, in its place.

    Raises:
        ShardError: the whole shard cannot be read: the cache would keep for ever what may be a passing fault.
    """
    first, last = int(source.starts[number]), int(source.starts[number + 1])
    waiting: list[tuple[RawSample, list[str]]] = []
    pixels: list[torch.Tensor] = []
    for sample in range(first, last):
        members: list[str] = []
        try:
            raw = files.read(sample)
            names = image_members(raw)
            pixels += [build.encoder_input(raw[name], str(raw["__key__"])) for name in names]
            members = names
        except BadSample as error:
            if number in files.broken:
                raise ShardError(
                    f"features of {error.key} cannot be cached: {error.reason}; mend the shard, leave it out "
                    "of the manifest (`moe-ext shards index`), or set data.features=live"
                ) from None
            stub = json.dumps({UNUSABLE: error.reason}).encode()
            raw = {"__key__": f"bad-{number:06d}-{sample - first:06d}", "json": stub}
        waiting.append((raw, members))
        if len(pixels) >= IMAGES_AT_ONCE or sample == last - 1:
            yield from _encoded(waiting, pixels, encoder, dtype)
            waiting, pixels = [], []


def _encoded(
    waiting: list[tuple[RawSample, list[str]]],
    pixels: list[torch.Tensor],
    encoder: Encoder,
    dtype: np.dtype,
) -> Iterator[RawSample]:
    features: Iterator[np.ndarray] = iter(())
    if pixels:
        device = next(encoder.parameters()).device
        features = iter(encoder(torch.stack(pixels).to(device)).float().cpu().numpy().astype(dtype))
    for raw, names in waiting:
        sample = {k: v for k, v in raw.items() if k not in names and k != "__url__"}
        for i, _ in enumerate(names):
            out = io.BytesIO()
            np.save(out, next(features), allow_pickle=False)
            sample["features.npy" if len(names) == 1 else f"{i}.features.npy"] = out.getvalue()
        yield sample
