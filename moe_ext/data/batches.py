"""Samples become Batches; a loader whose whole state is a cursor into the global stream.

Micro-batch t of all ranks together is the next `sequences_per_rank * world_size` rows; rank r owns
the r-th run of them, worker w the micro-batches w, w + W, ... Nothing of that is in the state, so a
run continues with any other number of ranks and workers.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..batch import IGNORED_LABEL, TEXT, Batch
from .rows import Cursor, Rows, SingleRows
from .samples import Sample
from .shards import BadSample, RawSample

log = logging.getLogger(__name__)


class Stream(Protocol):
    """`ShardStream` or `MixedStream`."""

    @property
    def identity(self) -> str: ...

    def raw(self, position: int) -> RawSample: ...


class Builder(Protocol):
    """`SampleBuilder`."""

    pad_id: int

    def __call__(self, raw: RawSample) -> Sample: ...

    def blank(self, key: str) -> Sample: ...


@dataclass(frozen=True)
class Skip:
    """A sample that was left out; its position kept its place with weight zero."""

    position: int
    key: str
    reason: str


class TooManyBadSamples(RuntimeError):
    """More samples were unusable than `data.bad_sample_budget` allows."""

    def __init__(self, count: int, budget: int, last: Skip):
        super().__init__(
            f"{count} samples could not be used, above data.bad_sample_budget={budget}; the last, at "
            f"position {last.position}: {last.key}: {last.reason}. Mend the shards (`moe-ext shards "
            "check` names what is wrong) or raise the budget"
        )
        self.count, self.budget, self.last = count, budget, last

    def __reduce__(self):
        return TooManyBadSamples, (self.count, self.budget, self.last)


@dataclass
class Load:
    """What a worker hands over: a batch, the cursor behind it, and what went wrong on the way."""

    batch: Batch
    cursor: Cursor
    skips: list[Skip] = field(default_factory=list)
    num_truncated: int = 0

    def pin_memory(self) -> "Load":
        """The same with its batch in page-locked memory; called by a DataLoader that pins."""
        return replace(self, batch=self.batch.pin_memory())


def collate(
    rows: list[list[Sample]], *, pad_id: int, length: int | None = None, multiple: int = 8
) -> Batch:
    """One Batch, each row's samples end to end as segments 1, 2, ..., right-padded.

    S is `length`, or the longest row rounded up to a multiple of `multiple`. Raises ValueError when
    a row is longer than `length`.
    """
    longest = max(sum(len(s) for s in row) for row in rows)
    S = length if length is not None else -(-longest // multiple) * multiple
    if longest > S:
        raise ValueError(f"a row of {longest} tokens does not fit sequence_length={S}")
    B = len(rows)
    batch = Batch(
        input_ids=torch.full((B, S), pad_id),
        labels=torch.full((B, S), IGNORED_LABEL),
        modality_ids=torch.full((B, S), TEXT),
        segment_ids=torch.zeros(B, S, dtype=torch.long),
        position_ids=torch.zeros(B, S, dtype=torch.long),
    )
    media: dict[int, list] = {}
    for b, row in enumerate(rows):
        at = 0
        for segment, sample in enumerate(row, start=1):
            n = len(sample)
            span = slice(at, at + n)
            batch.input_ids[b, span] = sample.input_ids
            batch.labels[b, span] = sample.labels
            batch.modality_ids[b, span] = sample.modality_ids
            batch.segment_ids[b, span] = segment
            batch.position_ids[b, span] = torch.arange(n)
            batch.sample_keys.append(sample.key)
            for modality, item in sample.media:
                media.setdefault(modality, []).append(item)
            at += n
    batch.media = {modality: torch.stack(items) for modality, items in media.items()}
    return batch


class BatchStream(IterableDataset):
    """The endless micro-batches of one rank, as `Load`s, from a cursor on: data for any DataLoader.

    Workers of a DataLoader (`batch_size=None`) divide the micro-batches among themselves, in turn,
    so the loader gives them in order.
    """

    def __init__(
        self,
        stream: Stream,
        build: Builder,
        *,
        sequences_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        rows: Rows | None = None,
        length: int | None = None,
    ):
        """`length`: fixed S of every batch (needed with packing); None pads to the longest row."""
        if not 0 <= rank < world_size or sequences_per_rank < 1:
            raise ValueError(
                f"rank {rank} of {world_size} with {sequences_per_rank} sequences: rank must be below "
                "world_size, stages.*.sequences_per_rank at least 1"
            )
        self.stream, self.build = stream, build
        self.sequences_per_rank, self.rank, self.world_size = sequences_per_rank, rank, world_size
        self.rows, self.length = rows or SingleRows(), length
        self.cursor = Cursor()

    @property
    def identity(self) -> str:
        """What must be equal for a cursor to mean the same samples again."""
        return f"{self.stream.identity}|{self.rows.identity}"

    def __iter__(self) -> Iterator[Load]:
        worker = get_worker_info()
        index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        per_step = self.sequences_per_rank * self.world_size
        cursor = self.rows.advance(self.cursor, index * per_step)
        while True:
            yield self.load(cursor)
            cursor = self.rows.advance(cursor, num_workers * per_step)

    def load(self, cursor: Cursor) -> Load:
        """This rank's micro-batch at a cursor; a pure function of it."""
        per_step = self.sequences_per_rank * self.world_size
        skips: list[Skip] = []
        rows = [
            [self._sample(position, skips) for position in positions]
            for positions in self.rows.take(
                cursor, self.rank * self.sequences_per_rank, self.sequences_per_rank
            )
        ]
        batch = collate(rows, pad_id=self.build.pad_id, length=self.length)
        truncated = sum(sample.truncated for row in rows for sample in row)
        return Load(batch, self.rows.advance(cursor, per_step), skips, truncated)

    def _sample(self, position: int, skips: list[Skip]) -> Sample:
        try:
            sample = self.build(self.stream.raw(position))
            room = self.rows.room(position)
            if room is not None and len(sample) > room:
                raise BadSample(
                    sample.key, f"has {len(sample)} tokens, {room} planned; measure lengths anew"
                )
            return sample
        except BadSample as error:
            skips.append(Skip(position, error.key, error.reason))
            return self.build.blank(error.key)


