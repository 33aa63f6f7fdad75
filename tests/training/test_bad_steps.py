"""A loss that is not finite on one rank: all ranks skip that step, and too many of them end the run."""

import json
import math

import pytest
import torch
import torch.distributed as dist

from moe_ext.compose import CONF_DIR, load
from moe_ext.train import run
from moe_ext.training.checkpoint import Published
from moe_ext.training.engine import Engine
from moe_ext.training.topology import Ranks
from tests.ranks import RankError, run_ranks
from tests.training.tiny import make_inputs, overrides

SETTINGS = ("chain=[align]", "stages.align.steps=8", "stages.align.max_bad_steps=2")


def _run_with(folder, name, bad_steps, *more):
    """The run's exit code, when rank 1's loss is NaN in these steps; and each step's outcome here."""
    backward, step, taken = Engine.backward, Engine.step, []

    def poisoned(self, loss):
        bad = dist.get_rank() == 1 and len(taken) + 1 in bad_steps
        return backward(self, loss * math.nan if bad else loss)

    def noted(self, learning_rate):
        outcome = step(self, learning_rate)
        taken.append(outcome[0])
        return outcome

    Engine.backward, Engine.step = poisoned, noted
    rank, world = dist.get_rank(), dist.get_world_size()
    config = load(CONF_DIR, overrides(folder, name, *SETTINGS, *more))
    code = run(config, Ranks(rank, world, rank, world))
    Engine.backward, Engine.step = backward, step
    return code, taken


def _runs(folder):
    return [
        _run_with(folder, "skips", (2, 4, 5)),
        _run_with(folder, "skips-2", (2, 4, 5), "parallel.zero_stage=2"),
        _run_with(folder, "none", ()),
    ]


def _too_many(folder):
    code, taken = _run_with(folder, "too-many", (3, 4, 5))
    (folder / f"taken-{dist.get_rank()}.json").write_text(json.dumps([code, taken]))
    raise SystemExit(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    make_inputs(folder)
    return folder


def _steps(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == "step"]


def test_all_ranks_skip_the_same_steps(folder):
    ours, theirs = run_ranks(_runs, 2, folder)
    assert ours == theirs
    expected = [n not in (2, 4, 5) for n in range(1, 9)]
    assert [taken for _, taken in ours] == [expected, expected, [True] * 8]
    assert [code for code, _ in ours] == [0, 0, 0]
    assert [r["skipped"] for r in _steps(folder, "skips")] == [0, 1, 1, 2, 3, 3, 3, 3]
    result = Published(folder / "skips" / "stages" / "align" / "result")
    assert all(result.tensor(n).isfinite().all() for n in result.tensors)
    # the step before the first skip is the undisturbed run's, and so are the ones after: not the same
    losses = [[r["loss"]["nll"] for r in _steps(folder, name)] for name in ("skips", "none")]
    assert losses[0][0] == losses[1][0]
    assert losses[0][2] != losses[1][2]
    torch.testing.assert_close(
        [r["loss"]["nll"] for r in _steps(folder, "skips-2") if r["loss"]["nll"] is not None],
        [x for x in losses[0] if x is not None],
        rtol=1e-5,
        atol=0,
    )


def test_too_many_in_a_row_end_the_run_on_all_ranks(folder):
    with pytest.raises(RankError, match="SystemExit"):
        run_ranks(_too_many, 2, folder)
    outcomes = [json.loads((folder / f"taken-{rank}.json").read_text()) for rank in (0, 1)]
    assert outcomes[0] == outcomes[1] == [1, [True, True, False, False, False]]
    status = json.loads((folder / "too-many" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "stages.align.max_bad_steps=2" in status["error"]
