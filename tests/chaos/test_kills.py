"""Ranks of a real chain are killed at named points; resumed, it ends as if nothing had happened.

`make chaos KILLS=1000` goes on for as long as one likes.
"""

import random

import pytest

from tests.chaos.harness import Chaos, Lost, compare
from tests.chaos.points import ANYWHERE, POINTS, Kill

FAST = (
    *("middle of a shard", "forward", "exchange", "optimizer"),
    *("writing", "before rename", "hand-over", "evaluation"),
)


def kill_at(chaos: Chaos, name: str, seed: int, points: list[str]) -> list[str]:
    """Points of the kills that happened, in one run that ended equal."""
    starts = list(chaos.chain(name, random.Random(seed), points, most=len(points) + 1))
    assert not starts[-1].killed
    return [start.kill.point for start in starts if start.killed and start.kill]


def test_kills_at_eight_places_lose_nothing(chaos: Chaos) -> None:
    assert len(kill_at(chaos, "fast", 1, list(FAST))) >= 6
    steps = [step for step in chaos.reference["steps"] if step["stage"] == "tune"]
    assert 0 < steps[-1]["skipped"] < len(steps)  # spikes, judged alike after every kill


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_every_place_lose_nothing(chaos: Chaos) -> None:
    done: set[str] = set()
    for seed in range(20):
        missing = [point for point in (*POINTS, ANYWHERE) if point not in done]
        done |= set(kill_at(chaos, f"every-{seed}", seed, missing[:8]))
        if not missing:
            break
    assert done == {*POINTS, ANYWHERE}


def test_the_undisturbed_run_reads_every_sample_once(chaos: Chaos) -> None:
    """What the disturbed ones are compared with: the global order without a gap, over both ranks."""
    for stage, steps, accumulation in (("align", 4, 1), ("tune", 7, 2)):
        lines = [
            [line for line in chaos.reference["data"][rank] if line[0] == stage] for rank in (0, 1)
        ]
        a_step = accumulation * 2 * 2  # of two sequences on two ranks
        for of_rank in lines:
            assert [line[1] for line in of_rank] == [
                s for s in range(steps) for _ in range(accumulation)
            ]
            assert [line[2] for line in of_rank] == [a_step * (line[1] + 1) for line in of_rank]
        keys = [key for both in zip(*lines, strict=True) for line in both for key in line[3]]
        assert len(keys) == len(set(keys)) == a_step * steps  # less than an epoch: each once


def test_a_loss_would_be_noticed(chaos: Chaos) -> None:
    """The judge itself: a changed loss, a missing step, a sample read in another place."""
    found = {**chaos.reference, "steps": [dict(s) for s in chaos.reference["steps"]]}
    compare(found, chaos.reference)
    found["steps"][3]["grad_norm"] *= 1 + 1e-15
    with pytest.raises(Lost, match="step"):
        compare(found, chaos.reference)
    found["steps"] = chaos.reference["steps"][:-1]
    with pytest.raises(Lost, match="missing"):
        compare(found, chaos.reference)
    found["steps"] = chaos.reference["steps"]
    found["data"] = {**found["data"], 1: found["data"][1][:-1]}
    with pytest.raises(Lost, match="other samples"):
        compare(found, chaos.reference)


def test_a_kill_is_a_kill(chaos: Chaos) -> None:
    start = chaos.start("killed", Kill("backward", 1, 2))
    assert start.codes[1] == -9
    assert start.codes[0] == 1  # it noticed, and said so
    assert "closed by peer" in chaos.logs("killed") or "reset by peer" in chaos.logs("killed")


def test_the_first_stage_goes_on_from_its_first_checkpoint(chaos: Chaos) -> None:
    """What no optimizer holds (the connector's standardisation) is the checkpoint's, too."""
    chaos.start("first", Kill("after rename", 0), alone=False)
    chaos.start("first")
    found = chaos.evidence("first")
    assert found["resumed"] == [("align", 2)]
    compare(found, chaos.reference)