def leave_signals_to_the_rank(worker: int) -> None:
    """In a worker: act on no request to stop but its own rank's.

    Launchers and Slurm signal a rank's whole process tree; a worker that died of it would break the
    step that the rank wants to end in order. The rank itself ends its workers by SIGTERM when it leaves,
    and waits for them, so who sent a signal matters: a thread reads that, a handler could not.
    """
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_the_rank() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=obey_the_rank, name="stop requests", daemon=True).start()


class Loader:
    """Endless Batches of one rank, with workers ahead of it and a state that fits any topology.

    Attributes:
        wait_s: seconds that the last batch was waited for.
        num_truncated: samples cut to the length limit so far.
        num_tokens, num_positions: real tokens and all positions of the batches so far.
        skips: samples left out so far: those of the restored state, which are all ranks', and then
            this rank's own.
        num_restored: how many of them came with the state.
    """

    def __init__(
        self,
        stream: Stream,
        build: Builder,
        *,
        sequences_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        rows: Rows | None = None,
        length: int | None = None,
        bad_sample_budget: int = 100,
        stop_alone: bool = True,
        prefetch: int = 2,
        start_method: str = "fork",
    ):
        """Nothing is opened yet.

        Args:
            bad_sample_budget: samples that may be left out.
            stop_alone: raise when this rank alone has met more. False leaves it to the caller to sum
                `num_new_skips` over ranks and to ask `over_budget`, so that all ranks stop alike.
            prefetch: micro-batches ahead, a worker.
            start_method: of workers, fork or spawn.
        """
        self.batches = BatchStream(
            stream,
            build,
            sequences_per_rank=sequences_per_rank,
            rank=rank,
            world_size=world_size,
            rows=rows,
            length=length,
        )
        self.num_workers, self.prefetch, self.start_method = num_workers, prefetch, start_method
        self.bad_sample_budget, self.stop_alone = bad_sample_budget, stop_alone
        self.cursor = Cursor()
        self.skips: list[Skip] = []
        self.num_restored = 0
        self.num_truncated, self.wait_s = 0, 0.0
        self.num_tokens, self.num_positions = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current cursor on, for ever.

        Raises:
            TooManyBadSamples: more than `data.bad_sample_budget` were left out (with `stop_alone`).
        """
        self.batches.cursor = self.cursor
        options: dict[str, Any] = {}
        if self.num_workers:
            options = {
                "prefetch_factor": self.prefetch,
                "multiprocessing_context": self.start_method,
                "worker_init_fn": leave_signals_to_the_rank,
            }
        loads = iter(
            DataLoader(
                self.batches,
                batch_size=None,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else it draws from the global one and shifts training
                **options,
            )
        )
        while True:
            began = time.perf_counter()
            load = next(loads)
            self.wait_s = time.perf_counter() - began
            # the state moves when the batch is handed over: what workers hold ahead is not consumed
            self.cursor = load.cursor
            self.num_truncated += load.num_truncated
            self.num_tokens += load.batch.num_tokens
            self.num_positions += load.batch.input_ids.numel()
            self._note(load.skips)
            yield load.batch

    def _note(self, skips: list[Skip]) -> None:
        for skip in skips:
            self.skips.append(skip)
            log.warning(
                "skipped sample at position %d, %s: %s", skip.position, skip.key, skip.reason
            )
        if self.stop_alone and self.over_budget(self.num_new_skips):
            raise TooManyBadSamples(len(self.skips), self.bad_sample_budget, self.skips[-1])

    @property
    def num_new_skips(self) -> int:
        """Samples that this rank has left out since it started or was restored."""
        return len(self.skips) - self.num_restored

    def over_budget(self, num_new_skips: int) -> bool:
        """Whether the restored log and so many new skips, of all ranks, are more than the budget."""
        return self.num_restored + num_new_skips > self.bad_sample_budget

    def state_dict(self) -> dict:
        """Cursor, stream identity and skip log; of JSON types. Equal on all ranks but for the log."""
        return {
            "position": self.cursor.position,
            "row": self.cursor.row,
            "stream": self.batches.identity,
            "skips": [[s.position, s.key, s.reason] for s in self.skips],
        }

    def load_state_dict(self, state: dict, *, same_stream: bool = True) -> None:
        """Continues where a state was taken, on any number of ranks and workers.

        Takes effect at the next `iter()`. Raises ValueError when the state belongs to another
        stream (other shards, split, seed, window or weights), unless `same_stream` is False.
        """
        ours = self.batches.identity
        if same_stream and state["stream"] != ours:
            raise ValueError(
                f"the checkpoint's data position belongs to stream {state['stream']!r}, this run reads "
                f"{ours!r}: its positions mean other samples. Restore data.streams, data.shuffle_window "
                "and seed, or start the stage anew"
            )
        self.cursor = Cursor(int(state["position"]), int(state["row"]))
        self.skips = [Skip(int(p), k, r) for p, k, r in state["skips"]]
        self.num_restored = len(self.skips)


def merge_states(states: list[dict]) -> dict:
    """One state of all ranks' states: the same cursor, the union of their skip logs."""
    places = {(s["position"], s["row"], s["stream"]) for s in states}
    if len(places) != 1:
        raise ValueError(f"ranks stand at different places of the stream: {sorted(places)}")
    skips = {tuple(skip) for state in states for skip in state["skips"]}
    return {**states[0], "skips": [list(skip) for skip in sorted(skips)]}
