"""Writing checkpoints beside training: whole or not at all, and no step waits longer than for a copy.

`Publisher.start` copies a snapshot into host memory and returns; a thread of every rank then writes
and syncs its file into a hidden folder. Once a step the loop adds up whose thread is done (`vote`,
one more number in a sum that it takes anyway). When all are, the ranks exchange what they wrote, and
a thread of rank 0 writes the manifest and publishes by one rename; a failure on any rank is raised on
all ranks at the same step. The threads take part in no collective, so a slow disk holds up nobody.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    Piece,
    Snapshot,
    build_manifest,
    published,
)

CHUNK_BYTES = 16 << 20
POLL_S = 0.02
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""Their names in safetensors."""

ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "raise the quota, or make room there",
    errno.EROFS: "make it writable, or move the run's folder elsewhere and give that as run_dir",
    errno.EACCES: "give this user the right to write there, or choose another run_dir",
    errno.EPERM: "give this user the right to write there, or choose another run_dir",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}


@dataclass
class Report:
    """A checkpoint that was published."""

    path: Path
    write_s: float
    """From the start to the rename, in which training went on."""
    bytes: int
    """Of all ranks' files."""


@dataclass
class _Job:
    """A snapshot on its way to a published folder; `entries` once all ranks have written."""

    partial: Path
    final: Path
    snapshot: Snapshot
    keep: int | None
    done: Callable[[Report], None] | None
    began: float = field(default_factory=time.perf_counter)
    entries: list[dict[str, Any]] | None = None


