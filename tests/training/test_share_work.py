"""Work that one rank does while the others wait: for as long as it lives, and no longer."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from moe_ext.training.build import share_work
from moe_ext.training.topology import Ranks, Topology
from tests.ranks import RankError, run_ranks

TIMEOUT_S = 3.0


def _topology():
    rank, world = dist.get_rank(), dist.get_world_size()
    return Topology(Ranks(rank, world, rank, world), "cpu", 1, 0, None, TIMEOUT_S)


def _long_work():
    def work():
        time.sleep(2 * TIMEOUT_S)
        return f"by {dist.get_rank()}"

    return share_work(_topology(), {"data": (1, work), "base": (0, lambda: "at once")})


def test_work_may_take_longer_than_a_collective_may_wait():
    wanted = {"data": "by 1", "base": "at once"}
    assert run_ranks(_long_work, 2) == [wanted, wanted]


def _worker_dies():
    share_work(_topology(), {"data": (1, lambda: os.kill(os.getpid(), signal.SIGSTOP))})


def test_a_worker_that_is_gone_is_waited_for_no_longer_than_configured():
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 showed no sign of life for parallel.timeout_s=3.0"):
        run_ranks(_worker_dies, 2)
    assert time.monotonic() - began < 120


def _work_fails():
    def work():
        raise ValueError("a reason of its own")

    try:
        share_work(_topology(), {"data": (1, work)})
    except (RuntimeError, ValueError) as error:
        return str(error)


def test_a_failure_is_everybodys():
    ours, theirs = run_ranks(_work_fails, 2)
    assert ours == "rank 1, data: ValueError: a reason of its own"
    assert theirs == "a reason of its own"
