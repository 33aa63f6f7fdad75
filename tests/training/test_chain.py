"""The whole chain on a tiny model, two ranks: killed and resumed bit by bit, EP, placements, stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CLIPVisionModel

from moe_ext import cli
from moe_ext.compose import CONF_DIR, load
from moe_ext.train import run
from moe_ext.training.checkpoint import Published
from moe_ext.training.engine import Engine
from moe_ext.training.signals import STOPPED_EXIT_CODE
from moe_ext.training.topology import Ranks
from tests.ranks import RankError, run_ranks
from tests.training.tiny import make_inputs, overrides

TUNE_STEPS = 13
GOLDEN = Path(__file__).parent / "golden_losses.json"


def _run(folder, name, *more):
    rank, world = dist.get_rank(), dist.get_world_size()
    config = load(CONF_DIR, overrides(folder, name, *more))
    return run(config, Ranks(rank, world, rank, world))


def _at_step(number, act):
    """Call `act` before the engine's `number`-th step in a stage of TUNE_STEPS steps."""
    step = Engine.step

    def counted(self, *args, **options):
        self.steps_seen = getattr(self, "steps_seen", 0) + 1
        if self.settings.accumulation == 2 and self.steps_seen == number:
            act()
        return step(self, *args, **options)

    Engine.step = counted
    return lambda: setattr(Engine, "step", step)


def _killed(folder):
    def die():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    _at_step(5, die)
    _run(folder, "killed", "parallel.ep_size=2")


def _runs(folder):
    codes = {}
    codes["killed"] = _run(folder, "killed", "parallel.ep_size=2")
    codes["straight"] = _run(folder, "straight", "parallel.ep_size=2")
    codes["again"] = _run(folder, "straight", "parallel.ep_size=2")
    codes["dp"] = _run(folder, "dp", "parallel.zero_stage=2")
    three = [
        "parallel.ep_size=2",
        "extension.num_new_experts=3",
        "extension.row_init=domain",
        "extension.loss_free_rate=0.01",
        "stages.tune.router_kl_coefficient=0.01",
    ]
    codes["replicated"] = _run(folder, "replicated", *three)
    codes["sharded"] = _run(folder, "sharded", *three, "extension.placement=shard")

    def ask():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    codes["recompute"] = _run(
        folder, "recompute", "parallel.ep_size=2", "parallel.activation_checkpointing=true"
    )
    codes["hot"] = _run(
        folder, "hot", "parallel.ep_size=2", "parallel.hot_experts=2", "stages.tune.steps=3"
    )
    codes["packed"] = _run(folder, "packed", "base.frozen_bits=8", "stages.tune.steps=3")
    undo = _at_step(3, ask)
    codes["asked"] = _run(folder, "stopped", "parallel.ep_size=2")
    codes["asked elsewhere"] = _run(folder, "moved", "parallel.ep_size=2")
    undo()
    codes["moved"] = _run(folder, "moved", "parallel.ep_size=1", "parallel.zero_stage=2")
    codes["went on"] = _run(folder, "stopped", "parallel.ep_size=2")
    return codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_inputs(folder)
    with pytest.raises(RankError):
        run_ranks(_killed, 2, folder)
    assert _steps(folder, "killed", "tune")[-1]["step"] == 4
    codes = run_ranks(_runs, 2, folder, timeout_s=500)[0]
    return folder, codes


def _steps(folder, name, stage):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == "step" and r["stage"] == stage]


def _losses(folder, name, stage="tune"):
    by_step = {r["step"]: (r["loss"], r["grad_norm"]) for r in _steps(folder, name, stage)}
    return [by_step[s] for s in sorted(by_step)]


def _weights(folder, name, stage="tune"):
    source = Published(folder / name / "stages" / stage / "result")
    return {n: source.tensor(n) for n in source.tensors}


def _nll(folder, name):
    return [loss["nll"] for loss, _ in _losses(folder, name)]