class Publisher:
    """Publishes one rank's snapshots together with the other ranks', one at a time.

    Args:
        token: equal on all ranks of this start and on no other start's: an old copy of a run that
            still lives cannot get into this one's unfinished folder.
        owning: entered on rank 0 wherever its thread decides what to remove and renames; an exception
            there (the run's folder belongs to a newer start) publishes nothing.
        device: where the ranks' votes are added up.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        token: str = "own",
        owning: Callable[[], AbstractContextManager[object]] = nullcontext,
        device: torch.device | str = "cpu",
    ):
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._token, self._owning = token, owning
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Any, str] = (None, "")
        self._buffers: dict[str, Tensor] = {}

    # ---- what the loop calls ---------------------------------------------------------------

    def start(
        self,
        folder: Path,
        name: str,
        snapshot: Snapshot,
        *,
        keep: int | None = None,
        copy: bool = True,
        done: Callable[[Report], None] | None = None,
    ) -> None:
        """Begin to publish `folder/name`, after the one before is published. A collective then.

        Args:
            keep: afterwards only the newest so many published folders stay; None keeps all.
            copy: False for tensors that nobody changes until `wait`.
            done: called with the report when it is published, on all ranks.

        Raises:
            CheckpointError: the one before failed, on all ranks.
        """
        self.wait()
        if copy:
            snapshot = self._copied(snapshot)
        partial = folder / f".{name}.{self._token[:8]}.partial"
        self._job = _Job(partial, folder / name, snapshot, keep, done)
        self._run(self._write)

    @property
    def vote(self) -> float:
        """1.0 while this rank's share of a phase is done and the others' may not be; else 0.0."""
        return float(self._job is not None and not self._is_busy())

    def advance(self, votes: float) -> None:
        """Go on when `votes`, the sum of all ranks' `vote`, says that all are done.

        Raises:
            CheckpointError: some rank could not write, on all ranks, with that rank's reason. What
                was published before is whole.
        """
        if self._job is not None and votes >= self.world_size:
            self._next_phase(self._job)

    def wait(self) -> None:
        """Until nothing is under way, however long that takes. A collective.

        Raises:
            CheckpointError: as `advance`.
        """
        while self._job is not None:
            if self._thread is not None:
                self._thread.join(POLL_S)
            votes = torch.tensor([self.vote], device=self.device)
            if (
                self.world_size > 1
            ):  # short collectives: a dead peer is noticed, a slow disk is no error
                dist.all_reduce(votes)
            self.advance(votes.item())

    def release(self) -> None:
        """Let go of the host memory that copies are made into."""
        self._buffers.clear()

    # ---- phases ----------------------------------------------------------------------------

    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self, work: Callable[[_Job], Any]) -> None:
        job = self._job
        assert job is not None

        def body() -> None:
            try:
                self._outcome = (work(job), "")
            except BaseException as error:  # noqa: BLE001 (it is raised in `_next_phase`)
                self._outcome = (None, f"rank {self.rank}: {_reason(error, job.partial.parent)}")

        # a daemon: a rank that ends because of an error does not stay for its disk
        self._thread = threading.Thread(target=body, name="checkpoint", daemon=True)
        self._thread.start()

    def _next_phase(self, job: _Job) -> None:
        if self._thread is not None:
            self._thread.join()
        outcomes: list[Any] = [self._outcome]
        if self.world_size > 1:
            outcomes = [None] * self.world_size
            dist.all_gather_object(outcomes, self._outcome)
        self._thread, self._outcome = None, (None, "")
        errors = [error for _, error in outcomes if error]
        if errors:
            self._job = None
            if self.rank == 0:
                shutil.rmtree(job.partial, ignore_errors=True)
            raise CheckpointError(_failure(job, errors))
        if job.entries is None:
            job.entries = [entry for entry, _ in outcomes]
            if self.rank == 0:
                self._run(self._publish)
            return
        self._job = None
        sizes = [file["bytes"] for entry in job.entries for file in entry["files"].values()]
        if job.done is not None:
            job.done(Report(job.final, time.perf_counter() - job.began, sum(sizes)))

    def _write(self, job: _Job) -> dict[str, Any]:
        """In the thread: this rank's files, and what the manifest has to say about them."""
        if self.rank == 0:
            with self._owning():  # what is listed is a killed start's, and no later one's
                left = [p for p in job.partial.parent.glob(".*.partial") if p != job.partial]
            for stale in left:
                shutil.rmtree(stale, ignore_errors=True)
        job.partial.mkdir(parents=True, exist_ok=True)
        return write_rank(job.partial, job.snapshot, self.rank)

    def _publish(self, job: _Job) -> None:
        """In rank 0's thread: the manifest, then the rename that publishes, then retention."""
        assert job.entries is not None
        manifest = build_manifest(job.snapshot, job.entries, self.world_size)
        write_file(job.partial / MANIFEST, [json.dumps(manifest).encode()])
        sync_folder(job.partial)
        replaced = job.final.with_name(job.final.name + ".replaced")  # as good, until the rename
        with self._owning():
            if job.final.exists():  # the same step again, after a resume from an earlier one
                remove_published(replaced)  # of a start killed between the renames and its removal
                os.rename(job.final, replaced)
            os.rename(job.partial, job.final)
            sync_folder(job.final.parent)
            old = published(job.final.parent)[: -job.keep] if job.keep is not None else []
        for folder in (replaced, *old):
            remove_published(folder)

    # ---- the copy --------------------------------------------------------------------------

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot in host memory of its own, which the next one uses again."""
        pieces = [
            Piece(
                piece.name,
                piece.shape,
                piece.start,
                {
                    kind: self._copy(f"{piece.name}@{piece.start}.{kind}", tensor)
                    for kind, tensor in piece.tensors.items()
                },
            )
            for piece in snapshot.pieces
        ]
        own = {n: self._copy(f"rank.{n}", t) for n, t in snapshot.rank_tensors.items()}
        shared = (
            snapshot.shared if self.rank == 0 else dict.fromkeys(snapshot.shared, torch.empty(0))
        )
        shared = {n: self._copy(f"shared.{n}", t) for n, t in shared.items()}
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copies were only asked for
        return replace(snapshot, pieces=pieces, rank_tensors=own, shared=shared)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)


def publish(
    folder: Path,
    name: str,
    snapshot: Snapshot,
    rank: int = 0,
    world_size: int = 1,
    keep: int | None = None,
    owning: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Path:
    """`folder/name`, published by all ranks together and waited for. A collective; see `Publisher`."""
    publisher = Publisher(rank, world_size, owning=owning)
    publisher.start(folder, name, snapshot, keep=keep, copy=False)
    publisher.wait()
    return folder / name


# ---- files ---------------------------------------------------------------------------------


def write_rank(partial: Path, snapshot: Snapshot, rank: int) -> dict[str, Any]:
    """This rank's files, and what the manifest has to say about them."""
    files, pieces = {}, []
    tensors = {f"rank.{name}": t for name, t in snapshot.rank_tensors.items()}
    own = f"rank-{rank:05d}.safetensors"
    for piece in snapshot.pieces:
        lengths = {t.numel() for t in piece.tensors.values()}
        assert len(lengths) == 1, f"pieces of {piece.name} differ in length: {lengths}"
        for kind, tensor in piece.tensors.items():
            tensors[f"{piece.name}@{piece.start}.{kind}"] = tensor
        pieces.append(
            {
                "name": piece.name,
                "shape": list(piece.shape),
                "start": piece.start,
                "count": lengths.pop(),
                "file": own,
                "kinds": list(piece.tensors),
            }
        )
    files[own] = write_tensors(partial / own, tensors)
    if rank == 0 and snapshot.shared:
        shared = partial / "shared.safetensors"
        files[shared.name] = write_tensors(shared, snapshot.shared)
    return {"files": files, "pieces": pieces, "rank_state": snapshot.rank_state}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, synced; {"bytes", "sha256"}.

    Written from the tensors' own memory, chunk by chunk: no second copy, and Python is free for
    training while a chunk is hashed and written.
    """
    header: dict[str, Any] = {}
    # wide elements first: every tensor then begins at a multiple of its element size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterable[Any]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for at in range(0, len(flat), CHUNK_BYTES):
                yield flat[at : at + CHUNK_BYTES].data

    return write_file(path, chunks())


def write_file(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """The chunks of bytes, one after the other, synced; {"bytes", "sha256"}."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def remove_published(folder: Path) -> None:
    """Gone under its name at once, then from the disk: a removal that is killed leaves no half one."""
    if folder.is_dir():
        hidden = folder.with_name(f".{folder.name}.removed.partial")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException, folder: Path) -> str:
    """What went wrong, and what to do about it where that is known."""
    text = f"{type(error).__name__}: {error}"
    advice = ADVICE.get(error.errno or 0) if isinstance(error, OSError) else None
    if advice is None:
        return text
    at = folder
    while not at.exists() and at != at.parent:
        at = at.parent
    free = shutil.disk_usage(at).free
    return f"{text}; {advice} ({folder}, {free / 2**20:,.0f} MiB free)"


def _failure(job: _Job, errors: list[str]) -> str:
    folder = job.final.parent
    found = published(folder) or published(folder / "checkpoints")  # where a stage's result goes
    newest = found[-1].name if found else "the stage's start"
    return (
        f"checkpoint {job.final.name} was not published ({'; '.join(errors)}); what was published "
        f"before in {folder} is whole: once the cause is mended, the run goes on from {newest}"
    )
