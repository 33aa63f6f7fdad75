"""The table over seeds is the mean and the sample's standard deviation of what the runs say."""

import json
from pathlib import Path

from moe_ext.jobs.compare import main, table


def test_mean_and_spread_by_group(tmp_path: Path) -> None:
    for name, at_1, minutes in [("demo-0", 0.6, 10), ("demo-1", 0.8, 12), ("connector-0", 0.5, 9)]:
        (tmp_path / name).mkdir()
        summary = {"training_minutes": minutes, "heldout": {"retrieval_at_1": at_1}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    text = table([tmp_path / name for name in ("demo-0", "demo-1", "connector-0")])
    assert text.splitlines() == [
        "| run | seeds | retrieval@1 | minutes |",
        "|---|---|---|---|",
        "| demo | 2 | 0.7 ± 0.14 | 11 ± 1.4 |",
        "| connector | 1 | 0.5 | 9 |",
    ]


def test_an_unfinished_run_is_named(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "demo-7")]) == 1
    assert "demo-7" in capsys.readouterr().out
