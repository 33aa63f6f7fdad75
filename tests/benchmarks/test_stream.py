"""The stream benchmark measures readers that read the same thing."""

import json

import numpy as np

from moe_ext.benchmarks.stream import main, readers, synthetic
from moe_ext.data import Manifest


def test_every_reader_gives_the_same_samples(tmp_path):
    manifest = Manifest.load(synthetic(tmp_path / "shards", 30, 32))
    kinds = readers(manifest, tmp_path)
    members = sorted(
        m for sample in kinds["raw"]["ours"]() for k, m in sample.items() if k[0] != "_"
    )
    assert sorted(kinds["raw"]["raw_tar"]()) == members and len(members) == 60
    theirs = [s["jpg"] for s in kinds["raw"]["webdataset"]()]
    assert [s["jpg"] for s in kinds["raw"]["ours_unshuffled"]()] == theirs
    ours = {caption["caption"]: image for image, caption in kinds["decoded"]["ours"]()}
    for sample in kinds["decoded"]["webdataset"]():
        assert np.array_equal(ours[sample["json"]["caption"]], sample["jpg"])


def test_command(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main(["--samples", "20", "--pixels", "16", "--rounds", "1", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"raw_tar", "webdataset", "webdataset_decoded"} <= set(result["ratios"])
    assert result["samples"] == 20 and "raw_tar" in capsys.readouterr().out
