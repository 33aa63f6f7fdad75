"""Publishing and resuming on a stand-in model: any ranks to any ranks, bit by bit on the same ones."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_ext.config import Trainable
from moe_ext.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    Piece,
    Published,
    Snapshot,
    published,
)
from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.parts import Part
from moe_ext.training.publishing import publish
from moe_ext.training.resume import pieces_at_rest, pieces_of, restore_masters
from moe_ext.training.topology import Ranks, start
from tests.ranks import run_ranks

EXPERTS, DIM = 3, 5
HELD = {1: [[0, 1, 2]], 2: [[0, 1], [2]]}


def _model(ep_size, ep_rank, bf16=False):
    """A matrix and a bank of experts of which this rank holds some; one layer, no exchange."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    matrix = nn.Parameter(torch.randn(DIM, DIM, generator=g).to(dtype))
    held = HELD[ep_size][ep_rank]
    experts = nn.Parameter(torch.randn(EXPERTS, DIM, DIM, generator=g)[held].to(dtype))
    return [
        Part("connectors.image.w", matrix, Trainable.connector),
        Part(
            "layers.0.vision.experts.up", experts, Trainable.new_experts, ep_size > 1, tuple(held)
        ),
    ]


def _engine(parts, topology, stage, bf16=False):
    settings = EngineSettings(
        zero_stage=stage, clip_norm=0.0, accumulation=1, sequences_per_rank=1, bf16=bf16
    )
    held = parts[1].expert_ids

    def loss(step):
        # the same on all ranks: every expert's own linear pull, plus the matrix
        g = torch.Generator().manual_seed(step)
        targets = torch.randn(EXPERTS + 1, DIM, DIM, generator=g)
        own = (parts[1].parameter.float() - targets[list(held)]).square().sum()
        share = 1.0 if parts[1].sharded else 1.0 / dist.get_world_size()
        edp = 1 if not parts[1].sharded else topology.ep_size / dist.get_world_size()
        common = (parts[0].parameter.float() - targets[-1]).square().sum() / dist.get_world_size()
        return own * share * edp + common

    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in parts
    ]
    return Engine(loss, trainable, settings, topology)


def _steps(engine, first, last):
    for step in range(first, last):
        engine.backward(engine(step))
        engine.step(0.01)


def _full(parts, engine, folder, name, topology):
    """Every logical weight, through a checkpoint."""
    pieces, adam_step = pieces_of(engine, parts)
    path = publish(
        folder,
        name,
        Snapshot(pieces, {"adam_step": adam_step}),
        topology.rank,
        topology.world_size,
    )
    source = Published(path)
    source.verify(topology.rank, topology.world_size)
    return {n: source.tensor(n) for n in source.tensors}


def _topology(ep_size):
    rank, world = dist.get_rank(), dist.get_world_size()
    return start(Ranks(rank, world, rank, world), ep_size=ep_size, timeout_s=60)


def _save(folder, ep_size, stage, bf16):
    """Four steps, saved after the second: the checkpoint and the weights at the end."""
    topology = _topology(ep_size)
    parts = _model(ep_size, topology.ep_rank, bf16)
    engine = _engine(parts, topology, stage, bf16)
    _steps(engine, 0, 2)
    _full(parts, engine, Path(folder), "step-2", topology)
    _steps(engine, 2, 4)
    result = _full(parts, engine, Path(folder), "step-4", topology)
    engine.destroy()
    return result


def _resume(folder, ep_size, stage, bf16, name):
    topology = _topology(ep_size)
    parts = _model(ep_size, topology.ep_rank, bf16)
    engine = _engine(parts, topology, stage, bf16)
    restore_masters(engine, parts, Published(Path(folder) / "step-2"), moments=True)
    _steps(engine, 2, 4)
    result = _full(parts, engine, Path(folder), name, topology)
    engine.destroy()
    return result


def _many(folder, world):
    """Every ep_size and ZeRO stage of this world resumes from every checkpoint there is."""
    saved, resumed = {}, {}
    for ep_size in (1, 2)[:world]:
        for stage in (1, 2):
            key = f"w{world}e{ep_size}z{stage}"
            saved[key] = _save(f"{folder}/{key}", ep_size, stage, False)
    saved["bf16"] = _save(f"{folder}/w{world}bf16", 1, 1, True)
    resumed["bf16"] = _resume(f"{folder}/w{world}bf16", 1, 1, True, "again")
    for other in sorted(p.name for p in Path(folder).iterdir() if "z" in p.name):
        for ep_size in (1, 2)[:world]:
            for stage in (1, 2):
                name = f"w{world}e{ep_size}z{stage}"
                if name != other and stage == ep_size:
                    continue  # half of the crossings do
                resumed[other, name] = _resume(f"{folder}/{other}", ep_size, stage, False, name)
    return saved, resumed


