"""A loss that is not finite, or a spike, on one rank: all ranks skip that step, too many end the run."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_ext.compose import CONF_DIR, load
from moe_ext.train import run
from moe_ext.training.bad_steps import why_bad
from moe_ext.training.checkpoint import Published
from moe_ext.training.engine import Engine
from moe_ext.training.topology import Ranks
from tests.ranks import RankError, run_ranks
from tests.training.tiny import make_inputs, overrides

SETTINGS = ("chain=[align]", "stages.align.steps=8", "stages.align.max_bad_steps=2")
SPIKE = 1e3
JUDGED = ("stages.align.spike_window=4",)
"""From the third step on: half of the window is known then."""
UNCLIPPED = ("parallel.zero_stage=0", "optim.clip_norm=0")


def _run_with(folder, name, bad_steps, *more, times=math.nan, of="gradient", first=1, stop_in=0):
    """The run's exit code, and each step's outcome on this rank.

    In `bad_steps` rank 1's loss or gradient is multiplied; this start's steps count from `first`, and
    rank 0 is asked to stop during the backward pass of step `stop_in`, this start's last.
    """
    kept, taken = (Engine.__call__, Engine.backward, Engine.step), []

    def is_bad(what):
        return what == of and dist.get_rank() == 1 and len(taken) + first in bad_steps

    def forward(self, *args):
        output = kept[0](self, *args)
        return replace(output, nll_Z=output.nll_Z * times) if is_bad("loss") else output

    def backward(self, loss):
        if dist.get_rank() == 0 and len(taken) + first == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return kept[1](self, loss * times if is_bad("gradient") else loss)

    def step(self, *args, **options):
        outcome = kept[2](self, *args, **options)
        taken.append(outcome[0])
        return outcome

    Engine.__call__, Engine.backward, Engine.step = forward, backward, step
    rank, world = dist.get_rank(), dist.get_world_size()
    config = load(CONF_DIR, overrides(folder, name, *SETTINGS, *more))
    code = run(config, Ranks(rank, world, rank, world))
    Engine.__call__, Engine.backward, Engine.step = kept
    return code, taken


NAN, SPIKES = (2, 4, 5), (4, 6, 7)
ZERO_2, BF16 = "parallel.zero_stage=2", "parallel.precision=bf16"


def _runs(folder):
    data = {"times": SPIKE, "of": "loss"}
    return {
        "none": _run_with(folder, "none", ()),
        "skips": _run_with(folder, "skips", NAN),
        "skips-2": _run_with(folder, "skips-2", NAN, ZERO_2),
        # the same steps by each rule: not finite, and a spike of the loss
        "nan": _run_with(folder, "nan", SPIKES, *JUDGED),
        "spikes": _run_with(folder, "spikes", SPIKES, *JUDGED, **data),
        # stopped in the middle of the window, it goes on with a spike
        "stopped": _run_with(folder, "resumed", SPIKES, *JUDGED, **data, stop_in=6),
        "resumed": _run_with(folder, "resumed", SPIKES, *JUDGED, **data, first=7),
    }


def _gradient_spikes(folder):
    ways = {
        "zero-0": UNCLIPPED, "zero-1": (), "zero-2": (ZERO_2,),
        "bf16": (BF16,), "bf16-2": (BF16, ZERO_2), "off": ("stages.align.spike_sigmas=0",),
    }  # fmt: skip
    return {n: _run_with(folder, n, SPIKES, *JUDGED, *w, times=SPIKE) for n, w in ways.items()}


def _too_many(folder):
    code, taken = _run_with(folder, "too-many", (3, 4, 5), *JUDGED, times=SPIKE)
    (folder / f"taken-{dist.get_rank()}.json").write_text(json.dumps([code, taken]))
    raise SystemExit(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    return run_ranks(_runs, 2, folder, timeout_s=300)


def _weights(folder, name):
    result = Published(folder / name / "stages" / "align" / "result")
    return {tensor: result.tensor(tensor) for tensor in result.tensors}


def _steps(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == "step"]


def test_all_ranks_skip_the_same_steps(folder, outcomes):
    ours, theirs = outcomes
    assert ours == theirs
    expected = [n not in (2, 4, 5) for n in range(1, 9)]
    assert ours["skips"] == ours["skips-2"] == (0, expected)
    assert ours["none"] == (0, [True] * 8)
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


def _check_reasons(folder, name, what):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    skipped = [e for e in map(json.loads, lines) if e["event"] == "skipped_step"]
    assert [e["step"] for e in skipped] == list(SPIKES)
    assert all(e["reason"].startswith(what) and "is a spike" in e["reason"] for e in skipped)


def test_a_spike_is_skipped_as_what_is_not_finite(folder, outcomes):
    expected = [n not in SPIKES for n in range(1, 9)]
    for name in ("nan", "spikes"):
        assert outcomes[0][name] == outcomes[1][name] == (0, expected), name
    # whatever made a step bad, nothing of it remains: the weights are equal, bit for bit
    wanted = _weights(folder, "nan")
    spiked = _weights(folder, "spikes")
    assert wanted.keys() == spiked.keys()
    assert all(torch.equal(wanted[name], spiked[name]) for name in wanted)
    _check_reasons(folder, "spikes", "loss")
    norms = [r["grad_norm"] for r in _steps(folder, "spikes")]
    assert min(norms[n - 1] for n in SPIKES) > 100 * norms[2]  # recorded as it was
    assert [r["skipped"] for r in _steps(folder, "spikes")] == [0, 0, 0, 1, 1, 2, 3, 3]


@pytest.mark.slow
def test_a_spike_of_the_gradient_alone_is_skipped_whatever_holds_it(folder):
    ours, theirs = run_ranks(_gradient_spikes, 2, folder, timeout_s=300)
    assert ours == theirs
    assert ours.pop("off") == (0, [True] * 8)  # without the rule it is taken
    for name, outcome in ours.items():
        assert outcome == (0, [n not in SPIKES for n in range(1, 9)]), name
        _check_reasons(folder, name, "gradient norm")


def test_a_resumed_run_judges_by_the_same_past(folder, outcomes):
    """A new past would let step 7 pass, the first after the stop."""
    for of_rank in outcomes:
        assert of_rank["stopped"] == (75, [True, True, True, False, True, False])
        assert of_rank["resumed"] == (0, [False, True])
    straight, resumed = (
        [{k: r[k] for k in ("step", "loss", "grad_norm", "skipped")} for r in _steps(folder, name)]
        for name in ("spikes", "resumed")
    )
    assert straight == resumed
    wanted, got = _weights(folder, "spikes"), _weights(folder, "resumed")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_what_is_a_spike():
    # losses of mean 2 and deviation 0.5, and a constant norm
    past = [[2.0 + 0.5 * (-1) ** n, 1.0] for n in range(8)]
    assert why_bad(4.9, 1.0, past, sigmas=6, window=8) == ""
    assert "loss 5.1 is a spike" in why_bad(5.1, 1.0, past, sigmas=6, window=8)
    assert why_bad(5.1, 1.0, past, sigmas=0, window=8) == ""
    assert why_bad(5.1, 1.0, past[:3], sigmas=6, window=8) == ""  # too little is known
    assert why_bad(5.1, 1.0, past[:4], sigmas=6, window=8) != ""
    assert why_bad(0.0, 0.0, past, sigmas=6, window=8) == ""  # a fall is none
    # a norm that never changed: its deviation counts as a tenth of its mean
    assert why_bad(2.0, 1.59, past, sigmas=6, window=8) == ""
    assert "gradient norm 1.61" in why_bad(2.0, 1.61, past, sigmas=6, window=8)
    assert why_bad(math.nan, 1.0, [], sigmas=0, window=8) == "loss not finite"
    assert why_bad(1.0, math.inf, [], sigmas=0, window=8) == "gradient not finite"


def test_too_many_in_a_row_end_the_run_on_all_ranks(folder):
    with pytest.raises(RankError, match="SystemExit"):
        run_ranks(_too_many, 2, folder)
    outcomes = [json.loads((folder / f"taken-{rank}.json").read_text()) for rank in (0, 1)]
    assert outcomes[0] == outcomes[1] == [1, [True, True, False, False, False]]
    status = json.loads((folder / "too-many" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "stages.align.max_bad_steps=2" in status["error"]
    assert "is a spike" in status["error"]
    assert "stages.align.spike_sigmas=8" in status["error"]
