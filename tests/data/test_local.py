"""Local shards are checked once: by hash, remembered by file, shared by the processes of a machine."""

import os
import shutil
import time

import pytest

from moe_ext.data import Loader, Manifest, SampleBuilder, ShardError, ShardStream, local
from moe_ext.data.fetch import Fetcher
from moe_ext.data.local import LocalFiles
from tests.data.inputs import to_pixels


@pytest.fixture
def copy(pairs, tmp_path):
    shutil.copytree(pairs.parent, tmp_path / "copy")
    return Manifest.load(tmp_path / "copy" / pairs.name)


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read from end to end, in order."""
    names, whole = [], local.file_sha256

    def counted(path):
        names.append(os.path.basename(path))
        return whole(path)

    monkeypatch.setattr(local, "file_sha256", counted)
    return names


def flip(path: str, at: int) -> None:
    """Change one byte, and neither size nor time."""
    stat = os.stat(path)
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_wrong_bytes_of_the_right_size_are_named_and_skipped_whole(copy, tokenizer):
    """One flipped bit in a caption: no header and no image shows it, only the hash does."""
    at = open(copy.url(1), "rb").read().find(b"thing number 9") + len("thing number ")
    flip(copy.url(1), at)
    build = SampleBuilder(tokenizer, to_pixels, 4, prompt="A", max_length=64)
    stream = ShardStream(copy, split="all", seed=1, window=16)
    loader = Loader(stream, build, sequences_per_rank=10)
    keys = [k for _, batch in zip(range(6), loader, strict=False) for k in batch.sample_keys]
    bad = {s.position for s in loader.skips}
    assert len(bad) == 7 and all("SHA-256" in s.reason for s in loader.skips)
    assert all("shard-000001.tar#" in s.key for s in loader.skips)
    assert {k for i, k in enumerate(keys) if i not in bad} == {
        f"s{i:05d}" for i in range(60) if not 7 <= i < 14
    }
    unchecked = ShardStream(copy, split="all", local=local.local_path)
    assert b"thing number 8" in unchecked.files.read(9)["json"]


def test_a_shard_is_read_whole_once_and_again_when_it_changed(copy, read):
    check, entry = LocalFiles(), copy.shards[0]
    for _ in range(3):
        assert check(copy.url(0), entry) == copy.url(0)
    assert read == [entry.url]
    os.utime(copy.url(0))
    check(copy.url(0), entry)
    assert read == [entry.url] * 2
    os.utime(copy.url(0))
    flip(copy.url(0), 3)
    with pytest.raises(ShardError, match=r"shard-000000\.tar: its SHA-256 is"):
        check(copy.url(0), entry)
    assert len(read) == 4, "a wrong hash is read a second time"


def test_processes_and_later_runs_share_what_they_found(copy, read, tmp_path):
    for _ in range(3):  # each a process or a run of its own
        fetcher = Fetcher(tmp_path / "cache", ahead=0)
        stream = ShardStream(copy, split="all", shuffle=False, local=fetcher)
        assert len(list(stream.epoch())) == 60
    assert read == [shard.url for shard in copy.shards]
    os.utime(copy.url(4))
    list(ShardStream(copy, local=Fetcher(tmp_path / "cache", ahead=0)).epoch())
    assert read[9:] == [copy.shards[4].url]


def test_shards_are_checked_ahead(copy, tmp_path, read):
    fetcher = Fetcher(tmp_path / "cache", ahead=1)
    fetcher.expect([(copy.url(0), copy.shards[0])])
    deadline = time.monotonic() + 10
    while not fetcher.local.knows(copy.url(0), copy.shards[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetcher(copy.url(0), copy.shards[0]) == copy.url(0)
    assert read == [copy.shards[0].url]


def test_without_a_place_for_its_notes_it_remembers_alone(copy, tmp_path, read):
    (tmp_path / "file").write_text("not a folder")
    for _ in range(2):
        fetcher = Fetcher(tmp_path / "file" / "cache", ahead=0)
        stream = ShardStream(copy, split="all", shuffle=False, local=fetcher)
        for _ in range(2):
            assert len(list(stream.epoch())) == 60
            stream.files.close()
    assert len(read) == 2 * 9


def test_it_can_be_switched_off(copy, tmp_path, read):
    flip(copy.url(0), 512 + 20)
    fetcher = Fetcher(tmp_path / "cache", verify_local=False)
    assert len(list(ShardStream(copy, split="all", local=fetcher).epoch())) == 60
    assert read == [] and not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError):
        Fetcher(tmp_path / "cache")(str(tmp_path / "none.tar"), copy.shards[0])
