"""`moe-ext shards index --tokenizer` measures samples exactly as the trainer will build them."""

import json

import pytest
import torch

from moe_ext.compose import CONF_DIR, load, to_yaml
from moe_ext.data import Manifest, ShardStream, write_shards
from moe_ext.data.commands import main
from moe_ext.training.build import prepare
from moe_ext.training.topology import Ranks, Topology
from tests.data.inputs import pair, png
from tests.ranks import run_ranks
from tests.training.tiny import make_inputs, overrides

TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes, it is a cat on a mat."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    make_inputs(folder)
    talk = {"__key__": "talk", "png": png(1), "json": json.dumps({"conversations": TURNS}).encode()}
    text = {"__key__": "text", "txt": b"only words " * 30}
    write_shards(
        (("train", raw) for raw in [talk, text, *map(pair, (1, 22, 333))]), folder / "mine"
    )
    return folder


@pytest.mark.parametrize("chat_template", ["true", "false"])
def test_the_commands_lengths_are_the_trainers(folder, chat_template, tmp_path, capsys):
    manifest = folder / "mine" / "shard.json"
    more = [
        f"data.streams.train.manifest={manifest}",
        "data.prompt=Look:",
        "data.max_length=150",
        f"base.chat_template={chat_template}",
        "chain=[align]",
    ]
    config = load(CONF_DIR, overrides(folder, "run", *more))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert main(["index", "--manifest", str(manifest), "--config", str(tmp_path / "run.yaml")]) == 0
    flags = ["--tokenizer", f"{folder}/base", "--prompt", "Look:", "--max-length", "150"]
    flags += ["--tokens-per-item", "4", *(["--no-chat-template"] * (chat_template == "false"))]
    assert main(["index", "--manifest", str(manifest), *flags]) == 0
    paths = [line for line in capsys.readouterr().out.splitlines() if "token lengths" in line]
    assert paths[0] == paths[1], "one by one they mean the same"

    stored, built, shown = run_ranks(_as_the_trainer_builds, 1, folder, config)[0]
    assert stored == built
    asked = chat_template == "true"
    assert ("<|im_start|>user" in shown) == asked and max(stored) == 150, "text was cut to it"


def _as_the_trainer_builds(folder, config):
    """Lengths that the manifest knows, those of the samples, and the first sample as text."""
    topology = Topology(Ranks(0, 1, 0, 1), torch.device("cpu"), 1, 0, None, 5.0)
    build = prepare(config, topology, lambda: folder / "base").build
    manifest = folder / "mine" / "shard.json"
    raws = list(ShardStream(manifest, shuffle=False).epoch())
    stored = Manifest.load(manifest).lengths(build.fingerprint).tolist()
    return stored, [len(build(r)) for r in raws], build.tokenizer.decode(build(raws[0]).input_ids)
