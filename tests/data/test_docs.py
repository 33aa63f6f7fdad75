"""docs/data.md names tests and settings that exist, and its examples and commands run as they stand."""

import csv
import dataclasses
import json
import re
import shlex
import shutil
from glob import glob
from pathlib import Path

import numpy as np
import pytest

from moe_ext import cli
from moe_ext.config import DataConfig, StreamConfig
from moe_ext.data import Manifest
from tests.data.fault_server import FaultServer
from tests.data.inputs import make_pairs, png, to_pixels
from tests.infra.documents import lines_of

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "data.md").read_text()
README = (HERE.parent.parent / "README.md").read_text()


def test_the_examples_run_as_they_stand(tmp_path, monkeypatch, tokenizer):
    make_pairs(tmp_path / "shards", 60)
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    alone, remote = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (readme,) = re.findall(r"```python\n(.*?)```", README, re.S)

    def preprocess(image):
        return to_pixels(image)

    for code in (alone, readme):
        names = {"preprocess": preprocess}
        exec(code, names)
        assert names["state"]["position"] == 800 and names["state"]["skips"] == []
        again = names["loader"].__class__(names["stream"], names["build"], sequences_per_rank=4)
        again.load_state_dict(names["state"])
        assert next(iter(again)).sample_keys == [
            names["stream"].raw(p)["__key__"] for p in range(800, 804)
        ]
    with FaultServer(tmp_path / "shards") as server:
        names = {"manifest": server.url("ok", "shard.json")}
        exec(remote, names)
        assert len(list(names["stream"].epoch())) == 60


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Seven."}]


def write_sources(folder):
    """Twelve pictures in every form that the page's commands read."""
    for name in ("images", "imagefolder", "img2dataset_files", "tars"):
        (folder / name).mkdir()
    names = [f"{i:02d}" for i in range(12)]
    for i, name in enumerate(names):
        for place in ("images", "imagefolder", "img2dataset_files"):
            (folder / place / f"{name}.png").write_bytes(png(i))
        (folder / "img2dataset_files" / f"{name}.txt").write_text(f"number {i}")
        shutil.copy(folder / "images" / f"{name}.png", folder)
    lines = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in names]
    (folder / "imagefolder" / "metadata.jsonl").write_text("\n".join(lines))
    rows = [{"id": name, "image": f"{name}.png", "conversations": TURNS} for name in names]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "text"), *((f"{n}.png", n) for n in names)])
    make_pairs(folder / "made", 12)
    for tar in (folder / "made").glob("*.tar"):
        shutil.move(tar, folder / "tars")


@pytest.mark.parametrize("builtin", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_shards_are_made_as_the_page_says(builtin, tmp_path, monkeypatch, tokenizer, capsys):
    """All lines in the page's order; the built-in set, thousands of drawings, apart."""
    write_sources(tmp_path)
    tokenizer.save_pretrained(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    lines = lines_of("test_shards_are_made_as_the_page_says")
    for line in (line for line in lines if ("openmoji" in line) == builtin):
        command, _, output = line.partition(" > ")
        words = [word for text in shlex.split(command)[1:] for word in glob(text) or [text]]
        capsys.readouterr()
        assert cli.main(words) == 0, line
        if output:
            Path(output).write_text(capsys.readouterr().out)
    shutil.rmtree("made")
    made = {path.parts[-2]: Manifest.load(path).num_samples for path in Path().glob("*/*.json")
            if path.name in ("shard.json", "mine.json", "openmoji.json")}  # fmt: skip
    if builtin:
        assert made == {"drawings": 3953}
        return
    assert made == dict.fromkeys(("llava", "pairs", "photos", "crawled", "tars"), 12)
    assert Path("shards.html").read_text().count("<figure>") == 12
    (lengths,) = Path("pairs").glob("shard.lengths-*.npy")
    assert len(np.load(lengths)) == 12


def test_every_row_of_the_fault_table_has_its_tests():
    table = PAGE.split("| fault |")[1].split("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) >= 20
    sources = {path.name: path.read_text() for path in HERE.glob("test_*.py")}
    for path in (HERE.parent / "training").glob("test_*.py"):
        sources[f"training/{path.name}"] = path.read_text()
    for row in rows:
        last = row.rsplit("|", 2)[1]
        assert "test_" in last or "same" in last, row
        for name in re.findall(r"`((?:training/)?test_[^`]+)`", last):
            file, _, function = name.partition("::")
            if not file.endswith(".py"):
                file, function = "test_fetch.py", name
            assert file in sources, row
            assert not function or f"def {function}(" in sources[file], row


def test_every_setting_exists():
    fields = {f.name for f in dataclasses.fields(DataConfig)}
    named = set(re.findall(r"(?<!_)data\.([a-z_]+)", PAGE)) - {"import"}
    assert named and named <= fields, named - fields
    inner = set(re.findall(r"data\.streams\.\*\.([a-z_]+)", PAGE))
    assert inner <= {f.name for f in dataclasses.fields(StreamConfig)}
