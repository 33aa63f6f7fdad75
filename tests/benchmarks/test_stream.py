"""The stream benchmark measures readers that read the same thing."""

import json
import sys

import numpy as np
import pytest

from moe_ext.benchmarks.stream import PEERS, main, one_round, readers, synthetic
from moe_ext.data import Manifest


def test_every_reader_gives_the_same_samples(tmp_path):
    manifest = Manifest.load(synthetic(tmp_path / "shards", 30, 32))
    kinds = readers(manifest, tmp_path)
    members = sorted(
        m for sample in kinds["raw"]["ours"]() for k, m in sample.items() if k[0] != "_"
    )
    theirs = list(kinds["raw"]["raw_tar"]())
    assert sorted(m for sample in theirs for m in sample) == members and len(members) == 60
    assert len(theirs) == 30
    theirs = [s["jpg"] for s in kinds["raw"]["webdataset"]()]
    assert [s["jpg"] for s in kinds["raw"]["ours_unshuffled"]()] == theirs
    ours = {caption["caption"]: image for image, caption in kinds["decoded"]["ours"]()}
    for sample in kinds["decoded"]["webdataset"]():
        assert np.array_equal(ours[sample["json"]["caption"]], sample["jpg"])


def test_a_reader_that_loses_samples_is_no_peer():
    seconds = one_round({"a": lambda: iter(range(250)), "b": lambda: iter(range(250))}, 250)
    assert set(seconds) == {"a", "b"}
    with pytest.raises(RuntimeError, match=r"\{'b': 249\} samples, not 250"):
        one_round({"a": lambda: iter(range(250)), "b": lambda: iter(range(249))}, 250)


def test_peers_that_are_not_installed_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "streaming", None)
    monkeypatch.setitem(sys.modules, "litdata", None)
    kinds = readers(Manifest.load(synthetic(tmp_path / "shards", 5, 16)), tmp_path)
    assert set(kinds["decoded"]) == {"ours", "webdataset"}
    said = capsys.readouterr().err
    assert all(f"{name}=={version} is left out" in said for name, version in PEERS.items())


def test_command(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main(["--samples", "20", "--pixels", "16", "--rounds", "1", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"raw_tar", "webdataset", "webdataset_decoded"} <= set(result["ratios"])
    assert result["samples"] == 20 and "raw_tar" in capsys.readouterr().out
