"""A run of two ranks is preempted again and again: it publishes, leaves, goes on, and ends as if nobody had.

What W&B holds of it, offline, is looked at after every start: its steps never run backwards, and it is one
run, under the id that the checkpoints carry.
"""

import json
import random
import signal

import pytest

from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.chaos.harness import Chaos, compare
from tests.chaos.points import Kill
from tests.infra.wandb_records import history_of

wandb = pytest.importorskip("wandb")
TRACKED = "tracking.wandb=true"


def recorded_steps(chaos: Chaos, name: str) -> list[int]:
    """`_step` of every row that W&B holds of the run, stage after stage as they were begun."""
    steps = []
    folders = sorted((chaos.folder / name / "wandb").glob("offline-run-*"))
    for stage in ("align", "probe", "tune"):
        of_stage = [folder for folder in folders if folder.name.endswith(f"-{stage}")]
        assert len(of_stage) <= 1  # what an earlier start left has been replaced
        for folder in of_stage:
            steps += [row["_step"] for row in history_of(folder)]
    return steps


def ids_in_checkpoints(chaos: Chaos, name: str) -> set[str]:
    """Ids of W&B in the checkpoints of the stage that was left; none between two stages."""
    manifests = (chaos.folder / name / "stages").glob("*/checkpoints/step-*/manifest.json")
    return {json.loads(m.read_text())["state"]["tracking"]["wandb_id"] for m in manifests}


def preempted(chaos: Chaos, name: str, times: int, every: int, *more: str) -> None:
    """A run that is asked to stop so many times, by either signal, to either rank, a few steps on.

    Half-way its checkpoints alone are left of what names it in W&B, as if carried to another place.
    """
    rng = random.Random(times)
    known: list[int] = []
    identity, carried = "", False
    file = chaos.folder / name / "wandb_id"
    for number in range(times):
        # the request comes in the backward pass of a step, which is the start's last
        kill = Kill(
            "backward",
            rng.randrange(2),
            number=rng.randrange(1, every + 1),
            signal=rng.choice([signal.SIGTERM, signal.SIGUSR2]),
        )
        chaos.start(name, kill, TRACKED, *more, code=STOPPED_EXIT_CODE)
        steps = recorded_steps(chaos, name)
        assert steps == list(range(1, len(steps) + 1))
        assert steps[: len(known)] == known  # nothing that was there is gone
        assert len(steps) > len(known)
        known = steps
        identity = identity or file.read_text()
        assert file.read_text() == identity
        held = ids_in_checkpoints(chaos, name)
        assert held <= {identity}
        if held and number >= times // 2 and not carried:
            file.unlink()
            carried = True
    assert carried
    chaos.start(name, None, TRACKED, *more)
    found = chaos.evidence(name)
    # who is asked in a stage's last step leaves before the next one, with nothing to resume from
    assert times - 3 <= len(found["resumed"]) <= times
    assert recorded_steps(chaos, name) == list(range(1, len(found["steps"]) + 1))
    folders = [folder.name for folder in file.parent.glob("wandb/offline-run-*")]
    assert folders and all(f"-{identity}-" in folder for folder in folders)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_three_preemptions_cost_nothing(chaos: Chaos) -> None:
    preempted(chaos, "preempted", 3, 1)
    found = chaos.evidence("preempted")
    assert len(found["steps"]) == len(chaos.reference["steps"])  # no step ran twice
    compare(found, chaos.reference)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_preemptions_cost_nothing(chaos: Chaos) -> None:
    longer = (
        *("stages.align.steps=24", "stages.tune.steps=40"),
        *("stages.tune.spike_sigmas=2", "stages.tune.max_bad_steps=40"),
    )
    chaos.start("long", None, *longer)
    reference = chaos.evidence("long")
    preempted(chaos, "preempted-20", 20, 3, *longer)
    found = chaos.evidence("preempted-20")
    assert len(found["steps"]) == len(reference["steps"]) == 24 + 2 + 40
    compare(found, reference)
