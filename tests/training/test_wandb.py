"""The real W&B client, offline and against a server that fails in every way: the loop goes on, ends in
time, and what W&B holds in the end is the JSONL, once, in order."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.infra.tracked_loop import record
from tests.infra.wandb_records import history_of, records_of
from tests.infra.wandb_server import WandbServer

pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def environment(home: Path, url: str = "", key: str = "k" * 40, mode: str = "") -> dict[str, str]:
    """A machine's variables with a home of its own, so that no login of this one counts."""
    home.mkdir(parents=True, exist_ok=True)
    names = {"HOME": str(home), "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true"}
    names |= {"WANDB_BASE_URL": url} if url else {}
    names |= {"WANDB_API_KEY": key} if key else {}
    names |= {"WANDB_MODE": mode} if mode else {}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "NETRC"))}
    return kept | names


def start(
    run_dir: Path, variables: dict[str, str], *options: str, before: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.infra.tracked_loop", str(run_dir), *options]
    return subprocess.Popen(
        [*before, *words],
        env=variables,
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def steps_in(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r["step"] for r in map(json.loads, lines) if r["event"] == "step"]


CASES = {
    # name: (server's fault, after so many posts, variables, options, what the console says)
    "no key": ("", 0, {"key": ""}, (), "records offline"),
    "disabled": ("", 0, {"mode": "disabled"}, (), None),
    "no network": ("", 0, {"url": "http://10.77.0.1"}, (), "W&B online failed"),
    "no such host": ("", 0, {"url": "http://wandb.invalid"}, (), "W&B online failed"),
    "connection refused": ("", 0, {"url": "http://127.0.0.1:9"}, (), "W&B online failed"),
    "hangs at the start": ("hang", 0, {}, (), "W&B online failed"),
    "500 at the start": ("500", 0, {}, (), "W&B online failed"),
    "401 at the start": ("401", 0, {}, (), "W&B online failed"),
    "500 later": ("500", 1, {}, ("--pause", "0.2"), None),
    "hangs later": ("hang", 1, {}, ("--pause", "0.2"), None),
    "hangs at an alert": (
        "hang",
        1,
        {},
        ("--pause", "0.2", "--dead-expert", "15"),
        "W&B is off from here on: TimeoutError",
    ),
    "its service is killed": (
        "none",
        0,
        {},
        ("--kill-service-at", "10"),
        "W&B is off from here on",
    ),
    "all is well": ("none", 0, {}, (), None),
}
WAITING = ("no network", "no such host", "connection refused", "hangs at the start")
"""Cases that wait for the client's own limits, a quarter of a minute after ours."""
LIMIT_S = 40.0
"""On top of three times what the loop takes when all is well, so that a busy machine is no failure.
W&B's own defaults take 106 s at the start without a network, and for ever when the server hangs later."""


@pytest.mark.parametrize("waiting", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whatever_fails_the_loop_ends_in_time_and_the_record_is_whole(
    tmp_path: Path, waiting: bool
) -> None:
    chosen = [name for name in CASES if (name in WAITING) == waiting or name == "all is well"]
    if "no network" in chosen and (os.geteuid() != 0 or not shutil.which("unshare")):
        chosen.remove("no network")  # a namespace of its own needs root
    with ExitStack() as stack:
        started, servers = {}, {}
        for name in chosen:
            fault, after, variables, options, _ = CASES[name]
            folder = tmp_path / name.replace(" ", "-")
            given = {"url": "http://127.0.0.1:9"} | variables
            if fault:
                servers[name] = stack.enter_context(WandbServer(fault, after))
                given["url"] = servers[name].url
            words = ("--to", str(STEPS), "--timeout", "3", *options)
            alone = ("unshare", "--net") if name == "no network" else ()
            variables = environment(folder / "home", **given)
            started[name] = start(folder, variables, *words, before=alone)
        began = time.monotonic()
        limit_s = 240.0
        for name in reversed(chosen):  # the one that fares well is the last
            process = started[name]
            left_s = began + limit_s - time.monotonic()
            try:
                out, _ = process.communicate(timeout=max(0.1, left_s))
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{name}: still there after {limit_s:.0f} s") from None
            if name == "all is well":
                limit_s = LIMIT_S + 3 * (time.monotonic() - began)
            says = CASES[name][4]
            assert process.returncode == 0, f"{name}: {out}"
            assert "done" in out.splitlines(), f"{name}: {out}"
            assert (says or "") in out, f"{name}: {out}"
            assert ("W&B" in out) == (says is not None), f"{name}: {out}"
            assert steps_in(tmp_path / name.replace(" ", "-")) == list(range(1, STEPS + 1)), name
        well = servers["all is well"]
        (run,) = well.streams
        assert [row["_step"] for row in well.history(run)] == list(range(101, 101 + STEPS))


@pytest.mark.parametrize("starts", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_over_preemptions_and_kills_each_step_is_there_once_and_in_order(
    tmp_path: Path, starts: int
) -> None:
    """Each start resumes some steps before the last one's end: even ones are asked to stop, odd ones
    are killed."""
    run_dir, variables = tmp_path / "run", environment(tmp_path / "home", mode="offline")
    at, last = 1, 6 * starts
    for number in range(starts):
        end = 6 * (number + 1)
        how = ["--kill-at", "--stop-at"][number % 2]
        process = start(run_dir, variables, "--from", str(at), "--to", str(last), how, str(end))
        process.communicate(timeout=240)
        assert process.returncode == (75 if how == "--stop-at" else -9)
        at = end - 2  # the checkpoint lies some steps back
    process = start(run_dir, variables, "--from", str(at), "--to", str(last))
    process.communicate(timeout=240)
    assert len(steps_in(run_dir)) > last  # the JSONL does hold some steps twice
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    history = history_of(folder)
    assert [row["_step"] for row in history] == list(range(101, 101 + last))
    for step, row in enumerate(history, 1):
        assert row["loss/nll"] == pytest.approx(record(step)["loss"]["nll"])


def test_online_a_killed_run_goes_on_in_the_same_run_without_gaps(tmp_path: Path) -> None:
    with WandbServer() as server:
        variables = environment(tmp_path / "home", url=server.url)
        run_dir = tmp_path / "run"
        words = ("--from", "1", "--to", "9", "--kill-at", "9", "--pause", "0.3")
        start(run_dir, variables, *words).communicate(timeout=240)
        (run,) = server.streams
        known = len(server.history(run))
        start(run_dir, variables, "--from", "5", "--to", "12").communicate(timeout=240)
        assert list(server.streams) == [run]
        assert known < 12
        assert [row["_step"] for row in server.history(run)] == list(range(101, 113))


def test_an_offline_run_is_synced_later_as_it_was(tmp_path: Path) -> None:
    """`wandb sync` of the offline folder: id, group, job type, every step and the alert arrive; no secret
    does."""
    run_dir = tmp_path / "run"
    offline = environment(tmp_path / "home", key="") | {"MOE_EXT_GROUP": "sweep-1"}
    start(run_dir, offline, "--to", "7", "--kill-at", "7").communicate(timeout=240)
    note = ("--note", "data.hf_token=do-not-show", "--dead-expert", "6")
    start(run_dir, offline, "--from", "4", "--to", "10", *note).communicate(timeout=240)
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    told = [r["alert"] for folder in folders for r in records_of(folder) if r["type"] == "alert"]
    assert [alert["title"] for alert in told] == ["dead_expert"]
    assert (
        "[tune] step 9: 1 new expert(s) got no token in 6 records, first number 1 of layer 3"
        in (told[0]["text"])
    )
    with WandbServer() as server:
        words = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
        online = environment(tmp_path / "home", url=server.url)
        for _ in range(2):  # sending it again changes nothing
            done = subprocess.run(words, env=online, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stdout + done.stderr
        (run,) = server.streams
        assert [row["_step"] for row in server.history(run)] == list(range(101, 111))
        assert run == f"{(run_dir / 'wandb_id').read_text()}-tune"
        (about, *_) = server.variables("UpsertBucket")
        assert (about["groupName"], about["jobType"]) == ("sweep-1", "tune")
        sent = [told["title"] for told in server.variables("NotifyScriptableRunAlert")]
        assert set(sent) == {"dead_expert"}
        assert "do-not-show" not in json.dumps(server.operations)
        assert "***" in json.dumps(about["config"])
