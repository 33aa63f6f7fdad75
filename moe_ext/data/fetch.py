"""Shards from http(s) and S3: retried, resumed where they broke off, checked, kept in a local cache.

A shard becomes a local file before anything reads it, so that reading is one `pread` and damage is
known before the first sample. Processes of a machine share the cache; one downloads, others wait.
Every wait is bounded: a server that stalls, trickles or fails ends in a `ShardError`, never a hang.
"""

import contextlib
import hashlib
import http.client
import logging
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .local import LocalFiles, file_lock
from .manifest import Shard, file_sha256, is_remote
from .s3 import S3Access
from .shards import ShardError, local_path, open_stream

log = logging.getLogger(__name__)

_CHUNK = 1 << 18
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Transient(Exception):
    """A failure that another try may cure; `wait_s` is the server's own wish."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass
class Fetcher:
    """url -> path of a whole, checked local file. Picklable; threads start on first use."""

    cache_dir: str | Path
    limit_bytes: int = 0
    """Size that the cache is kept under, least recently used files first; 0: no limit."""
    timeout_s: float = 30.0
    """Longest silence of a server, and of a download without `least_bytes_per_s`."""
    least_bytes_per_s: float = 1024.0
    tries: int = 6
    """Tries in a row that bring less than 256 KiB each before a shard is given up."""
    backoff_s: float = 0.5
    """Wait before the second try; doubled each time, up to 30 s."""
    ahead: int = 2
    """Shards downloaded at a time in the background before they are needed; 0: none."""
    verify_local: bool = True
    """Check the hash of a local shard, too, when the processes that share the cache first read it."""
    s3: S3Access = field(default_factory=S3Access)

    def __post_init__(self) -> None:
        self.local = LocalFiles(Path(self.cache_dir) / "checked") if self.verify_local else None
        self._forget_threads()

    def _forget_threads(self) -> None:
        self.process = os.getpid()
        self.queue: queue.SimpleQueue[tuple[str, Shard]] = queue.SimpleQueue()
        self.pending: set[str] = set()
        self.num_threads = 0

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("queue", "pending")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_threads()

    def __call__(self, url: str, shard: Shard | None = None) -> str:
        """Path of the file at `url`; what `shard` says of size and hash is checked at first.

        Raises:
            ShardError: it cannot be had, or is not what `shard` says, after all tries.
        """
        if not is_remote(url):
            return self.local(url, shard) if self.local else local_path(url)
        path = self.path_of(url)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # last used: now
            return str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path):
            if not path.exists():
                self._download(url, shard, path)
        self._evict(keep=path)
        return str(path)

    def expect(self, shards: list[tuple[str, Shard]]) -> None:
        """Starts to fetch, or check, what will be needed soon; failures show when it is needed."""
        if self.process != os.getpid():
            self._forget_threads()  # they stayed in the parent when a worker was forked
        for url, shard in shards:
            if url in self.pending or self._is_ready(url, shard):
                continue
            self.pending.add(url)
            self.queue.put((url, shard))
            if self.num_threads < self.ahead:
                self.num_threads += 1
                # daemons: a process that ends does not wait for downloads
                threading.Thread(target=self._fetch_ahead, daemon=True).start()

    def _is_ready(self, url: str, shard: Shard) -> bool:
        if is_remote(url):
            return self.path_of(url).exists()
        with contextlib.suppress(OSError):  # a missing file is named when it is needed
            return self.local is None or self.local.knows(local_path(url), shard)
        return True

    def read(self, url: str) -> bytes:
        """A small file whole, uncached: a manifest or its index.

        Raises:
            FileNotFoundError: it is not there. ShardError: it cannot be had.
        """
        if not is_remote(url):
            return Path(local_path(url)).read_bytes()
        data = bytearray()

        def sink(chunk: bytes, start: int) -> None:
            del data[start:]
            data.extend(chunk)

        self._with_retries(url, lambda: len(data), sink, None)
        return bytes(data)

    def path_of(self, url: str) -> Path:
        """Where the cache keeps a url: its hash tells equal names of different places apart."""
        digest = hashlib.sha256(url.encode()).hexdigest()[:20]
        return (
            Path(self.cache_dir) / digest[:2] / f"{digest}-{os.path.basename(urlsplit(url).path)}"
        )

    # ---- one file

    def _fetch_ahead(self) -> None:
        while True:
            url, shard = self.queue.get()
            try:
                self(url, shard)
            except OSError as error:
                log.info("fetching ahead failed: %s", error)
            finally:
                self.pending.discard(url)

    def _download(self, url: str, shard: Shard | None, path: Path) -> None:
        """Fills `path` by way of a .part file, which a later try, or a later run, continues."""
        part = path.with_name(path.name + ".part")
        size = shard.size_bytes if shard else None
        for fresh in (False, True):
            if (
                fresh or shard is None
            ):  # without a hash nobody could tell an old part from this file's
                part.unlink(missing_ok=True)
            with open(part, "ab") as f:

                def sink(chunk: bytes, start: int, f: Any = f) -> None:
                    if start != f.tell():  # the server began anew, or the .part was too long
                        f.truncate(start)
                        f.seek(start)
                    f.write(chunk)

                self._with_retries(url, f.tell, sink, size)
                f.flush()
                os.fsync(f.fileno())
            if shard is None:
                break
            digest = file_sha256(part)
            if digest == shard.sha256:
                break
            log.warning(
                "%s: SHA-256 %s..., the manifest says %s...", url, digest[:12], shard.sha256[:12]
            )
        else:
            part.unlink(missing_ok=True)
            raise ShardError(f"{url}: twice fetched whole, but its SHA-256 is not the manifest's")
        os.replace(part, path)

    def _with_retries(self, url: str, have: Any, sink: Any, size: int | None) -> None:
        """Calls `sink(chunk, start)` until the file is whole; `have()` is how much of it is here."""
        failures, reason = 0, ""
        while failures < self.tries:
            before = have()
            wait_s = 0.0
            try:
                if self._transfer(url, before, have, sink, size):
                    return
                reason = f"ended after {have()} bytes"
            except Transient as error:
                reason, wait_s = str(error), error.wait_s
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, ShardError | FileNotFoundError):
                    raise
                reason = f"{type(error).__name__}: {error}"
            # a trickle is no progress: the whole wait for a shard stays bounded
            failures = 0 if have() - before >= _CHUNK else failures + 1
            log.warning("%s: %s; at byte %d, failed try %d", url, reason, have(), failures)
            if failures < self.tries:
                time.sleep(min(max(self.backoff_s * 2 ** max(failures - 1, 0), wait_s), 30.0))
        raise ShardError(f"{url}: {reason}; gave up after {self.tries} tries")

    def _transfer(self, url: str, start: int, have: Any, sink: Any, size: int | None) -> bool:
        """One request from byte `start` on; True when the file is whole."""
        if size is not None and start > size:
            start = 0
        if size is not None and start == size:
            return True
        began, got = time.monotonic(), 0
        with self._open(url, start) as response:
            at, total = _extent(response, start)
            if size is not None and total is not None and total != size:
                raise Transient(f"has {total} bytes, its manifest says {size}")
            # read1: what has come, at once; read waits for all 256 kB and loses them on a time-out
            read = getattr(response, "read1", response.read)
            while chunk := read(_CHUNK):
                sink(chunk, at)
                at += len(chunk)
                got += len(chunk)
                seconds = time.monotonic() - began
                if seconds > self.timeout_s and got < self.least_bytes_per_s * seconds:
                    raise Transient(f"only {got / seconds:.0f} bytes a second")
            expected = size if size is not None else total
            if at == 0:
                sink(b"", 0)
            return at == expected if expected is not None else True

    def _open(self, url: str, start: int) -> Any:
        headers = {"Range": f"bytes={start}-"} if start else {}
        named = url
        if url.startswith("s3://"):
            url, headers = self.s3.request(url, headers)
        elif not url.startswith(("http://", "https://")):
            if start:
                raise Transient("this kind of url cannot be resumed")
            return contextlib.closing(
                open_stream(url)
            )  # webdataset's own openers: gs, hf, pipe, ...
        request = urllib.request.Request(url, headers={"User-Agent": "moe_ext", **headers})
        try:
            return urllib.request.urlopen(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _RETRIED:
                after = error.headers.get("Retry-After", "")
                raise Transient(
                    f"HTTP {error.code}", float(after) if after.isdigit() else 0.0
                ) from None
            if error.code == 416:  # the .part is longer than the file: begin anew
                raise ShardError(f"{named}: shorter than the part already here") from None
            if error.code == 404:
                raise FileNotFoundError(f"{named}: HTTP 404, not found") from None
            raise ShardError(f"{named}: HTTP {error.code} {error.reason}") from None

    def _evict(self, keep: Path) -> None:
        """Removes least recently used files until the cache is within its limit."""
        if not self.limit_bytes:
            return
        with file_lock(Path(self.cache_dir) / "cache"):
            files = []
            for path in Path(self.cache_dir).glob("??/*"):
                if path.suffix not in (".lock", ".part"):
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        files.append((stat.st_mtime_ns, stat.st_size, path))
            used = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if used <= self.limit_bytes:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)  # readers that have it open keep their bytes
                    used -= size


def _extent(response: Any, start: int) -> tuple[int, int | None]:
    """(first byte of this answer, bytes of the whole file or None if the server does not say)."""
    headers = getattr(response, "headers", None)
    if headers is None:
        return 0, None
    stated = headers.get("Content-Range", "")
    if getattr(response, "status", 200) == 206 and stated.startswith("bytes "):
        span, _, total = stated[6:].partition("/")
        return int(span.partition("-")[0]), int(total) if total.isdigit() else None
    length = headers.get("Content-Length")
    return 0, int(length) if length and length.isdigit() else None
