"""Endless global streams of raw samples: a position is all there is to remember."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import DataConfig, StreamConfig
from .manifest import Manifest
from .order import Mixture, Order, hash64
from .shards import BadSample, RawSample, ShardFiles
from .sources import prepare_openmoji


@dataclass(frozen=True)
class Place:
    """Where the sample of a stream position lies."""

    stream: str
    sample: int
    """Number in the stream's manifest."""
    epoch: int


class ShardStream:
    """The endless global stream of one split of one manifest; every position readable at once."""

    def __init__(
        self,
        manifest: Manifest | str | Path,
        *,
        split: str = "train",
        seed: int = 0,
        window: int = 4096,
        shuffle: bool = True,
        name: str = "data",
        local: Callable[[str], str] = str,
    ):
        self.manifest = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
        self.order = Order(
            self.manifest.select(split),
            self.manifest.starts,
            seed=seed,
            window=window,
            shuffle=shuffle,
        )
        self.name, self.split = name, split
        self.files = ShardFiles(self.manifest, local=local)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.order.num_samples

    @property
    def identity(self) -> str:
        """What must be equal for a position to mean the same sample again."""
        o = self.order
        return f"{self.manifest.identity[:16]}/{self.split}/{o.seed}/{o.window if o.shuffle else 0}"

    def place(self, position: int) -> Place:
        return Place(self.name, self.order.sample_at(position), position // len(self))

    def raw(self, position: int) -> RawSample:
        """The sample at a position of the global stream.

        Raises:
            BadSample: named by shard and row.
        """
        return self.files.read(self.order.sample_at(position))

    def epoch(self, start: int = 0) -> Iterator[RawSample]:
        """The samples of one epoch from a position on; a bad one raises."""
        for position in range(start, (start // len(self) + 1) * len(self)):
            yield self.raw(position)

    def __iter__(self) -> Iterator[tuple[int, RawSample]]:
        """(position, sample) for ever; damaged samples are left out. For looking and measuring."""
        position = 0
        while True:
            with contextlib.suppress(BadSample):
                yield position, self.raw(position)
            position += 1


class MixedStream:
    """Several streams as one, by weight; the interface of `ShardStream`."""

    def __init__(
        self, streams: list[ShardStream], weights: list[float], *, seed: int, span: int = 1
    ):
        self.streams = streams
        self.weights = weights
        self.mixture = Mixture(weights, seed=seed, span=span)

    @property
    def identity(self) -> str:
        slots = self.mixture.slots
        parts = [f"{s.name}={n}:{s.identity}" for s, n in zip(self.streams, slots, strict=True)]
        return f"mix/{self.mixture.seed}/{self.mixture.span}/" + "+".join(parts)

    def place(self, position: int) -> Place:
        source, inside = self.mixture.at(position)
        return self.streams[source].place(inside)

    def raw(self, position: int) -> RawSample:
        source, inside = self.mixture.at(position)
        return self.streams[source].raw(inside)


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
    chosen = names.split("+")
    configs = []
    for name in chosen:
        if name in data.streams:
            configs.append(data.streams[name])
        elif data.builtin:
            path = str(builtin_manifest(data, cache_dir))
            configs.append(StreamConfig(manifest=path, split=name, shuffle=name == "train"))
        else:
            raise ValueError(
                f"stream {name!r} (stages.*.data) is not in data.streams={list(data.streams)}"
            )
    streams = [
        ShardStream(
            config.manifest,
            split=config.split,
            seed=hash64(seed, number),
            window=data.shuffle_window,
            shuffle=config.shuffle,
            name=name,
        )
        for number, (name, config) in enumerate(zip(chosen, configs, strict=True))
    ]
    if len(streams) == 1:
        return streams[0]
    return MixedStream(streams, [config.weight for config in configs], seed=seed)


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
