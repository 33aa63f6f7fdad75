"""The test helper itself: results by rank, the first error, and no hang."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _second_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a reason")
    dist.barrier()


def _second_rank_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def test_results_come_back_by_rank():
    assert run_ranks(_sum_of_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_the_first_error_is_the_one_raised():
    with pytest.raises(RankError, match="rank 1 of 2 failed(.|\n)*ValueError: a reason"):
        run_ranks(_second_rank_fails, 2)


def test_a_hang_is_ended_and_located():
    start = time.monotonic()
    with pytest.raises(RankError, match="still ran after(.|\n)*_second_rank_sleeps"):
        run_ranks(_second_rank_sleeps, 2, timeout_s=12)
    assert time.monotonic() - start < 20
