"""`moe-ext launch launcher=hostfile` over two hosts with their own addresses: pdsh, and without ssh."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from moe_ext.training.ownership import read_status
from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.infra.host_network import CONTROL, NEEDED, HostNetwork
from tests.infra.machine import PATH, ROOT, launch_words, only_run, wait_until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400), *NEEDED]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostNetwork]:
    with HostNetwork(tmp_path_factory.mktemp("hosts") / "network", ["n1", "n2"]) as hosts:
        yield hosts


def start(
    hosts: HostNetwork, name: str, folder: Path, *overrides: str, **variables: str
) -> subprocess.Popen:
    """`moe-ext launch` on a host, with the stand-in for training."""
    hostfile = folder / "hosts.txt"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    words = launch_words("hostfile", f"launcher.hostfile={hostfile}", *overrides, **variables)
    return subprocess.Popen(
        hosts.inside(name, words, folder),
        env=os.environ | {"PATH": PATH, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def seen(run_dir: Path, start: int = 0) -> list[dict]:
    return [
        json.loads((run_dir / f"rank-{rank}.start-{start}.json").read_text()) for rank in (0, 1)
    ]


def test_pdsh_starts_a_rank_on_each_host_and_carries_our_variables(
    hosts: HostNetwork, tmp_path: Path
) -> None:
    value = "two words, $HOME, 100%h and {braces}"
    process = start(hosts, CONTROL, tmp_path, TOY_VARIABLE=f"'{value}'", GLOO_SOCKET_IFNAME="eth0")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    ranks = seen(only_run(tmp_path))
    assert [(r["host"], r["RANK"], r["LOCAL_RANK"]) for r in ranks] == [
        ("n1", "0", "0"),
        ("n2", "1", "0"),
    ]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {hosts.address("n1")}
    assert {rank["toy"] for rank in ranks} == {value}


def test_without_ssh_every_host_starts_its_own_rank(hosts: HostNetwork, tmp_path: Path) -> None:
    processes = [
        start(
            *(hosts, name, tmp_path, "launcher.ssh=false", f"launcher.node_rank={rank}"),
            f"launcher.master_addr={hosts.address('n1')}",
        )
        for rank, name in enumerate(hosts.names)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert [rank["host"] for rank in seen(only_run(tmp_path))] == ["n1", "n2"]


def test_a_killed_node_process_is_no_success(hosts: HostNetwork, tmp_path: Path) -> None:
    """On several hosts; on one, deepspeed itself would exit 0 (tests/jobs/test_launch.py)."""
    process = start(hosts, CONTROL, tmp_path, "stages.align.steps=1000", TOY_STEP_S="0.1")
    run_dir = wait_for_steps(tmp_path)
    for node in node_processes(run_dir):
        node.kill()
    assert len(rank_processes(run_dir)) == 2  # they go on, unwatched, and hold ssh's connections
    for rank in rank_processes(run_dir):
        rank.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, STOPPED_EXIT_CODE), output
    assert "the run is not finished" in output


def test_one_of_two_runs_is_stopped_and_goes_on_and_the_other_is_cancelled(
    hosts: HostNetwork, tmp_path: Path
) -> None:
    """Of one user, on the same hosts: deepspeed's own way to stop the one ends the other too."""
    folders = [tmp_path / name for name in ("stopped", "other")]
    for folder in folders:
        folder.mkdir()
    words = ("chain=[align]", "stages.align.steps=60")
    process = start(hosts, CONTROL, folders[0], *words, TOY_STEP_S="0.1")
    other_words = ("chain=[align]", "stages.align.steps=5000", "launcher.master_port=29600")
    other = start(hosts, CONTROL, folders[1], *other_words, TOY_STEP_S="0.1")
    run_dir, other_dir = (wait_for_steps(folder) for folder in folders)
    launcher = next(
        p for p in processes_with("moe_ext.launch") if str(folders[0]) in " ".join(p.cmdline())
    )
    launcher.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED_EXIT_CODE, output
    status = read_status(run_dir)
    assert status is not None
    assert status.state == "stopped"
    wait_until(lambda: not rank_processes(run_dir), 30, "the ranks to leave")

    assert len(rank_processes(other_dir)) == 2
    seen_before = (other_dir / "metrics.jsonl").stat().st_size
    wait_until(lambda: (other_dir / "metrics.jsonl").stat().st_size > seen_before, 30, "its steps")
    cancelling = [sys.executable, "-m", "moe_ext.cli", "jobs", str(other_dir), "--cancel"]
    done = subprocess.run(
        hosts.inside(CONTROL, cancelling),
        env=os.environ | {"PATH": PATH, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for host in hosts.names:  # deepspeed's process of the host, and the rank
        assert f"{host}: {host}: ended 2 process(es)" in done.stdout
    other.communicate(timeout=60)
    assert other.returncode == 1
    assert not node_processes(other_dir) + rank_processes(other_dir)
    assert (read_status(other_dir) or status).state == "cancelled"

    process = start(hosts, CONTROL, folders[0], *words, TOY_STEP_S="0.01")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))


def wait_for_steps(folder: Path) -> Path:
    wait_until(lambda: bool(list(folder.glob("runs/*/metrics.jsonl"))), 90, "the first step")
    time.sleep(0.5)
    return only_run(folder)


def processes_with(*needles: str) -> list[psutil.Process]:
    """Python processes whose command line holds all the words (hosts are visible from the machine)."""
    found = []
    for process in psutil.process_iter(["cmdline", "name"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["name"].startswith("python") and all(needle in line for needle in needles):
            found.append(process)
    return found


def node_processes(run_dir: Path) -> list[psutil.Process]:
    return processes_with("deepspeed.launcher.launch", str(run_dir))


def rank_processes(run_dir: Path) -> list[psutil.Process]:
    both = processes_with("tests.infra.toy_run", str(run_dir))
    return [process for process in both if "deepspeed" not in " ".join(process.cmdline())]
