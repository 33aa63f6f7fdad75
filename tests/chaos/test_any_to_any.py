"""A run stopped in mid-stage goes on with another number of ranks, ep_size and ZeRO stage.

A step keeps its sequences, so losses, weights and Adam's moments are those of the run that was not moved,
up to rounding.
"""

import json
import shutil
from itertools import product

import pytest
import torch

from moe_ext.training.checkpoint import KINDS, Published, published
from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.chaos.harness import Chaos
from tests.chaos.points import Kill

SEQUENCES = 4
"""Of a micro-batch, over all ranks."""
Layout = tuple[int, int, int]
"""Ranks, ep_size, ZeRO stage."""
LAYOUTS: list[Layout] = [
    (ranks, ep_size, zero)
    for ranks, ep_size, zero in product((1, 2, 4), (1, 2, 4), (0, 1, 2))
    if ranks % ep_size == 0
]
REFERENCE: Layout = (2, 2, 1)
MORE = (
    *("optim.clip_norm=0", "stages.tune.steps=9", "stages.tune.spike_sigmas=0"),
    "stages.probe.statistics_samples=32",
)
"""DeepSpeed clips by a wrong norm under ZeRO-0, a spike at the rule's very edge is a matter of rounding, and
the probe counts whole batches of 8 samples a rank: 32 are as many on one rank as on four."""
STEPS = 9
IN_TUNE = Kill("backward", 0, number=8 + 4 + 3 * 2 * 2 + 1, signal=15)
"""SIGTERM in the fourth step of `tune`: behind four steps of `align` and two of `probe`."""
AT_ONCE = Kill("backward", 0, number=1, signal=15)
"""SIGTERM in the first step of a start."""


def words(layout: Layout) -> list[str]:
    ranks, ep_size, zero_stage = layout
    stages = [
        f"stages.{s}.sequences_per_rank={SEQUENCES // ranks}" for s in ("align", "probe", "tune")
    ]
    placement = "shard" if ep_size > 1 else "replicate"
    stages.append(f"extension.placement={placement}")
    return [*MORE, *stages, f"parallel.ep_size={ep_size}", f"parallel.zero_stage={zero_stage}"]


def name_of(layout: Layout) -> str:
    return "w{}e{}z{}".format(*layout)


def losses(chaos: Chaos, name: str) -> tuple[list[int], list[float]]:
    """Steps of `tune` as they ran, and their losses."""
    lines = (chaos.folder / name / "metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["event"] == "step" and r["stage"] == "tune"]
    return [r["step"] for r in steps], [r["loss"]["nll"] for r in steps]


def stopped(chaos: Chaos, layout: Layout) -> str:
    """A run of that layout, stopped in its stage `tune`."""
    name = name_of(layout)
    if not (chaos.folder / name).exists():
        chaos.start(name, IN_TUNE, *words(layout), world=layout[0], code=STOPPED_EXIT_CODE)
        steps, _ = losses(chaos, name)
        assert steps[-1] in (4, 5)
    return name


def moved(chaos: Chaos, source: Layout, target: Layout, kill: Kill | None = AT_ONCE) -> str:
    """A copy of a stopped run that went on with another layout, for a step or to its end."""
    name = f"{stopped(chaos, source)}-{name_of(target)}"
    if kill is None:
        name += "-end"
    if not (chaos.folder / name).exists():
        shutil.copytree(chaos.folder / stopped(chaos, source), chaos.folder / name)
        code = STOPPED_EXIT_CODE if kill else 0
        chaos.start(name, kill, *words(target), world=target[0], code=code)
    return name


def newest(chaos: Chaos, name: str) -> Published:
    return Published(published(chaos.folder / name / "stages" / "tune" / "checkpoints")[-1])


def compare(chaos: Chaos, source: Layout, target: Layout) -> None:
    """A step on, losses, weights and moments are those of the run that stayed where it was."""
    unmoved = moved(chaos, REFERENCE, REFERENCE)
    name = moved(chaos, source, target)
    (steps, nll), (their_steps, their_nll) = losses(chaos, name), losses(chaos, unmoved)
    assert steps == their_steps == list(range(1, len(steps) + 1))
    torch.testing.assert_close(nll, their_nll, rtol=2e-5, atol=0)
    ours, theirs = newest(chaos, name), newest(chaos, unmoved)
    assert ours.folder.name == theirs.folder.name
    assert ours.state["adam_step"] == theirs.state["adam_step"] == len(steps)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for tensor, kind in product(theirs.tensors, KINDS):
        wanted = theirs.tensor(tensor, kind)
        spread = 2e-5 if kind == "weight" else 1e-3 * float(wanted.abs().max())
        torch.testing.assert_close(
            ours.tensor(tensor, kind), wanted, rtol=1e-3, atol=spread,
            msg=lambda m: f"{name}, {kind} of {tensor}: {m}",  # noqa: B023
        )  # fmt: skip
    if name != unmoved:
        chaos.forget(name)


FAST = [(2, 2, 0), (1, 1, 2)]


@pytest.mark.parametrize("target", FAST, ids=name_of)
def test_a_run_goes_on_elsewhere(chaos: Chaos, target: Layout) -> None:
    compare(chaos, REFERENCE, target)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", LAYOUTS, ids=name_of)
def test_any_layout_to_any_layout(chaos: Chaos, source: Layout) -> None:
    for target in LAYOUTS:
        if (source, target) != (REFERENCE, REFERENCE):
            compare(chaos, source, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [(4, 2, 2), (1, 1, 1), (4, 4, 0)], ids=name_of)
def test_a_moved_run_ends_as_the_one_that_stayed(chaos: Chaos, target: Layout) -> None:
    stayed = moved(chaos, REFERENCE, REFERENCE, kill=None)
    name = moved(chaos, REFERENCE, target, kill=None)
    (steps, nll), (_, their_nll) = losses(chaos, name), losses(chaos, stayed)
    assert steps == list(range(1, STEPS + 1))
    torch.testing.assert_close(nll, their_nll, rtol=2e-5, atol=0)
    ours, theirs = (
        Published(chaos.folder / n / "stages" / "tune" / "result") for n in (name, stayed)
    )
    for tensor in theirs.tensors:
        torch.testing.assert_close(
            ours.tensor(tensor), theirs.tensor(tensor), rtol=1e-3, atol=2e-5,
            msg=lambda m: f"{tensor}: {m}",  # noqa: B023
        )  # fmt: skip
