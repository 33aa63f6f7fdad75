"""Endless global streams of raw samples: a position is all there is to remember."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .local import LocalFiles
from .manifest import Manifest, read_local
from .order import Mixture, Order
from .shards import BadSample, Local, RawSample, ShardFiles


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
        local: Local | None = None,
    ):
        """`local`: a `Fetcher` for remote shards; by default `LocalFiles`, which checks every shard once."""
        if not isinstance(manifest, Manifest):
            manifest = Manifest.load(manifest, getattr(local, "read", read_local))
        self.manifest = manifest
        self.order = Order(
            self.manifest.select(split),
            self.manifest.starts,
            seed=seed,
            window=window,
            shuffle=shuffle,
        )
        self.name, self.split = name, split
        self.files = ShardFiles(self.manifest, local=local or LocalFiles())
        self.expect = getattr(local, "expect", None)  # a Fetcher's: what will be needed soon
        self.expected = -1

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
        if self.expect is not None and position // self.order.window != self.expected:
            self.expected = position // self.order.window
            upcoming = self.order.upcoming_shards(position)
            manifest = self.manifest
            self.expect([(manifest.url(shard), manifest.shards[shard]) for shard in upcoming])
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
