"""Webdataset shards with an index: write them, index them, read any sample with one read.

webdataset writes the tars, groups members into samples and reads unusual headers; what it lacks is
added here: an index of offsets, so that any sample is one read away, and checks that name what is
wrong with a shard. The order of samples is in `order.py`, streams of them in `streams.py`.
"""

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator
from webdataset.writer import ShardWriter, TarWriter

from .manifest import Manifest, Shard, atomic_file, file_sha256, is_remote

RawSample = dict[str, Any]
"""Member suffix ("png", "json") -> bytes, plus `__key__` (str) and `__url__` (str)."""

_BLOCK = 512


def local_path(url: str, shard: Shard | None = None) -> str:
    """The path of a local shard. Remote ones need a `Fetcher`, which is called the same way.

    Raises:
        ShardError: the url is remote.
    """
    if url.startswith("file:"):
        return url2pathname(urlsplit(url).path)
    if "://" in url or url.startswith("pipe:"):
        raise ShardError(
            f"{url} is not a local file; give the stream a Fetcher (moe_ext.data.fetch)"
        )
    return url


Local = Callable[..., str]
"""(url, what the manifest says of it) -> path of a readable file: `local_path`, or a `Fetcher`."""


def open_stream(url: str) -> Any:
    """webdataset's own opener of a url (gs, hf, ais, ...), for reading.

    Raises:
        ShardError: of a kind that can run commands; a manifest may come from anywhere.
    """
    scheme = urlsplit(url).scheme
    if scheme not in ("gs", "hf", "htgs", "ais"):
        raise ShardError(
            f"{url}: shards are read from files, http(s), s3, gs, hf and ais, not {scheme}:"
        )
    return gopen(url, "rb")


class BadSample(Exception):
    """A sample that cannot be used; its place in the stream stays, with weight zero."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self):
        return BadSample, (self.key, self.reason)


class ShardError(OSError):
    """A whole shard that is missing, cut, or not what its manifest says."""


# ---------------------------------------------------------------- writing and indexing


def write_shards(
    samples: Iterable[tuple[str, RawSample]],
    out_dir: str | Path,
    *,
    name: str = "shard",
    samples_per_shard: int = 1000,
    shard_bytes: float = 1e9,
    info: dict | None = None,
) -> Path:
    """Path of the manifest of new shards `NAME-000000.tar`, ... of (split, sample) pairs.

    Times and owners in the tars are fixed, so the same samples give the same bytes. The manifest is
    published last: without it the folder is not a data set, and a rerun, whose first act is to remove
    an earlier one, overwrites what is there.

    Raises:
        ValueError: a key repeats, or holds a dot or `..` (readers would split it elsewhere).
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / f"{name}.json").unlink(missing_ok=True)  # of other bytes than those that come now
    splits: dict[str, str] = {}
    written: list[str] = []
    writer = ShardWriter(
        str(out_dir / f"{name}-%06d.tar"),
        maxcount=samples_per_shard,
        maxsize=shard_bytes,
        verbose=0,
        mtime=0,
        encoder=False,
        user="",
        group="",
        post=written.append,
    )
    with writer:
        for split, sample in samples:
            key = str(sample["__key__"])
            if key in splits or "." in key.rsplit("/", 1)[-1] or ".." in key.split("/"):
                raise ValueError(
                    f"sample key {key!r} repeats or holds a dot; give every sample its own"
                )
            splits[key] = split
            writer.write(sample)
            writer.tarstream.tarstream.members = []  # tarfile keeps every header otherwise
    for path in written:
        _fsync(path)
    return index_shards(
        written, out_dir / f"{name}.json", split_of=lambda key: splits[key], info=info or {}
    )


def write_tar(samples: Iterable[RawSample], path: str | Path) -> Path:
    """One tar of samples in their order, at `path` whole or not at all; same samples, same bytes."""
    with atomic_file(path) as f, TarWriter(f, mtime=0, encoder=False, user="", group="") as writer:
        for sample in samples:
            writer.write(sample)
            writer.tarstream.members = []
    return Path(path)


def index_shards(
    urls: list[str],
    manifest_path: str | Path,
    *,
    split_of: Callable[[str], str] = lambda key: "train",
    info: dict | None = None,
    local: Local = local_path,
) -> Path:
    """Path of the manifest of existing shards, each read once from end to end.

    `local(url)` gives a readable local path of a shard: a `Fetcher`, for remote ones.
    """
    manifest_path = Path(manifest_path)
    shards: list[Shard] = []
    rows: list[tuple[int, int, int]] = []
    names: dict[str, int] = {}
    for url in urls:
        path = local(url)
        before = len(rows)
        for key, offset, nbytes in index_tar(path):
            split = names.setdefault(split_of(key), len(names))
            rows.append((offset, nbytes, split))
        shown = url
        if not is_remote(url):  # below the manifest's folder: the two can move together
            here = Path(path).resolve()
            folder = manifest_path.parent.resolve()
            shown = str(here.relative_to(folder) if here.is_relative_to(folder) else here)
        shards.append(Shard(shown, os.path.getsize(path), file_sha256(path), len(rows) - before))
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    manifest = Manifest(
        shards=shards,
        offset_N=table[:, 0].copy(),
        nbytes_N=table[:, 1].copy(),
        split_N=table[:, 2].astype(np.uint8),
        split_names=list(names),
        info=info or {},
    )
    return manifest.save(manifest_path)


