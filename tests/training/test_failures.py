"""What goes wrong on one rank ends the run on all, with the cause by name and in time."""

import json
import os
import signal
import time

import pytest
import torch.distributed as dist

from moe_ext.compose import CONF_DIR, load
from moe_ext.data import write_shards
from moe_ext.train import run
from moe_ext.training.engine import Engine
from moe_ext.training.topology import Ranks
from tests.data.inputs import pair
from tests.ranks import RankError, run_ranks
from tests.training.tiny import make_inputs, overrides

TIMEOUT_S = 8


def _start(folder, name, *more):
    rank, world = dist.get_rank(), dist.get_world_size()
    config = load(CONF_DIR, overrides(folder, name, "chain=[align]", *more))
    began = time.monotonic()
    code = run(config, Ranks(rank, world, rank, world))
    (folder / name / f"rank-{rank}.json").write_text(json.dumps([code, time.monotonic() - began]))
    raise SystemExit(code)  # as the real entry does: nobody waits for a broken group


def _on_rank_1_in_step(number, act):
    step = Engine.step

    def counted(self, *args, **options):
        self.steps_seen = getattr(self, "steps_seen", 0) + 1
        if dist.get_rank() == 1 and self.steps_seen == number:
            act()
        return step(self, *args, **options)

    Engine.step = counted


def _raises(folder):
    def act():
        raise ArithmeticError("a reason of its own")

    _on_rank_1_in_step(3, act)
    _start(folder, "raises")


def _dies(folder):
    _on_rank_1_in_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    _start(folder, "dies", f"parallel.timeout_s={TIMEOUT_S}")


def _hangs(folder):
    _on_rank_1_in_step(3, lambda: time.sleep(600))
    _start(folder, "hangs", f"parallel.timeout_s={TIMEOUT_S}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    make_inputs(folder)
    return folder


def _status(folder, name):
    return json.loads((folder / name / "status.json").read_text())


def test_an_error_on_one_rank_is_the_runs_error(folder):
    with pytest.raises(RankError, match="SystemExit"):
        run_ranks(_raises, 2, folder, timeout_s=240)
    status = _status(folder, "raises")
    assert status["state"] == "failed"
    assert status["error"] == "rank 1: ArithmeticError: a reason of its own"
    assert (status["stage"], status["step"]) == ("align", 2)


def test_a_rank_that_hangs_is_waited_for_no_longer_than_configured(folder):
    began = time.monotonic()
    with pytest.raises(RankError, match="SystemExit"):
        run_ranks(_hangs, 2, folder, timeout_s=240)
    assert time.monotonic() - began < 200
    status = _status(folder, "hangs")
    assert status["state"] == "failed"
    assert "Timed out" in status["error"]
    assert status["error"].startswith("rank 0")
    assert "rank 1 (host " in status["error"]
    assert f"lives but did not come within parallel.timeout_s={TIMEOUT_S}" in status["error"]
    code, _ = json.loads((folder / "hangs" / "rank-0.json").read_text())
    assert code == 1


def test_a_dead_rank_is_named_by_the_one_that_is_left(folder):
    with pytest.raises(RankError):
        run_ranks(_dies, 2, folder, timeout_s=240, patience_s=10.0)
    status = _status(folder, "dies")
    assert status["error"].startswith("rank 0: RuntimeError: ")
    assert "rank 1 (host " in status["error"]
    assert "showed no sign of life: dead, stopped or cut off" in status["error"]


def _bad(folder):
    manifest = f"data.streams.train.manifest={folder}/bad/shard.json"
    _start(folder, "bad", manifest, "data.bad_sample_budget=5", "connector.closed_form_samples=0")


def test_too_many_bad_samples_end_the_run_by_name(folder):
    """Half of them on each rank: neither alone is above the budget."""
    write_shards(
        (("train", {**pair(i), **({} if i % 2 else {"png": b"broken"})}) for i in range(80)),
        folder / "bad",
    )
    with pytest.raises(RankError, match="SystemExit"):
        run_ranks(_bad, 2, folder, timeout_s=240)
    status = _status(folder, "bad")
    assert status["state"] == "failed"
    assert "TooManyBadSamples: 6 samples could not be used" in status["error"]
    assert "data.bad_sample_budget=5" in status["error"]
    for rank in (0, 1):
        code, seconds = json.loads((folder / "bad" / f"rank-{rank}.json").read_text())
        assert code == 1 and seconds < 60
