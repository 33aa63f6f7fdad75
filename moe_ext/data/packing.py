"""Several samples share a row: planned from token lengths, as a function of stream position.

The stream is cut into windows of consecutive positions; each window's samples are packed by
best-fit decreasing, and the rows come in a shuffled order. The plan needs lengths alone, so every
rank and worker makes the same one without talking, and a cursor is a window and a row in it.
"""

import bisect
import hashlib
import logging
from pathlib import Path

import numpy as np

from .local import LocalFiles
from .manifest import Manifest, atomic_file
from .order import Cache, permutation
from .rows import Cursor
from .samples import SampleBuilder
from .shards import BadSample, Local, ShardFiles
from .streams import MixedStream, ShardStream

log = logging.getLogger(__name__)


class PackedRows:
    """Rows of at most `length` tokens, each several whole samples."""

    def __init__(
        self,
        stream: ShardStream | MixedStream,
        build: SampleBuilder,
        *,
        length: int,
        window: int = 1024,
        seed: int = 0,
    ):
        """`length`: tokens of a row, at least the builder's `max_length`; `window`: samples planned at once.

        Raises:
            ValueError: a sample may be longer than a row.
            ManifestError: token lengths of this builder have not been measured.
        """
        if build.max_length > length:
            raise ValueError(
                f"data.max_length={build.max_length} is above data.sequence_length={length}: a sample "
                "would not fit into a row; lower the first or raise the second"
            )
        self.stream, self.length, self.window, self.seed = stream, length, window, seed
        self.fingerprint = build.fingerprint
        sources = stream.streams if isinstance(stream, MixedStream) else [stream]
        self.length_of = {s.name: s.manifest.lengths(self.fingerprint) for s in sources}
        digest = hashlib.sha256()
        for length_N in self.length_of.values():
            digest.update(np.ascontiguousarray(length_N, np.int32).tobytes())
        self.lengths_hash = digest.hexdigest()[:16]
        self._plan = Cache(self._pack, 64)

    @property
    def identity(self) -> str:
        return (
            f"packed/{self.length}/{self.window}/{self.seed}/{self.fingerprint}/{self.lengths_hash}"
        )

    def room(self, position: int) -> int:
        """Tokens planned for the sample at a position; a bad one still takes one."""
        place = self.stream.place(position)
        return max(int(self.length_of[place.stream][place.sample]), 1)

    def take(self, cursor: Cursor, skip: int, count: int) -> list[list[int]]:
        at = self.advance(cursor, skip)
        rows: list[list[int]] = []
        while len(rows) < count:
            new = self._plan(at.position)[at.row : at.row + count - len(rows)]
            rows += new
            at = self.advance(at, len(new))
        return rows

    def advance(self, cursor: Cursor, count: int) -> Cursor:
        position, row = cursor.position, cursor.row + count
        while row >= (rows := len(self._plan(position))):
            position, row = position + self.window, row - rows
        return Cursor(position, row)

    def _pack(self, first: int) -> list[list[int]]:
        """Rows (stream positions, ascending) of the window that starts at a position."""
        positions = range(first, first + self.window)
        rows = best_fit([self.room(position) for position in positions], self.length)
        order = permutation(len(rows), self.seed, 4, first)
        return [[first + i for i in rows[r]] for r in order]


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Items grouped into few bins of `room`: longest first, each into the fullest bin it fits."""
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    bins: list[list[int]] = []
    for i in np.argsort(-np.array(lengths), kind="stable").tolist():
        at = bisect.bisect_left(free, (lengths[i], -1))
        if at == len(free):
            left, target = room, len(bins)
            bins.append([])
        else:
            left, target = free.pop(at)
        bins[target].append(i)
        bisect.insort(free, (left - lengths[i], target))
    return [sorted(members) for members in bins]


def measure_lengths(
    manifest: Manifest | str | Path, build: SampleBuilder, *, local: Local | None = None
) -> Path:
    """Path of the file with the token length of every sample, measured now unless it is there.

    Reads every shard once, by `local` (a `Fetcher`, for remote ones). A sample that cannot be used
    counts as 0 tokens; how many there were is logged.

    Raises:
        ManifestError: the manifest is remote and was loaded without `lengths_dir`.
    """
    manifest = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
    path = manifest.lengths_path(build.fingerprint)
    if path.exists():
        return path
    files = ShardFiles(manifest, local=local or LocalFiles())
    length_N = np.zeros(manifest.num_samples, np.int32)
    bad: list[BadSample] = []
    for sample in range(manifest.num_samples):
        try:
            length_N[sample] = build.count_tokens(files.read(sample))
        except BadSample as error:  # the loader will meet it again, and name it
            bad.append(error)
    if bad:
        log.warning(
            "%d samples of %s could not be measured, the first: %s; once they are mended, remove %s",
            len(bad), manifest.name, bad[0], path,
        )  # fmt: skip
    with atomic_file(path) as f:
        np.save(f, length_N, allow_pickle=False)
    return path