def test_any_ranks_resume_any_ranks(tmp_path):
    """World 2 after world 1, then world 1 again: checkpoints of each are read by each."""
    saved_1, _ = run_ranks(_many, 1, str(tmp_path), 1)[0]
    saved_2, resumed_2 = run_ranks(_many, 2, str(tmp_path), 2)[0]
    _, resumed_1 = run_ranks(_many, 1, str(tmp_path), 1)[0]
    straight = saved_1["w1e1z1"]
    assert {*straight} == {"connectors.image.w"} | {
        f"layers.0.vision.experts.{e}.up" for e in range(EXPERTS)
    }
    crossed = 0
    for saved, resumed in ((saved_2, resumed_2), (saved_1, resumed_1)):
        for name in straight:  # the same ranks: bit by bit
            assert torch.equal(saved["bf16"][name], resumed["bf16"][name])
            for key in saved:
                if (key, key) in resumed:
                    assert torch.equal(saved[key][name], resumed[key, key][name])
        for key, result in resumed.items():
            if key != "bf16":
                crossed += key[0] != key[1]
                for name, wanted in straight.items():
                    torch.testing.assert_close(result[name], wanted, rtol=0, atol=1e-6)
    assert crossed > 10
    moved = (straight["connectors.image.w"] - _model(1, 0)[0].parameter.detach()).abs().mean()
    assert moved > 1e-3  # or resuming would prove nothing


def _snapshot(value=1.0, name="a"):
    piece = Piece(name, (4,), 0, {"weight": torch.full((4,), value)})
    shared = {"s": torch.arange(3.0)}
    return Snapshot([piece], {"step": 7}, {"seed": 1}, {"rng": torch.arange(4)}, shared)


def test_what_is_published_reads_back(tmp_path):
    source = Published(publish(tmp_path, "step-1", _snapshot()))
    assert source.state == {"step": 7}
    assert source.manifest["rank_states"] == [{"seed": 1}]
    assert source.tensor("a").tolist() == [1.0] * 4
    assert source.shared()["s"].tolist() == [0.0, 1.0, 2.0]
    assert source.rank_tensors(0)["rng"].tolist() == [0, 1, 2, 3]
    assert source.rank_tensors(1) == {}
    out = torch.zeros(2)
    source.fill("a", 1, out)
    assert out.tolist() == [1.0, 1.0]


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        publish(tmp_path, f"step-{step}", _snapshot(), keep=2)
    assert [p.name for p in published(tmp_path)] == ["step-3", "step-4"]


def test_a_half_written_one_is_invisible_and_replaced(tmp_path):
    partial = tmp_path / ".step-1.partial"
    partial.mkdir()
    (partial / MANIFEST).write_text("{}")
    assert published(tmp_path) == []
    publish(tmp_path, "step-1", _snapshot())
    assert [p.name for p in published(tmp_path)] == ["step-1"]
    assert not partial.exists()


def test_a_failing_write_leaves_the_previous_one_whole(tmp_path, monkeypatch):
    publish(tmp_path, "step-1", _snapshot(1.0))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left(.|\n)*published before(.|\n)*whole"):
        publish(tmp_path, "step-2", _snapshot(2.0))
    monkeypatch.undo()
    assert [p.name for p in published(tmp_path)] == ["step-1"]
    Published(tmp_path / "step-1").verify()


def test_a_refused_rename_publishes_nothing(tmp_path):
    def refuse():
        raise RuntimeError("a newer start owns the folder")

    with pytest.raises(CheckpointError, match="newer start"):
        publish(tmp_path, "step-1", _snapshot(), owning=refuse)
    assert published(tmp_path) == []


def test_missing_elements_are_noticed_when_publishing(tmp_path):
    snapshot = _snapshot()
    snapshot.pieces[0].start = 1
    with pytest.raises(CheckpointError, match="no or two pieces"):
        publish(tmp_path, "step-1", snapshot)


def test_damage_is_named(tmp_path):
    path = publish(tmp_path, "step-1", _snapshot())
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        Published(path).verify()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="its manifest says"):
        Published(path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        Published(path)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no readable"):
        Published(path)


def test_an_absent_tensor_is_an_error(tmp_path):
    source = Published(publish(tmp_path, "step-1", _snapshot()))
    with pytest.raises(CheckpointError, match="no tensor b"):
        source.fill("b", 0, torch.zeros(1))
    with pytest.raises(CheckpointError, match="no exp_avg of a"):
        source.fill("a", 0, torch.zeros(1), "exp_avg")


def _second_rank_cannot_write(folder):
    rank = dist.get_rank()
    if rank == 1:
        os.fsync = lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    piece = Piece("a", (4,), 2 * rank, {"weight": torch.ones(2)})
    try:
        publish(Path(folder), "step-1", Snapshot([piece], {}), rank, 2)
    except CheckpointError as error:
        return str(error)
    return "published"


def test_one_rank_that_cannot_write_stops_all(tmp_path):
    for message in run_ranks(_second_rank_cannot_write, 2, str(tmp_path)):
        assert "rank 1: OSError" in message
        assert "Read-only" in message
    assert published(tmp_path) == []


def test_a_model_at_rest_is_tiled():
    parts = _model(2, 0)
    assert [p.name for p in pieces_at_rest(parts, 0, 2)] == [
        "connectors.image.w",
        "layers.0.vision.experts.0.up",
        "layers.0.vision.experts.1.up",
    ]
    other = [dataclasses.replace(p) for p in _model(2, 1)]
    assert [p.name for p in pieces_at_rest(other, 1, 2)] == ["layers.0.vision.experts.2.up"]
    assert pieces_at_rest(other, 3, 2) == []
