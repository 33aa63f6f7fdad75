"""docs/data.md names tests and settings that exist."""

import dataclasses
import re
from pathlib import Path

from moe_ext.config import DataConfig, StreamConfig
from tests.data.fault_server import FaultServer
from tests.data.inputs import make_pairs, to_pixels

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
