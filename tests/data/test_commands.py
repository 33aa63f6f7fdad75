"""`moe-ext shards`: every input format becomes the same samples; `check` finds planted damage."""

import csv
import json
import shutil

import pytest

from moe_ext.config import DataConfig, StreamConfig
from moe_ext.data import Manifest, SampleBuilder, ShardStream, open_loader
from moe_ext.data.commands import main
from moe_ext.data.convert import split_of
from tests.data.fault_server import FaultServer
from tests.data.inputs import png, to_pixels

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Seven."}]


@pytest.fixture
def folder(tmp_path):
    """Twelve images in a folder, 00.png .. 11.png."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        (images / f"{i:02d}.png").write_bytes(png(i))
    return images


def write_llava(folder, tmp_path):
    rows = [{"id": f"c.{i}", "image": f"{i:02d}.png", "conversations": TURNS} for i in range(11)]
    two = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "Yes."}]
    rows.append({"id": "both", "image": ["10.png", "11.png"], "conversations": two})
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows))
    return [str(path), "--images", str(folder)]


def write_csv(folder, tmp_path):
    path = tmp_path / "pairs.csv"
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["picture", "caption"])
        writer.writerows([f"{i:02d}.png", f"number, {i}"] for i in range(12))
    return [str(path), "--images", str(folder), "--image-column", "picture"]


def write_imagefolder(folder, tmp_path):
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": f"number, {i}"}) for i in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return [str(folder)]


def write_img2dataset(folder, tmp_path):
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(f"number, {i}")
        (folder / f"{i:02d}.json").write_text(
            json.dumps({"caption": f"number, {i}", "status": "success"})
        )
    return [str(folder)]


@pytest.mark.parametrize("write", [write_llava, write_csv, write_imagefolder, write_img2dataset])
def test_make(write, folder, tmp_path, tokenizer, capsys):
    arguments = write(folder, tmp_path)
    out = tmp_path / "out"
    assert (
        main(["make", *arguments, str(out), "--samples-per-shard", "5", "--licence", "CC0-1.0"])
        == 0
    )
    assert "12 samples in 3 shards" in capsys.readouterr().out
    manifest = Manifest.load(out / "shard.json")
    assert manifest.info["licence"] == "CC0-1.0"
    build = SampleBuilder(tokenizer, to_pixels, 4, prompt="A", max_length=200)
    samples = [build(raw) for raw in ShardStream(manifest, shuffle=False).epoch()]
    for i, sample in enumerate(samples[:11]):
        assert round(float(sample.media[0][1][0, 0, 0] * 255)) == i
        answers = [t for t in sample.labels.tolist() if t != -100]
        expected = "Seven.<|im_end|>" if write is write_llava else f" number, {i}<|im_end|>"
        assert tokenizer.decode(answers) == expected
    assert len(samples[11].media) == (2 if write is write_llava else 1)
    assert main(["check", str(out / "shard.json")]) == 0


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_make_from_hugging_face_files(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(3)],
        "caption": ["x", "y", "z"],
    }
    (tmp_path / "in").mkdir()
    if kind == "parquet":
        parquet.write_table(arrow.table(rows), tmp_path / "in" / "a.parquet")
    else:  # what datasets.save_to_disk writes
        table = arrow.table(rows)
        file = tmp_path / "in" / "data-00000-of-00001.arrow"
        with arrow.OSFile(str(file), "wb") as f, arrow.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert main(["make", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    raws = list(ShardStream(tmp_path / "out" / "shard.json", shuffle=False).epoch())
    assert [json.loads(raw["json"])["caption"] for raw in raws] == ["x", "y", "z"]
    assert [raw["png"] for raw in raws] == [png(i) for i in range(3)]


def test_a_source_without_samples_is_refused(tmp_path, folder, capsys, caplog):
    assert main(["make", str(folder), str(tmp_path / "out")]) == 2
    assert "holds no sample of format img2dataset" in capsys.readouterr().err
    assert "12 images without a caption" in caplog.text
    assert not (tmp_path / "out" / "shard.json").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "image": "99.png", "conversations": TURNS}], "is --images right"),
        ([{"id": 1, "image": "../../etc/passwd.png", "conversations": TURNS}], "leads out of"),
        ([{"id": 1, "image": "00.png"}], "sample 0: no conversations"),
        ({"id": 1}, "not a list"),
    ],
)
def test_make_names_what_it_cannot_convert(rows, message, folder, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    assert main(["make", str(path), str(tmp_path / "out"), "--images", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "shard.json").exists(), "a failed run leaves no data set"


def test_index_of_foreign_tars_with_token_lengths(pairs, tmp_path, tokenizer, capsys):
    for tar in pairs.parent.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    tars = [str(p) for p in sorted(tmp_path.glob("*.tar"))]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    manifest = tmp_path / "mine.json"
    arguments = ["--manifest", str(manifest), "--heldout-share", "0.3"]
    sizes = ["--prompt", "A", "--tokens-per-item", "4", "--max-length", "64"]
    assert (
        main(["index", *tars, *arguments, "--tokenizer", str(tmp_path / "tokenizer"), *sizes]) == 0
    )
    build = SampleBuilder(tokenizer, to_pixels, 4, prompt="A", max_length=64)
    stream = ShardStream(manifest, split="all", shuffle=False)
    lengths = stream.manifest.lengths(build.fingerprint)
    raws = list(stream.epoch())
    assert [len(build(raw)) for raw in raws] == lengths.tolist()
    heldout = [
        raw["__key__"] for raw in ShardStream(manifest, split="heldout", shuffle=False).epoch()
    ]
    assert heldout == [r["__key__"] for r in raws if split_of(r["__key__"], 0.3) == "heldout"] != []


def test_check_names_every_damage(pairs, tmp_path, capsys):
    shutil.copytree(pairs.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / pairs.name
    manifest = Manifest.load(copy)
    with open(manifest.url(0), "r+b") as f:
        f.seek(int(manifest.offset_N[2]) + 1024 + 600)
        f.write(b"\xff" * 100)
    with open(manifest.url(4), "r+b") as f:
        f.truncate(3000)
    (tmp_path / "copy" / "shard-000006.tar").unlink()
    assert main(["check", str(copy)]) == 1
    out = capsys.readouterr().out
    assert "shard-000000.tar: its SHA-256" in out and "shard-000004.tar" in out
    assert "shard-000006.tar" in out and "shard-000001.tar" not in out


def test_look(pairs, tmp_path):
    out = tmp_path / "page.html"
    assert main(["look", str(pairs), "--out", str(out), "--count", "9", "--split", "heldout"]) == 0
    page = out.read_text()
    assert page.count("<figure>") == 9 == page.count("data:image/jpeg") and "thing number" in page
    assert "http" not in page.replace("http-equiv", ""), "self-contained"
    assert main(["look", str(pairs), "--out", str(out), "--split", "nothing"]) == 2
    assert main(["look", str(tmp_path / "none.json")]) == 2


def test_check_and_look_at_remote_shards(pairs, tmp_path, capsys):
    cache = ["--cache", str(tmp_path / "cache")]
    with FaultServer(pairs.parent) as server:
        url = server.url("ok", pairs.name)
        assert main(["check", url, *cache]) == 0
        assert "9 shards, 60 samples (heldout 12, train 48)" in capsys.readouterr().out
        out = tmp_path / "page.html"
        assert main(["look", url, "--count", "7", "--out", str(out), *cache]) == 0
        assert out.read_text().count("data:image/jpeg") == 7
        assert main(["check", server.url("404", pairs.name), *cache]) == 2
        assert "/404/shard.json" in capsys.readouterr().err
        garbage = server.url("garbage", "shard-000003.tar")
        content = json.loads(pairs.read_text())
        for shard in content["shards"]:
            shard["url"] = server.url("ok", shard["url"])
        content["shards"][3]["url"] = garbage
        bad = tmp_path / pairs.name
        bad.write_text(json.dumps(content))
        shutil.copy(pairs.with_suffix(".index.npz"), tmp_path)
        assert main(["check", str(bad), *cache]) == 1
        assert f"{garbage}: {garbage}: twice fetched whole" in capsys.readouterr().out


def test_index_of_remote_tars_and_of_their_lengths(pairs, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cache = ["--cache", str(tmp_path / "cache")]
    sizes = ["--tokenizer", str(tmp_path / "tokenizer"), "--prompt", "A", "--tokens-per-item", "4"]
    build = SampleBuilder(tokenizer, to_pixels, 4, prompt="A")
    with FaultServer(pairs.parent) as server:
        tars = [server.url("ok", f"shard-{i:06d}.tar") for i in range(9)]
        mine = tmp_path / "mine.json"
        assert main(["index", *tars, "--manifest", str(mine), *sizes, *cache]) == 0
        assert [s.url for s in Manifest.load(mine).shards] == tars
        # of a manifest that is remote itself, lengths are kept on this machine
        url = server.url("ok", pairs.name)
        assert main(["index", "--manifest", url, *sizes, *cache]) == 0
        data = DataConfig(
            streams={"train": StreamConfig(manifest=url)}, pack=True, num_workers=0,
            shard_cache=str(tmp_path / "cache" / "shards"),
        )  # fmt: skip
        loader = open_loader(
            data, "train", build, sequences_per_rank=1, rank=0, world_size=1, seed=0,
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
        assert len(next(iter(loader)).sample_keys) > 5


def test_tars_elsewhere_are_named_by_their_whole_path(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(pairs.parent)
    manifest = tmp_path / "elsewhere" / "mine.json"
    assert main(["index", "shard-000000.tar", "--manifest", str(manifest)]) == 0
    monkeypatch.chdir(tmp_path)
    assert next(ShardStream(manifest, shuffle=False).epoch())["__key__"] == "s00000"


def test_a_config_without_settings_is_refused(pairs, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("name: x")
    assert main(["index", "--manifest", str(pairs), "--config", str(tmp_path / "a.yaml")]) == 2
    assert "moe-ext train ... --show" in capsys.readouterr().err
