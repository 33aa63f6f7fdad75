"""Local shards, checked once: what their manifest says of their bytes must be true before they are read."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .manifest import Shard, atomic_file, file_sha256
from .shards import ShardError, local_path


class LocalFiles:
    """url -> path of a local shard whose SHA-256 is the manifest's. Picklable.

    A shard is read from end to end the first time it is asked for, and again after it changed (size,
    time of change or inode). With a `memory` folder the processes that share it, and later runs, ask
    each other: a machine then reads a shard once. A wrong size is left to the reader, who names it.
    """

    def __init__(self, memory: str | Path = ""):
        self.memory = str(memory)
        self.sound: dict[str, str] = {}  # path -> what it was when it was found right

    def __call__(self, url: str, shard: Shard | None = None) -> str:
        """Path of the file at `url`.

        Raises:
            ShardError: the url is remote, or the file's hash is not the manifest's, read twice.
            FileNotFoundError: it is not there.
        """
        path = local_path(url)
        if shard is None or self.knows(path, shard):
            return path
        if os.path.getsize(path) != shard.size_bytes:
            return path
        if self.memory and not _writable(Path(self.memory)):
            self.memory = ""  # a read-only cache is no fault of the shard
        with file_lock(self._note(path)) if self.memory else contextlib.nullcontext():
            if self.knows(path, shard):  # another process has read it meanwhile
                return path
            seen = _stamp(path, shard)
            for _ in range(2):  # a network's file system may err once
                digest = file_sha256(path)
                if digest == shard.sha256:
                    break
            else:
                raise ShardError(
                    f"{path}: its SHA-256 is {digest[:12]}..., its manifest says {shard.sha256[:12]}...; "
                    "write it anew, or index it again if it was changed on purpose"
                )
            self.sound[path] = seen
            if self.memory:
                with atomic_file(self._note(path)) as f:
                    f.write(seen.encode())
        return path

    def knows(self, path: str, shard: Shard) -> bool:
        """Whether the file, as it is now, was found right before."""
        seen = _stamp(path, shard)
        if self.sound.get(path) == seen:
            return True
        if self.memory:
            with contextlib.suppress(OSError):
                if self._note(path).read_text() == seen:
                    self.sound[path] = seen
                    return True
        return False

    def _note(self, path: str) -> Path:
        digest = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:20]
        return Path(self.memory) / digest[:2] / digest


def _writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    return False


def _stamp(path: str, shard: Shard) -> str:
    stat = os.stat(path)
    return f"{shard.sha256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Held by one thread of one process of this machine; a killed holder's lock is free again."""
    lock = path.with_name(path.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)
