"""A request to stop where no step runs: heard after the pass under way, and nothing is lost by it."""

import json
import random
import signal

from moe_ext.training.ownership import read_status
from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.chaos.harness import Chaos, compare
from tests.chaos.points import Kill

REQUESTS = [
    # point, passing at which the request comes, stage that the run has reached
    ("evaluation", 1, ""),  # the base on text, before anything is trained
    ("probe", 1, "probe"),  # counting selections before the probe's steps
    ("probe", 3, "probe"),  # and after them
    ("surgery", 1, "extend"),
    ("evaluation", 3, "tune"),  # the final evaluation
]


def test_every_request_is_heard_and_costs_nothing(chaos: Chaos) -> None:
    """One run, asked to stop at each of these places in turn, ends as the one that was not."""
    rng, run_dir = random.Random(0), chaos.folder / "asked"
    for point, number, stage in REQUESTS:
        rank, wanted = rng.randrange(2), rng.choice([signal.SIGTERM, signal.SIGUSR2])
        kill = Kill(point, rank, number, signal=wanted)
        start = chaos.start("asked", kill, code=STOPPED_EXIT_CODE)
        state = read_status(run_dir)
        assert state is not None
        assert (state.state, state.stage) == ("stopped", stage)
        left_at = json.loads((chaos.side("asked") / f"passed-{rank}.json").read_text())
        assert start.passed[point] == number
        # a step may be under way when selections after the probe are about to be counted: none begins
        assert left_at.get("optimizer", 0) == start.passed.get("optimizer", 0)
        assert left_at.get("evaluation", 0) <= start.passed.get("evaluation", 0) + 3
    chaos.start("asked")
    assert len(chaos.evidence("asked")["steps"]) == len(chaos.reference["steps"])  # none ran twice
    compare(chaos.evidence("asked"), chaos.reference)
