"""The step benchmark as a command, every engine of it on a model of the smallest size."""

import json

import pytest

from moe_ext import cli
from moe_ext.benchmarks import step

TINY = {
    "LAYERS": 1,
    "VOCAB": 64,
    "DIM": 32,
    "WIDE": 16,
    "EXPERTS": 6,
    "TOP_K": 2,
    "FEATURES": 8,
    "FULL_LENGTH": 32,
    "SEQUENCES": 4,
    "IMAGE_TOKENS": 4,
}
_rank = step._rank


def _tiny_rank(*arguments) -> None:
    """A rank is a new process: it gets the sizes anew."""
    for name, value in TINY.items():
        setattr(step, name, value)
    _rank(*arguments)


def test_command_writes_every_ratio_and_sample(tmp_path, capsys, monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(step, name, value)
    monkeypatch.setattr(step, "_rank", _tiny_rank)
    path = tmp_path / "step.json"
    words = ["bench", "step", "--dtypes", "fp32", "--repetitions", "2", "--json", str(path)]
    assert cli.main(words) == 0
    content = json.loads(path.read_text())
    assert content["benchmark"] == "step"
    assert {"torch", "deepspeed"} <= set(content["environment"])
    against = {
        "moextend_script": "ours",
        "moextend_zero2": "ours_replica",
        "moextend_equal": "ours_replica_equal",
        "autoep_equal": "ours_equal",
    }
    assert set(content["ratios"]) == {f"{peer}/fp32" for peer in against}
    (case,) = content["cases"]
    assert set(case["samples"]) == {*against, *against.values()}
    for sample in case["samples"].values():
        assert len(sample["cpu_s"]) == len(sample["wall_s"]) == 2
        assert min(sample["cpu_s"] + sample["wall_s"]) > 0
    for peer, ours in against.items():
        times = (case["samples"][name]["cpu_s"] for name in (peer, ours))
        middle = sum(a / b for a, b in zip(*times, strict=True)) / 2  # the median of two
        assert content["ratios"][f"{peer}/fp32"] == pytest.approx(middle)
    # experts sharded or whole, the same products; packed rows are fewer than full sequences
    flop = {name: found["flop"] for name, found in case["achieved"].items()}
    assert set(flop) == set(against.values())
    assert flop["ours"] == flop["ours_replica"] < flop["ours_equal"] == flop["ours_replica_equal"]
    # sequences of a quarter to three quarters of the full length: two fit into one row
    assert case["packed_rows"] < TINY["SEQUENCES"]
    assert "autoep_equal" in capsys.readouterr().out
