"""The layer benchmark as a command, with the smallest possible run."""

import json

import pytest

from moe_ext import cli
from moe_ext.benchmarks import report
from moe_ext.benchmarks.report import Samples


def test_ratios_are_medians_of_paired_repetitions():
    samples = {
        "ours": Samples([1.0, 2.0, 4.0]),
        "eager": Samples([3.0, 4.0, 8.0]),
        "all_trainable": Samples([1.4, 2.8, 5.6]),
    }
    found = report.ratios("8x2", "skew2", "bf16", samples, new_share=0.1)
    assert found["eager/8x2/skew2/bf16"]["median"] == 2.0
    assert found["eager/8x2/skew2/bf16"]["max"] == 3.0
    ceiling = found["flop_ceiling/8x2/skew2/bf16"]["median"]
    assert ceiling == pytest.approx(1.4 / (6 / 4.2))


def test_targets_say_how_many_cases_hold():
    medians = {
        "masking/8x2/balanced/fp32": 1.2,
        "masking/32x4/skew2/bf16": 1.5,
        "deepspeed_moe/128x8/skew8/fp32": 9.0,
        "deepspeed_moe/128x8/balanced/fp32": 1.0,
        "products/8x2/balanced/fp32": 0.8,
        "products/32x4/skew2/bf16": 0.5,
        "products/128x8/skew8/fp32": 0.9,
        "products/128x8/balanced/fp32": 1.0,
    }
    lines = {line[:36].strip(): line for line in report.targets_table(medians).splitlines()}
    assert "1.20 .. 1.50    1.50 .. 3.00  in 1 of 2 cases" in lines["masking"]
    assert "in 1 of 1 cases" in lines["deepspeed_moe 128x8 skew8"]
    assert "in 0 of 1 cases" in lines["deepspeed_moe 128x8 balanced"]
    assert "eager" not in lines


def test_command_writes_every_ratio_and_sample(tmp_path, capsys):
    path = tmp_path / "layer.json"
    words = [
        "bench",
        "layer",
        "--shapes",
        "32x4",
        "--loads",
        "balanced,skew8",
        "--dtypes",
        "bf16",
        "--tokens",
        "64",
    ]
    assert cli.main([*words, "--repetitions", "2", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    wanted = {
        f"{peer}/32x4/{load}/bf16" for peer in report.COLUMNS for load in ("balanced", "skew8")
    }
    assert set(content["ratios"]) == wanted
    assert all(value > 0 for value in content["ratios"].values())
    assert len(content["cases"][0]["samples"]["ours"]["cpu_s"]) == 2
    printed = capsys.readouterr().out
    assert "torch" in printed and "32x4/skew8/bf16" in printed


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit, match="choose from 8x2, 32x4, 128x8"):
        cli.main(["bench", "layer", "--shapes", "7x2"])
    assert cli.main(["bench", "nothing"]) == 2