def test_all_runs_end_as_they_should(runs):
    _, codes = runs
    assert codes.pop("asked") == STOPPED_EXIT_CODE
    assert codes.pop("asked elsewhere") == STOPPED_EXIT_CODE
    assert set(codes.values()) == {0}


def test_killed_in_mid_stage_it_resumes_to_the_same_bits(runs):
    folder, _ = runs
    events = [json.loads(x) for x in (folder / "killed" / "metrics.jsonl").read_text().splitlines()]
    resumed = [e for e in events if e["event"] == "resume"]
    # killed in step 5: the checkpoint of step 4 may still have been on its way
    assert [(e["stage"], e["step"]) for e in resumed] in ([("tune", 4)], [("tune", 2)])
    assert len(_losses(folder, "straight")) == TUNE_STEPS
    for stage in ("align", "probe", "tune"):
        assert _losses(folder, "killed", stage) == _losses(folder, "straight", stage)
    killed, straight = _weights(folder, "killed"), _weights(folder, "straight")
    assert killed.keys() == straight.keys()
    assert all(torch.equal(killed[n], straight[n]) for n in straight)


def test_a_finished_run_is_not_done_again(runs):
    folder, _ = runs
    for stage, steps in (("align", 4), ("probe", 3), ("tune", TUNE_STEPS)):
        assert [r["step"] for r in _steps(folder, "straight", stage)] == [*range(1, steps + 1)]
    kinds = [
        json.loads(x).get("kind")
        for x in (folder / "straight" / "metrics.jsonl").read_text().splitlines()
    ]
    assert kinds.count("evaluate") == 2  # text before, and the end: both once


def test_stopped_on_request_it_publishes_and_goes_on(runs):
    folder, _ = runs
    assert [r["step"] for r in _steps(folder, "stopped", "tune")] == [*range(1, TUNE_STEPS + 1)]
    assert _losses(folder, "stopped") == _losses(folder, "straight")


def test_a_run_goes_on_with_another_ep_size_and_zero_stage(runs):
    folder, _ = runs
    assert [r["step"] for r in _steps(folder, "moved", "tune")] == [*range(1, TUNE_STEPS + 1)]
    torch.testing.assert_close(_nll(folder, "moved"), _nll(folder, "straight"), rtol=1e-5, atol=0)


def test_recomputed_activations_change_nothing(runs):
    folder, _ = runs
    torch.testing.assert_close(
        _nll(folder, "recompute"), _nll(folder, "straight"), rtol=1e-6, atol=0
    )


def test_losses_are_the_golden_ones(runs):
    """Twenty losses of a small run. UPDATE_GOLDEN=1 writes them anew; say in the commit why they changed."""
    folder, _ = runs
    losses = {
        stage: [loss["nll"] for loss, _ in _losses(folder, "straight", stage)]
        for stage in ("align", "probe", "tune")
    }
    assert sum(map(len, losses.values())) == 20
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for stage, expected in golden.items():
        torch.testing.assert_close(losses[stage], expected, rtol=1e-5, atol=0)


def test_expert_parallel_equals_data_parallel(runs):
    folder, _ = runs
    torch.testing.assert_close(_nll(folder, "dp"), _nll(folder, "straight"), rtol=1e-5, atol=0)
    norms = [[n for _, n in _losses(folder, name)] for name in ("dp", "straight")]
    first = [norm[:3] for norm in norms]  # later ones come from weights that differ by rounding
    torch.testing.assert_close(*first, rtol=1e-5, atol=0)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)


def test_sharded_new_experts_equal_replicated_ones(runs):
    folder, _ = runs
    torch.testing.assert_close(
        _nll(folder, "sharded"), _nll(folder, "replicated"), rtol=1e-5, atol=0
    )
    sharded, replicated = _weights(folder, "sharded"), _weights(folder, "replicated")
    assert sharded.keys() == replicated.keys()
    for name, value in replicated.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=2e-5)


