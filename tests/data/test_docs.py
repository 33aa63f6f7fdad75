"""docs/data.md names tests and settings that exist."""

import dataclasses
import re
from pathlib import Path

from moe_ext.config import DataConfig, StreamConfig

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "data.md").read_text()


def test_every_row_of_the_fault_table_has_its_tests():
    rows = [line for line in PAGE.split("| fault |")[1].splitlines() if line.startswith("| ")]
    assert len(rows) >= 20
    sources = {path.name: path.read_text() for path in HERE.glob("test_*.py")}
    for row in rows:
        last = row.rsplit("|", 2)[1]
        assert "`test_" in last or "same" in last, row
        for name in re.findall(r"`(test_[^`]+)`", last):
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