def index_tar(path: str | Path) -> list[tuple[str, int, int]]:
    """(key, byte offset, bytes) of every sample of a tar: webdataset's grouping, with positions.

    Raises:
        ShardError: the tar is cut, or holds something that is no tar header.
    """
    found: list[tuple[str, int, int]] = []
    end = 0
    try:
        with open(path, "rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                key, _ = base_plus_ext(member.name)
                tar.members = []  # type: ignore[attr-defined]  # else every header is kept
                if not member.isreg() or key is None or key.startswith("__"):
                    continue
                if found and found[-1][0] == key:
                    found[-1] = (key, found[-1][1], end - found[-1][1])
                else:
                    found.append((key, member.offset, end - member.offset))
            if end > os.path.getsize(path):
                raise tarfile.ReadError("its last member is cut")
            f.seek(end)
            if f.read(_BLOCK).strip(b"\0"):
                raise tarfile.ReadError(f"no tar header at byte {end}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ShardError(f"{path} is not a whole tar: {error}") from error
    return found


def _fsync(path: str) -> None:
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


# ---------------------------------------------------------------- reading one sample


def parse_sample(block: bytes, url: str) -> RawSample:
    """The sample whose tar members are the bytes `block`.

    Plain headers are read here; anything else (long names, pax records) goes to webdataset.

    Raises:
        BadSample: a header is damaged, or the members belong to different keys.
    """
    sample: RawSample = {"__url__": url}
    at = 0
    while at < len(block):
        header = block[at : at + _BLOCK]
        if len(header) < _BLOCK or header[156:157] not in b"0\0" or header[124] & 0x80:
            return _parse_with_webdataset(block, url)
        try:
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
            stated = int(header[148:156].strip(b"\0 "), 8)
            name = header[:100].rstrip(b"\0").decode()
            prefix = header[345:500].rstrip(b"\0").decode() if header[257:262] == b"ustar" else ""
        except ValueError:
            raise BadSample(url, f"damaged tar header at byte {at} of the sample") from None
        if sum(header) - sum(header[148:156]) + 256 != stated:
            raise BadSample(url, f"damaged tar header at byte {at} of the sample")
        key, suffix = base_plus_ext(f"{prefix}/{name}" if prefix else name)
        if key is not None:
            if sample.setdefault("__key__", key) != key:
                raise BadSample(str(sample["__key__"]), f"holds a member of another sample, {key}")
            sample[suffix.lower()] = block[at + _BLOCK : at + _BLOCK + size]
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
    if "__key__" not in sample:
        raise BadSample(url, "holds no named member")
    return sample


def _parse_with_webdataset(block: bytes, url: str) -> RawSample:
    try:
        files = [{**f, "__url__": url} for f in tar_file_iterator(io.BytesIO(block))]
        samples = list(group_by_keys(files))
    except Exception as error:  # webdataset and tarfile raise many kinds for damaged input
        raise BadSample(url, f"damaged tar member: {error}") from None
    if len(samples) != 1:
        raise BadSample(url, f"{len(samples)} samples where the index has one; index again")
    return samples[0]


class ShardFiles:
    """Open shards of one manifest, each checked when it is opened; at most `max_open` at a time."""

    def __init__(self, manifest: Manifest, *, local: Local = local_path, max_open: int = 64):
        self.manifest, self.local, self.max_open = manifest, local, max_open
        self.files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor
        self.broken: dict[int, str] = {}

    def read(self, sample: int) -> RawSample:
        """Sample number `sample`; one `pread`.

        Raises:
            BadSample: the sample is damaged, or its shard cannot be used at all.
        """
        shard = self.manifest.shard_of(sample)
        url = self.manifest.url(shard)
        name = f"{url}#{sample - int(self.manifest.starts[shard])}"
        try:
            fd = self._open(shard)
            nbytes = int(self.manifest.nbytes_N[sample])
            block = os.pread(fd, nbytes, int(self.manifest.offset_N[sample]))
        except OSError as error:
            raise BadSample(name, f"shard cannot be read: {error}") from None
        if len(block) < nbytes:
            raise BadSample(name, f"shard ends after {len(block)} of the sample's {nbytes} bytes")
        try:
            return parse_sample(block, url)
        except BadSample as error:
            raise BadSample(name, error.reason) from None

    def _open(self, shard: int) -> int:
        if shard in self.files:
            self.files.move_to_end(shard)
            return self.files[shard]
        if shard in self.broken:  # found once, then named without asking again
            raise ShardError(self.broken[shard])
        try:
            fd = self._open_file(shard)
            size, expected = os.fstat(fd).st_size, self.manifest.shards[shard].size_bytes
            if size != expected:
                os.close(fd)
                raise ShardError(
                    f"{self.manifest.url(shard)} has {size} bytes, its manifest says {expected}"
                )
        except OSError as error:
            self.broken[shard] = str(error)
            raise
        self.files[shard] = fd
        if len(self.files) > self.max_open:
            os.close(self.files.popitem(last=False)[1])
        return fd

    def _open_file(self, shard: int) -> int:
        url, entry = self.manifest.url(shard), self.manifest.shards[shard]
        try:
            return os.open(self.local(url, entry), os.O_RDONLY)
        except FileNotFoundError:  # another process may have evicted it from the cache just now
            return os.open(self.local(url, entry), os.O_RDONLY)

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])

    def __del__(self):
        self.close()

    def __getstate__(self):  # file descriptors do not survive pickling (spawned workers)
        return {**self.__dict__, "files": OrderedDict()}
