"""A request to one rank stops all ranks at the same step, and a stale copy of a run cannot write."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_ext.config import TrackingConfig
from moe_ext.training import ownership, tracking
from moe_ext.training.ownership import StaleRunError, claim, joined, read_status
from moe_ext.training.signals import StopFlag
from moe_ext.training.tracking import Tracker
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


def test_a_file_asks_for_good_and_goes_once_it_is_answered(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    with StopFlag(file) as stop:
        assert not stop.requested
        file.touch()
        stop._looked -= 1.0  # it looks once a second
        assert stop.agreed()
        assert (stop.for_good, stop.reason) == (True, "stop")
        stop.answered()
    assert not file.exists()
    with StopFlag(file) as stop:
        os.kill(os.getpid(), signal.SIGUSR2)  # a scheduler's: it may start the run again
        assert (stop.requested, stop.for_good) == (True, False)


def test_a_signal_that_was_blocked_during_the_start_is_heard() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    # to this thread: another one of this process does not block it, and would end the process
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
    with StopFlag() as stop:
        assert stop.reason == "SIGUSR2"


LISTENS_LATE = """
import signal, sys, time
time.sleep(0.2)
heard = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: heard.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR2))
time.sleep(0.3)
sys.exit(75 if heard else 1)
"""


def test_no_request_is_lost_while_a_rank_of_slurm_starts() -> None:
    """Whenever SIGUSR2 comes, the rank ends with a code that means `asked to stop`: 140 before Python
    listens, 75 after. SIGTERM never kills it once rank.sh has begun."""
    script = Path(__file__).resolve().parents[2] / "launchers" / "rank.sh"
    numbers = dict.fromkeys(("PROCID", "LOCALID", "NODEID"), "0") | {"NTASKS": "1", "NNODES": "1"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in numbers.items()}
    started: dict[str, list[subprocess.Popen]] = {"SIGUSR2": [], "SIGTERM": []}
    for name, processes in started.items():
        for delay_ms in range(0, 100, 8):
            command = [str(script), sys.executable, "-c", LISTENS_LATE]
            processes.append(subprocess.Popen(command, env=environment))
            while name == "SIGTERM" and not _outlives_sigterm(processes[-1].pid):
                pass
            time.sleep(delay_ms / 1000)
            processes[-1].send_signal(getattr(signal, name))
    codes = {name: [p.wait(60) for p in processes] for name, processes in started.items()}
    assert set(codes["SIGUSR2"]) <= {-signal.SIGUSR2, 140, 75}, codes  # srun says 140 for the first
    # 1: it came in the moment between rank.sh and env, and was ignored
    assert set(codes["SIGTERM"]) <= {75, 1}, codes
    assert codes["SIGTERM"].count(75) > len(codes["SIGTERM"]) // 2


def _outlives_sigterm(pid: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text()
    masks = [int(text.partition(key)[2].split()[0], 16) for key in ("SigIgn:", "SigBlk:")]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".owner.lock",
        "owner.json",
        "status.json",
    ]


def test_a_copy_from_before_a_requeue_cannot_take_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    owner = claim(tmp_path)
    owner.write_status("running", "tune", 7)
    monkeypatch.delenv(
        "SLURM_RESTART_COUNT"
    )  # the first start: it hung, and only now comes this far
    with pytest.raises(StaleRunError, match="job 12 restart 1"):
        claim(tmp_path)
    owner.check()
    status = read_status(tmp_path)
    assert status is not None
    assert (status.stage, status.step) == ("tune", 7)
    monkeypatch.setenv("SLURM_JOB_ID", "13")  # another job is another matter: the last that comes
    claim(tmp_path).check()


def test_a_stale_copy_records_nothing(tmp_path: Path) -> None:
    stale, owner = claim(tmp_path), claim(tmp_path)
    quiet = TrackingConfig(wandb=False, progress=False)
    theirs = Tracker(tmp_path, {}, quiet, owned=stale.check)
    ours = Tracker(tmp_path, {}, quiet, owned=owner.check)
    ours.event("resume")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for write in (
        lambda: theirs.step({"stage": "tune", "step": 2}, 2),
        lambda: theirs.event("resume"),
        lambda: theirs.stage({"stage": "tune"}),
    ):
        with pytest.raises(StaleRunError):
            write()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before != b""
    assert joined(tmp_path) == owner


def test_a_copy_that_records_looks_every_few_seconds_whose_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, asked = [100.0], []
    clock = SimpleNamespace(monotonic=lambda: now_s[0], time=time.time)
    monkeypatch.setattr(tracking, "time", clock)
    mine = claim(tmp_path)

    def owned() -> None:
        asked.append(now_s[0])
        mine.check()

    quiet = TrackingConfig(wandb=False, progress=False)
    tracker = Tracker(tmp_path, {}, quiet, owned=owned)
    for now_s[0] in (100.0, 102.0, 104.9, 105.0, 109.0):
        tracker.event("resume")
    assert asked == [100.0, 105.0]
    claim(tmp_path)
    with pytest.raises(StaleRunError), mine.held():  # whoever publishes is not given those seconds
        pass
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for now_s[0] in (110.0, 110.1):
        with pytest.raises(StaleRunError):
            tracker.event("resume")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def _start_together(barrier) -> None:
    global together
    together = barrier


def _takes_over_and_writes(folder: Path, turns: int) -> int:
    """Claims the folder again and again and, while it owns it, writes in two halves; how often it did."""
    written = 0
    together.wait()
    for _ in range(turns):
        mine = claim(folder)
        for _ in range(3):
            try:
                with mine.held():
                    (folder / "half").write_text(mine.token)
                    time.sleep(0.001)
                    assert (folder / "half").read_text() == mine.token
                    written += 1
            except StaleRunError:
                break
    return written


def test_starts_at_the_same_instant_do_not_write_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(4, _start_together, [context.Barrier(4, timeout=60)]) as pool:
        written = pool.starmap(_takes_over_and_writes, [(tmp_path, 100)] * 4, chunksize=1)
    assert all(written)
    assert min(written) < 300  # they did get into each other's way


def test_a_lock_that_is_never_released_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "LOCK_WAIT_S", 0.1)
    mine = claim(tmp_path)
    with open(tmp_path / ".owner.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(TimeoutError, match=r"owner.lock has been locked .* end it"),
            mine.held(),
        ):
            pass
