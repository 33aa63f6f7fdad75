"""A signal to one rank stops all ranks at the same step, and a stale copy of a run cannot write."""

import os
import signal
from pathlib import Path

import pytest

from moe_ext.training.ownership import StaleRunError, claim, read_status
from moe_ext.training.signals import StopFlag
from tests.ranks import run_ranks


def _loop_until_agreed(signalled_rank: int, number: int) -> tuple[int, str]:
    """Step at which this rank leaves the loop, when one rank receives a signal in step 3."""
    rank = int(os.environ["RANK"])
    with StopFlag() as stop:
        for step in range(1, 10):
            if step == 3 and rank == signalled_rank:
                os.kill(os.getpid(), number)
            if stop.agreed():
                return step, stop.reason
    return 0, ""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(number: signal.Signals) -> None:
    results = run_ranks(_loop_until_agreed, 2, 1, int(number))
    assert results == [(3, ""), (3, number.name)]


def test_without_a_process_group_the_flag_is_this_process_own() -> None:
    with StopFlag() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_interrupt_interrupts() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_newest_start_owns_the_folder(tmp_path: Path) -> None:
    first = claim(tmp_path / "run")
    first.check()
    second = claim(tmp_path / "run")
    second.check()
    with pytest.raises(StaleRunError, match="newer start of this run .*stops without writing"):
        first.check()


def test_the_owner_says_how_the_run_stands_and_a_stale_copy_does_not(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    stale, owner = claim(tmp_path), claim(tmp_path)
    owner.write_status("running", "tune", 7)
    stale.write_status("failed", "tune", 6, "Traceback\n  line\nRuntimeError: peer closed\n")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.stage, status.step, status.error) == ("running", "tune", 7, "")
    owner.write_status("failed", "tune", 8, "Traceback\n  line\nValueError: a reason\n")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.error) == ("failed", "ValueError: a reason")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["owner.json", "status.json"]
