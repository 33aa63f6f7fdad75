"""A peer on another host dies, is stopped, or its network is cut: the survivors end in time and name it.

Real training, a rank on each of two hosts with their own network; only the launcher is left out.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from moe_ext.compose import CONF_DIR, load, to_yaml
from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.infra.host_network import NEEDED, HostNetwork
from tests.infra.machine import ROOT, needs, wait_until
from tests.training.tiny import make_inputs, overrides

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300), *NEEDED, *needs("iptables")]

TIMEOUT_S = 10
NOTICE_S = TIMEOUT_S + 15
"""What a collective may wait, and then looking for the culprit and leaving, on a busy machine."""


class Job:
    """A run of two ranks, n1 and n2, started as a launcher starts them."""

    def __init__(self, hosts: HostNetwork, folder: Path, name: str):
        self.hosts, self.run_dir = hosts, folder / name
        words = (
            *("chain=[align]", "stages.align.steps=100000", "stages.align.checkpoint_every=5"),
            *(f"parallel.timeout_s={TIMEOUT_S}", "parallel.ep_size=2", "tracking.progress=false"),
        )
        config = folder / f"{name}.yaml"
        config.write_text(to_yaml(load(CONF_DIR, overrides(folder, name, *words))))
        self.logs = [folder / f"{name}-{host}.log" for host in hosts.names]
        variables = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29555}
        variables |= {"MASTER_ADDR": hosts.address("n1"), "OMP_NUM_THREADS": 1}
        self.starters = []
        for rank, host in enumerate(hosts.names):
            environment = [f"{key}={value}" for key, value in {**variables, "RANK": rank}.items()]
            train = [sys.executable, "-m", "moe_ext.train", "--config-file", str(config)]
            with self.logs[rank].open("a") as log:
                command = hosts.inside(host, ["env", *environment, *train], ROOT)
                self.starters.append(subprocess.Popen(command, stdout=log, stderr=log))

    def steps(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [e["step"] for e in map(json.loads, lines) if e["event"] == "step"]

    def train_until(self, step: int) -> None:
        wait_until(
            lambda: (bool(self.steps()) and self.steps()[-1] >= step) or not self.all_run(),
            120,
            f"step {step}",
        )
        assert self.all_run(), self.log(0) + self.log(1)

    def all_run(self) -> bool:
        return all(starter.poll() is None for starter in self.starters)

    def rank(self, rank: int) -> psutil.Process:
        """The process that trains, as the machine sees it."""
        (process,) = psutil.Process(self.starters[rank].pid).children()
        return process

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def ends(self, rank: int) -> float:
        """Seconds until a rank has ended, with an error's code."""
        began = time.monotonic()
        assert self.starters[rank].wait(timeout=NOTICE_S) == 1, self.log(rank)
        return time.monotonic() - began

    def error(self) -> str:
        return json.loads((self.run_dir / "status.json").read_text())["error"]

    def clean_up(self) -> None:
        for rank, starter in enumerate(self.starters):
            if starter.poll() is None:
                self.rank(rank).kill()
                starter.send_signal(signal.SIGCONT)  # it stops with what it waits for
                starter.wait(timeout=30)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostNetwork]:
    with HostNetwork(tmp_path_factory.mktemp("peers") / "network", ["n1", "n2"]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_inputs(folder)
    return folder


@pytest.fixture
def start(hosts: HostNetwork, folder: Path) -> Iterator[Callable[[str], Job]]:
    jobs: list[Job] = []

    def started(name: str) -> Job:
        jobs.append(Job(hosts, folder, name))
        return jobs[-1]

    yield started
    for job in jobs:
        job.clean_up()


def test_a_stopped_peer_is_named(start: Callable[[str], Job]) -> None:
    job = start("stopped")
    job.train_until(3)
    job.rank(1).send_signal(signal.SIGSTOP)
    assert TIMEOUT_S - 2 < job.ends(0) < NOTICE_S
    assert "Timed out" in job.error()
    assert "rank 1 (host n2) showed no sign of life" in job.error()


@pytest.mark.slow
def test_the_stopped_rank_by_which_all_met_is_named(start: Callable[[str], Job]) -> None:
    job = start("stopped-0")
    job.train_until(3)
    job.rank(0).send_signal(signal.SIGSTOP)
    assert job.ends(1) < NOTICE_S
    assert job.error().startswith("rank 1: ")
    assert "rank 0 (host n1) does not answer" in job.error()


def test_a_killed_peer_is_named_at_once(start: Callable[[str], Job]) -> None:
    job = start("killed")
    job.train_until(3)
    job.rank(1).kill()
    assert job.ends(0) < TIMEOUT_S
    assert "rank 1 (host n2) showed no sign of life" in job.error()


CUTS = {
    "dropped": (
        "iptables -A INPUT -i eth0 -j DROP; iptables -A OUTPUT -o eth0 -j DROP",
        "iptables -F",
    ),
    "unplugged": ("ip link set eth0 down", "ip link set eth0 up"),
}


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_network_ends_both_sides_and_the_run_goes_on_once_it_is_mended(
    start: Callable[[str], Job], hosts: HostNetwork, cut: str
) -> None:
    sever, mend = CUTS[cut]
    job = start(cut)
    job.train_until(7)
    subprocess.run(hosts.inside("n2", ["sh", "-c", sever]), check=True)
    try:
        began = time.monotonic()
        job.ends(0)
        job.ends(1)
        assert time.monotonic() - began < NOTICE_S
    finally:
        subprocess.run(hosts.inside("n2", ["sh", "-c", mend]), check=True)
    assert "rank 1 (host n2) showed no sign of life" in job.log(0)
    assert "rank 0 (host n1) does not answer" in job.log(1)
    assert job.error()  # the first of the two
    before = job.steps()
    job = start(cut)
    wait_until(lambda: len(job.steps()) >= len(before) + 3 or not job.all_run(), 120, "new steps")
    assert job.all_run(), job.log(0)
    resumed_at = job.steps()[len(before)] - 1
    assert resumed_at % 5 == 0  # a checkpoint's
    assert before[-1] - 10 <= resumed_at <= before[-1]
    job.rank(0).send_signal(signal.SIGTERM)
    assert [starter.wait(timeout=60) for starter in job.starters] == [STOPPED_EXIT_CODE] * 2
