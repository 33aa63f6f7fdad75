"""Shards against tarfile and webdataset themselves; damage is named."""

import io
import json
import os
import shutil
import signal
import tarfile

import pytest
import webdataset

from moe_ext.data import (
    BadSample,
    Manifest,
    ManifestError,
    ShardError,
    ShardStream,
    index_shards,
    write_shards,
)
from moe_ext.data.shards import ShardFiles, index_tar, parse_sample
from tests.data.inputs import make_pairs, pair


def _killed_at(folder, sample: int, again: bool) -> None:
    """A process that writes shards, over others where `again`, and is killed at a sample."""

    def samples():
        for i in range(60):
            if i == sample:
                os.kill(os.getpid(), signal.SIGKILL)
            yield "train", pair(i + 100 * again)
        os.kill(os.getpid(), signal.SIGKILL)  # all samples are there, the manifest is not

    pid = os.fork()
    if not pid:
        write_shards(samples(), folder, samples_per_shard=7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("sample", [0, 25, 60])
def test_a_killed_writer_leaves_no_data_set_and_the_next_one_writes_it_whole(
    tmp_path, sample, again
):
    wanted = make_pairs(tmp_path / "whole", 60).parent
    folder = tmp_path / "killed"
    if again:
        make_pairs(folder, 60)
    _killed_at(folder, sample, again)
    with pytest.raises(ManifestError):
        Manifest.load(folder / "shard.json")
    make_pairs(folder, 60)
    for path in wanted.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_every_indexed_sample_is_what_webdataset_reads(pairs):
    manifest = Manifest.load(pairs)
    urls = [manifest.url(s) for s in range(len(manifest.shards))]
    theirs = webdataset.WebDataset(urls, shardshuffle=False)
    files = ShardFiles(manifest)
    count = 0
    for number, sample in enumerate(theirs):
        ours = files.read(number)
        assert ours["__key__"] == sample["__key__"] and ours["png"] == sample["png"]
        assert ours["json"] == sample["json"]
        count += 1
    assert count == manifest.num_samples == 60 and len(urls) == 9


def test_the_same_samples_give_the_same_bytes(tmp_path):
    a, b = (make_pairs(tmp_path / name, 10) for name in "ab")
    assert [s.sha256 for s in Manifest.load(a).shards] == [
        s.sha256 for s in Manifest.load(b).shards
    ]
    assert a.read_bytes() == b.read_bytes()


def test_splits(pairs):
    manifest = Manifest.load(pairs)
    assert manifest.select("heldout").tolist() == list(range(0, 60, 5))
    assert len(manifest.select("all")) == 60 and len(manifest.select("train")) == 48
    with pytest.raises(ManifestError, match="choose one of"):
        manifest.select("test")


def test_long_and_unusual_names_go_through(tmp_path):
    """pax headers (names above 100 characters, not ASCII) are read by webdataset itself."""
    path = tmp_path / "odd.tar"
    names = ["a" * 150 + ".txt", "b/" + "\u00e9" * 40 + ".txt", "plain.txt"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(b"x" * len(name)))
    manifest = Manifest.load(index_shards([str(path)], tmp_path / "odd.json"))
    files = ShardFiles(manifest)
    assert [files.read(i)["__key__"] for i in range(3)] == [n[:-4] for n in names]
    assert [len(files.read(i)["txt"]) for i in range(3)] == [len(n) for n in names]


def test_a_cut_tar_is_refused_by_the_index(pairs, tmp_path):
    whole = open(Manifest.load(pairs).url(0), "rb").read()
    for keep in (700, 1000, len(whole) // 2 // 512 * 512 + 100):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:keep])
        with pytest.raises(ShardError, match="cut.tar"):
            index_tar(path)
    damaged = bytearray(whole)
    damaged[2048:4096] = os.urandom(2048)
    path.write_bytes(damaged)
    with pytest.raises(ShardError, match="cut.tar"):
        index_tar(path)


def test_a_shard_of_another_size_is_named_and_never_half_read(pairs, tmp_path):
    shutil.copytree(pairs.parent, tmp_path / "copy")
    manifest = Manifest.load(tmp_path / "copy" / pairs.name)
    with open(manifest.url(2), "r+b") as f:
        f.truncate(manifest.shards[2].size_bytes - 512)
    files = ShardFiles(manifest)
    for sample in range(14, 21):
        with pytest.raises(BadSample, match=r"shard-000002\.tar#\d.*bytes, its manifest says"):
            files.read(sample)
    assert files.read(13)["__key__"] == "s00013" and files.read(21)["__key__"] == "s00021"


def test_garbage_in_the_middle_is_one_named_bad_sample(pairs, tmp_path):
    shutil.copytree(pairs.parent, tmp_path / "copy")
    manifest = Manifest.load(tmp_path / "copy" / pairs.name)
    with open(manifest.url(0), "r+b") as f:
        f.seek(int(manifest.offset_N[3]))
        f.write(os.urandom(512))
    files = ShardFiles(manifest)
    with pytest.raises(BadSample, match=r"shard-000000\.tar#3: damaged tar (header|member)"):
        files.read(3)
    assert [files.read(i)["__key__"] for i in (2, 4, 5, 6)] == [
        "s00002",
        "s00004",
        "s00005",
        "s00006",
    ]


def test_manifest_refuses_what_does_not_fit(pairs, tmp_path):
    with pytest.raises(ManifestError, match="no manifest at"):
        Manifest.load(tmp_path / "none.json")
    shutil.copytree(pairs.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / pairs.name
    index = copy.with_suffix(".index.npz")
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(ManifestError, match="does not match its hash"):
        Manifest.load(copy)
    copy.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ManifestError, match="format"):
        Manifest.load(copy)


def test_keys_that_readers_would_split_elsewhere_are_refused(tmp_path):
    for key in ("a.b", "../up", "a/../b"):
        with pytest.raises(ValueError, match="key"):
            write_shards([("train", {**pair(0), "__key__": key})], tmp_path)
    with pytest.raises(ValueError, match="repeats"):
        write_shards([("train", pair(0)), ("train", pair(0))], tmp_path)


def test_a_stream_reads_any_position_and_never_ends(pairs):
    stream = ShardStream(pairs, seed=1, window=16)
    assert len(stream) == 48
    keys = [stream.raw(p)["__key__"] for p in range(96)]
    assert sorted(keys[:48]) == sorted(keys[48:]) == [f"s{i:05d}" for i in range(60) if i % 5]
    assert stream.raw(48 * 10**9 + 5)["png"]
    assert [p for p, _ in zip(range(5), stream, strict=False)] == [0, 1, 2, 3, 4]
    other = ShardStream(pairs, seed=2, window=16)
    assert other.identity != stream.identity
    assert [other.raw(p)["__key__"] for p in range(48)] != keys[:48]


def test_parse_sample_tells_members_apart():
    def members(*names: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(name)
                tar.addfile(info, io.BytesIO(name.encode()))
        return file.getvalue()[: 1024 * len(names)]  # a block of header and one of data each

    sample = parse_sample(members("a.PNG", "a.seg.json"), "u")
    assert sample == {"__key__": "a", "__url__": "u", "png": b"a.PNG", "seg.json": b"a.seg.json"}
    with pytest.raises(BadSample, match="a: holds a member of another sample, b"):
        parse_sample(members("a.png", "b.png"), "u")
    with pytest.raises(BadSample, match="no named member"):
        parse_sample(b"", "u")


def test_an_empty_shard_holds_no_position(pairs, tmp_path):
    for tar in pairs.parent.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    tarfile.open(tmp_path / "shard-000000b.tar", "w").close()
    tars = [str(p) for p in sorted(tmp_path.glob("*.tar"))]
    manifest = Manifest.load(index_shards(tars, tmp_path / "all.json"))
    assert [s.num_samples for s in manifest.shards][:3] == [7, 0, 7]
    keys = [raw["__key__"] for raw in ShardStream(manifest, seed=1, window=9).epoch()]
    assert sorted(keys) == [f"s{i:05d}" for i in range(60)]


def test_a_path_that_leads_out_is_only_a_name(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../outside.txt", "/etc/outside.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    before = sorted(p.name for p in tmp_path.parent.iterdir())
    stream = ShardStream(index_shards([str(path)], tmp_path / "evil.json"), shuffle=False)
    assert [raw["txt"] for raw in stream.epoch()] == [b"evil"] * 2
    assert sorted(p.name for p in tmp_path.parent.iterdir()) == before
