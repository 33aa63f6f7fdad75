"""The order of samples, as pure functions of position: no buffer, no history, nothing to replay.

Every function here depends on its arguments alone, on any number of ranks and workers, on any
machine and with any version of numpy: permutations sort SplitMix64 hashes instead of drawing from a
library's generator. A stream's whole state is therefore the position it has reached.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014) of uint64 values: a bijection that looks random."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def hash64(*numbers: int) -> int:
    """One uint64 from a few integers, the same everywhere."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = mix64(state + _GOLDEN + np.uint64(number & 0xFFFFFFFFFFFFFFFF))
    return int(state[0])


def permutation(n: int, *key: int) -> np.ndarray:
    """(n,) int64 permutation of 0..n-1 that depends on the integers `key` alone."""
    with np.errstate(over="ignore"):
        drawn = mix64(np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN + np.uint64(hash64(*key)))
    return np.argsort(drawn, kind="stable")


class Cache:
    """The last few results of a pure function."""

    def __init__(self, function: Callable, size: int):
        self.function, self.size = function, size
        self.kept: OrderedDict[tuple, Any] = OrderedDict()

    def __call__(self, *key: int) -> Any:
        if key in self.kept:
            self.kept.move_to_end(key)
        else:
            self.kept[key] = self.function(*key)
            if len(self.kept) > self.size:
                self.kept.popitem(last=False)
        return self.kept[key]


class Order:
    """Position -> sample number of one source, for ever: an epoch follows the other.

    In every epoch the shards come in a new order, and samples change places within windows of
    `window` neighbouring positions of that order (windows may span shards), so a reader touches few
    shards at a time. Without `shuffle` each epoch is the manifest's own order.
    """

    def __init__(
        self,
        chosen: np.ndarray,
        starts: np.ndarray,
        *,
        seed: int,
        window: int,
        shuffle: bool = True,
    ):
        """`chosen` (n,): ascending sample numbers; `starts` (shards + 1,): first sample a shard."""
        if window < 1:
            raise ValueError(f"data.shuffle_window={window} must be at least 1")
        self.chosen, self.seed, self.window, self.shuffle = chosen, seed, window, shuffle
        self.num_samples = len(chosen)
        self.firsts = np.searchsorted(chosen, starts)  # per shard: its first row of `chosen`
        self._shards = Cache(self._shard_order, 2)
        self._window = Cache(self._window_order, 4)

    def sample_at(self, position: int) -> int:
        """Sample number at a position of the endless stream."""
        epoch, place = divmod(position, self.num_samples)
        if not self.shuffle:
            return int(self.chosen[place])
        window, inside = divmod(place, self.window)
        return int(self._window(epoch, window)[inside])

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards of the position's window and the next one, in the order in which they come."""
        epoch, place = divmod(position, self.num_samples)
        first = place - place % self.window
        last = min(first + 2 * self.window, self.num_samples) - 1
        if self.shuffle:
            order, ends = self._shards(epoch)
        else:
            order, ends = np.arange(len(self.firsts) - 1), self.firsts[1:]
        slots = np.searchsorted(ends, [first, last], side="right")
        shards = order[slots[0] : slots[1] + 1]
        return [int(s) for s in shards if self.firsts[s] < self.firsts[s + 1]]

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order, and the position after each one's last sample."""
        order = permutation(len(self.firsts) - 1, self.seed, epoch, 1)
        return order, np.cumsum(np.diff(self.firsts)[order])

    def _window_order(self, epoch: int, window: int) -> np.ndarray:
        """(<= window,) sample numbers of one window, shuffled."""
        order, ends = self._shards(epoch)
        first = window * self.window
        places = np.arange(first, min(first + self.window, self.num_samples))
        slot = np.searchsorted(ends, places, side="right")
        shard = order[slot]
        begins = ends[slot] - (self.firsts[shard + 1] - self.firsts[shard])
        samples = self.chosen[self.firsts[shard] + places - begins]
        return samples[permutation(len(places), self.seed, epoch, 2, window)]


class Mixture:
    """Position of the mixed stream -> (source, position in that source), by weight.

    Every block of `BLOCK` positions holds the same whole number of samples of each source, in an
    order drawn from the block's number, so counts follow the weights exactly and a source's own
    position is a closed form. With `span` > 1 that many neighbouring positions share a source.
    """

    BLOCK = 1024

    def __init__(self, weights: list[float], *, seed: int, span: int = 1):
        if not weights or any(not w > 0 for w in weights):
            raise ValueError(f"data.streams.*.weight={weights} must all be above zero")
        if len(weights) > self.BLOCK:
            raise ValueError(
                f"{len(weights)} streams are more than {self.BLOCK}; merge some manifests"
            )
        self.seed, self.span = seed, span
        self.slots = apportion(weights, self.BLOCK)
        self._block = Cache(self._draw, 4)

    def at(self, position: int) -> tuple[int, int]:
        """(source, position in the source)."""
        unit, inside = divmod(position, self.span)
        block, slot = divmod(unit, self.BLOCK)
        source_of, rank_of = self._block(block)
        source = int(source_of[slot])
        return source, (block * self.slots[source] + int(rank_of[slot])) * self.span + inside

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each slot of a block: its source, and how many earlier slots have the same one."""
        table = np.repeat(np.arange(len(self.slots)), self.slots)
        source_of = table[permutation(self.BLOCK, self.seed, 3, block)]
        rank_of = np.empty(self.BLOCK, np.int64)
        for source, count in enumerate(self.slots):
            rank_of[source_of == source] = np.arange(count)
        return source_of, rank_of


def apportion(weights: list[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, as near to the weights as they go, none below 1."""
    share = np.array(weights, dtype=np.float64) / sum(weights) * total
    counts = np.maximum(np.floor(share).astype(int), 1)
    while counts.sum() < total:
        counts[np.argmax(share - counts)] += 1
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 1, counts - share, -np.inf))] -= 1
    return counts.tolist()
