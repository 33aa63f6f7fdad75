"""The manifest of a set of shards: what each tar holds, and where every sample starts.

A manifest is two files that travel together. `NAME.json` names the shards with size, SHA-256 and
number of samples, the splits, licence and attribution. `NAME.index.npz` holds one row a sample, in
shard order: byte offset, bytes and split. Token lengths, which depend on a tokenizer and a prompt, lie in
a third file for each way of building samples, `NAME.lengths-FINGERPRINT.npy`; those of a remote manifest
that were measured here lie in a folder of this machine's.
"""

import hashlib
import io
import json
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

FORMAT = "moe_ext.manifest/1"
ALL = "all"
"""Name of the split that every sample is in."""


def read_local(path: str) -> bytes:
    return Path(path).read_bytes()


class ManifestError(ValueError):
    """A manifest, or the index beside it, is missing, incomplete or of another format."""


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    url: str
    """As written: absolute, or relative to the manifest's own folder."""
    size_bytes: int
    sha256: str
    num_samples: int


@dataclass
class Manifest:
    """All shards of one source and one index row for each of its N samples."""

    shards: list[Shard]
    offset_N: np.ndarray
    """int64: byte of the sample's first tar header in its shard."""
    nbytes_N: np.ndarray
    """int64: bytes from there to the end of the sample's last member, padding included."""
    split_N: np.ndarray
    """uint8: row of `split_names`."""
    split_names: list[str]
    info: dict = field(default_factory=dict)
    """Licence, attribution, settings: for people, and for deciding whether a rebuild is needed."""
    base: str = ""
    """Folder or URL prefix that relative shard urls start from."""
    name: str = ""
    """File name of the manifest without its ending."""
    read_bytes: Callable[[str], bytes] = field(default=read_local, repr=False)
    lengths_dir: str = ""
    """Folder for token lengths measured here, when the manifest's own place is remote."""

    @property
    def num_samples(self) -> int:
        return len(self.offset_N)

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards + 1,) int64: number of the first sample of each shard, and the total."""
        return np.concatenate(
            [[0], np.cumsum([s.num_samples for s in self.shards], dtype=np.int64)]
        )

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what decides the order and content of samples; where shards lie is not in it."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.sha256} {shard.num_samples}\n".encode())
        digest.update(json.dumps(self.split_names).encode())
        digest.update(np.ascontiguousarray(self.split_N).tobytes())
        return digest.hexdigest()

    def shard_of(self, sample: int) -> int:
        """Row of `shards` that holds sample number `sample`."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def url(self, shard: int) -> str:
        """Path or URL of a shard, resolved against the manifest's own place."""
        return resolve(self.base, self.shards[shard].url)

    def select(self, split: str) -> np.ndarray:
        """(n,) int64 sample numbers of a split, ascending.

        Raises:
            ManifestError: there is no such split, or it is empty.
        """
        if split == ALL:
            chosen = np.arange(self.num_samples, dtype=np.int64)
        elif split in self.split_names:
            chosen = np.flatnonzero(self.split_N == self.split_names.index(split))
        else:
            raise ManifestError(
                f"split={split!r} is not in the manifest at {self.base!r}; choose one of "
                f"{[ALL, *self.split_names]} (data.streams.*.split)"
            )
        if not len(chosen):
            raise ManifestError(f"split={split!r} of the manifest at {self.base!r} holds no sample")
        return chosen

    def lengths(self, fingerprint: str) -> np.ndarray:
        """(N,) int32 tokens of every sample as the builder of that fingerprint makes it.

        Raises:
            ManifestError: nobody has measured them yet.
        """
        places = [resolve(self.base, lengths_file(self.name, fingerprint))]
        if (own := str(self.lengths_path(fingerprint))) not in places:
            places.append(own)
        for place in places:
            try:
                data = Path(place).read_bytes() if place == own else self.read_bytes(place)
                length_N = np.load(io.BytesIO(data), allow_pickle=False)
            except (OSError, ValueError):
                continue
            if length_N.shape == (self.num_samples,):
                return length_N
        raise ManifestError(
            f"data.pack=true plans from token lengths, and {' or '.join(places)} does not hold them; write it "
            "with `moe-ext shards index --tokenizer` or `measure_lengths`, or set data.pack=false"
        )

    def lengths_path(self, fingerprint: str) -> Path:
        """Where token lengths measured on this machine are kept.

        Raises:
            ManifestError: the manifest is remote and was loaded without `lengths_dir`.
        """
        if not is_remote(self.base):
            return Path(resolve(self.base, lengths_file(self.name, fingerprint)))
        if not self.lengths_dir:
            raise ManifestError(
                f"token lengths cannot be written to {self.base}; load the manifest with lengths_dir"
            )
        return Path(self.lengths_dir) / lengths_file(self.identity[:20], fingerprint)

    def save(self, path: str | Path) -> Path:
        """Writes `path` (.json) and the index beside it, each by one rename; the JSON comes last."""
        path = Path(path)
        columns = {"offset": self.offset_N, "nbytes": self.nbytes_N, "split": self.split_N}
        index = path.with_suffix(".index.npz")
        with atomic_file(index) as f:
            np.savez(f, allow_pickle=False, **columns)
        head = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "splits": self.split_names,
            "index": {"file": index.name, "sha256": file_sha256(index)},
            "info": self.info,
            "shards": [vars(s) for s in self.shards],
        }
        with atomic_file(path) as f:
            f.write(json.dumps(head, indent=1, ensure_ascii=False).encode())
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        read: Callable[[str], bytes] = read_local,
        *,
        lengths_dir: str | Path = "",
    ) -> "Manifest":
        """The manifest at a path, or at a URL that `read(url) -> bytes` can fetch.

        Raises:
            ManifestError: a file is missing, of another format, or does not match its hash.
        """
        place = str(path)
        try:
            head = json.loads(read(place))
        except FileNotFoundError:
            raise ManifestError(
                f"no manifest at {place}; write one with `moe-ext shards index` (data.streams.*.manifest)"
            ) from None
        except ValueError as error:
            raise ManifestError(f"{place} is not JSON ({error}); write it anew") from None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ManifestError(
                f"{place} is no manifest of format {FORMAT}; run `moe-ext shards index`"
            )
        base = place.rsplit("/", 1)[0] if "/" in place else "."
        blob = read(resolve(base, head["index"]["file"]))
        if hashlib.sha256(blob).hexdigest() != head["index"]["sha256"]:
            raise ManifestError(f"the index beside {place} does not match its hash; index again")
        columns = np.load(io.BytesIO(blob), allow_pickle=False)
        manifest = cls(
            shards=[Shard(**s) for s in head["shards"]],
            offset_N=columns["offset"],
            nbytes_N=columns["nbytes"],
            split_N=columns["split"],
            split_names=head["splits"],
            info=head["info"],
            base=base,
            name=place.rsplit("/", 1)[-1].removesuffix(".json"),
            read_bytes=read,
            lengths_dir=str(lengths_dir),
        )
        if not int(manifest.starts[-1]) == manifest.num_samples == head["num_samples"]:
            raise ManifestError(f"{place}: shards and index disagree on the number of samples")
        return manifest


def lengths_file(name: str, fingerprint: str) -> str:
    return f"{name}.lengths-{fingerprint}.npy"


def resolve(base: str, url: str) -> str:
    """`url` itself when it is absolute, else `url` below `base`."""
    if urlsplit(url).scheme or os.path.isabs(url):
        return url
    return posixpath.join(base, url)


def is_remote(url: str) -> bool:
    """Whether a url is not a file of this machine."""
    scheme = urlsplit(url).scheme
    return bool(scheme) and scheme != "file"


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class atomic_file:
    """`with atomic_file(path) as f`: bytes appear at `path` whole, or not at all."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed in __exit__)
        return self.file

    def __exit__(self, kind, *_):
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
