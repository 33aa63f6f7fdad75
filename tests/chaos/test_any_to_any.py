"""A run stopped in mid-stage goes on with another number of ranks, ep_size and ZeRO stage.

A step keeps its sequences, so the losses are those of the run that was not moved, up to rounding.
"""

import json
import shutil

import pytest
import torch

from moe_ext.training.checkpoint import Published
from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.chaos.harness import Chaos
from tests.chaos.points import Kill

SEQUENCES = 4
"""Of a micro-batch, over all ranks."""
TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""Ranks and ep_size."""
IN_TUNE = Kill("backward", 0, number=8 + 4 + 3 * 2 * 2 + 1, signal=15)
"""SIGTERM in the fourth step of `tune`: behind four steps of `align` and two of `probe`."""


def words(ranks: int, ep_size: int, zero_stage: int) -> list[str]:
    stages = [
        f"stages.{s}.sequences_per_rank={SEQUENCES // ranks}" for s in ("align", "probe", "tune")
    ]
    placement = "shard" if ep_size > 1 else "replicate"
    stages.append(f"extension.placement={placement}")
    return [*stages, f"parallel.ep_size={ep_size}", f"parallel.zero_stage={zero_stage}"]


def losses(chaos: Chaos, name: str) -> tuple[list[int], list[float]]:
    """Steps of `tune` as they ran, and their losses."""
    lines = (chaos.folder / name / "metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["event"] == "step" and r["stage"] == "tune"]
    return [r["step"] for r in steps], [r["loss"]["nll"] for r in steps]


def stopped(chaos: Chaos, name: str, ranks: int, *more: str) -> None:
    """A run of that name, stopped in its stage `tune`."""
    chaos.start(name, IN_TUNE, *more, world=ranks, code=STOPPED_EXIT_CODE)
    steps, _ = losses(chaos, name)
    assert steps[-1] in (4, 5)


def moved(chaos: Chaos, source: str, name: str, ranks: int, *more: str) -> None:
    """A copy of a stopped run goes on, and ends with the losses and weights of `straight`."""
    shutil.copytree(chaos.folder / source, chaos.folder / name)
    chaos.start(name, None, *more, world=ranks)
    compare(chaos, name, "straight")
    shutil.rmtree(chaos.folder / name)


def compare(chaos: Chaos, name: str, reference: str) -> None:
    steps, nll = losses(chaos, name)
    assert steps == list(range(1, 8))
    torch.testing.assert_close(nll, losses(chaos, reference)[1], rtol=2e-5, atol=0)
    ours, theirs = (
        Published(chaos.folder / n / "stages" / "tune" / "result") for n in (name, reference)
    )
    assert ours.tensors.keys() == theirs.tensors.keys()
    for tensor in theirs.tensors:
        torch.testing.assert_close(
            ours.tensor(tensor),
            theirs.tensor(tensor),
            rtol=1e-3,
            atol=2e-5,
            msg=lambda m: f"{tensor}: {m}",  # noqa: B023
        )


@pytest.mark.slow
def test_from_two_ranks_to_four_and_to_one(chaos: Chaos) -> None:
    stopped(chaos, "two", 2, *words(2, 2, 1))
    moved(chaos, "two", "two-four", 4, *words(4, 2, 2))
    moved(chaos, "two", "two-one", 1, *words(1, 1, 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", range(len(TOPOLOGIES)))
def test_any_ranks_to_any_ranks(chaos: Chaos, source: int) -> None:
    ranks, ep_size = TOPOLOGIES[source]
    name = f"w{ranks}e{ep_size}"
    stopped(chaos, name, ranks, *words(ranks, ep_size, 1 + source % 2))
    for number, (others, other_ep) in enumerate(TOPOLOGIES):
        stage = 2 - (source + number) % 2  # both stages meet both stages
        moved(chaos, name, f"{name}-w{others}e{other_ep}", others, *words(others, other_ep, stage))


@pytest.mark.slow
def test_to_and_from_no_zero(chaos: Chaos) -> None:
    """Without clipping, which DeepSpeed does by a wrong norm there."""
    unclipped = "optim.clip_norm=0"
    chaos.start("unclipped", None, unclipped)
    for source, target in ((0, 1), (1, 0), (0, 2), (0, 0)):
        name = f"z{source}-z{target}"
        stopped(chaos, name, 2, *words(2, 2, source), unclipped)
        chaos.start(name, None, *words(1, 1, target), unclipped, world=1)
        compare(chaos, name, "unclipped")