def test_training_did_something(runs):
    folder, _ = runs
    before, after = _weights(folder, "straight", "extend"), _weights(folder, "straight")
    experts = [n for n in after if ".experts." in n]
    assert experts
    assert all((after[n] - before[n]).abs().max() > 1e-4 for n in experts)
    probe = json.loads((folder / "straight" / "probe.json").read_text())
    assert {int(n.split(".")[1]) for n in experts} == {p["layer"] for p in probe["plans"]}


def test_text_keeps_its_bits(runs):
    folder, _ = runs
    for name in ("straight", "dp"):
        text = json.loads((folder / name / "summary.json").read_text())["text"]
        assert text["unchanged"]
        assert text["logits_sha256_joint"] != text["logits_sha256_after"]


def test_evaluated_again_on_one_rank_text_is_that_base(runs, tmp_path):
    folder, _ = runs
    run_dir = tmp_path / "copy"
    shutil.copytree(folder / "straight", run_dir)
    words = ["evaluate", str(run_dir), "parallel.ep_size=1", "evaluation.splits=[heldout]"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_ext.cli", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after = (
        json.loads((path / "summary.json").read_text()) for path in (folder / "straight", run_dir)
    )
    assert after["text"]["unchanged"]  # hashes of this placement, base and trained
    assert after["text"]["nll_after"] == pytest.approx(before["text"]["nll_after"], rel=1e-5)
    assert after["heldout"]["nll_right"] == pytest.approx(before["heldout"]["nll_right"], rel=1e-4)


def test_what_a_run_leaves(runs):
    folder, _ = runs
    left = {p.name for p in (folder / "straight").iterdir()}
    assert {"report.html", "summary.json", "probe.json", "evaluation.json", "extension"} <= left
    status = json.loads((folder / "straight" / "status.json").read_text())
    assert status["state"] == "finished"
    assert not list(Path(folder / "straight" / "stages").rglob("*.partial"))
    record = _steps(folder, "straight", "tune")[-1]
    assert set(record["loss"]) == {"nll", "balance", "z", "router_kl"}
    assert set(record["grad_norm_by_part"]) == {
        "connector",
        "new_experts",
        "new_rows",
        "calibration",
    }
    assert {"text", "image"} == set(record["new_share"])


def test_a_run_is_exported(runs, tmp_path, monkeypatch):
    folder, _ = runs
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    assert cli.main(["export", str(folder / "straight"), str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    live = _weights(folder, "straight")
    for name, value in model.connectors["image"].named_parameters():
        assert torch.equal(value, live[f"connectors.image.{name}"])
    stored = load_file(tmp_path / "out" / "extension" / "extension.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in live.items())
    assert sorted(model.encoders["1"].network.state_dict()) == sorted(
        CLIPVisionModel.from_pretrained(folder / "tower").state_dict()
    )


def test_hot_experts_change_no_number_and_8_bits_no_text(runs):
    folder, _ = runs
    first, plain = _nll(folder, "hot")[0], _nll(folder, "straight")[0]
    assert first == pytest.approx(plain, rel=1e-5)
    rounded = _nll(folder, "packed")[0]
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.05)
    for name in ("hot", "packed"):
        summary = json.loads((folder / name / "summary.json").read_text())
        assert summary["text"]["unchanged"], name


def test_tensor_bytes_of_a_run_stand_beside_the_formula(runs):
    """Between backward and step DeepSpeed has only this rank's part of the gradient left."""
    folder, _ = runs
    summary = json.loads((folder / "straight" / "summary.json").read_text())
    for name in ("align", "tune"):
        stage = summary["stages"][name]
        assert len(stage["tensor_bytes"]) == len(stage["tensor_bytes_formula"]) == 2
        for kinds, formula in zip(
            stage["tensor_bytes"], stage["tensor_bytes_formula"], strict=True
        ):
            trained = 4 * stage["trainable_parameters"]
            assert kinds["trained"] == pytest.approx(trained, rel=0.02)
            assert sum(kinds.values()) + trained / 2 == pytest.approx(formula, rel=0.05)
