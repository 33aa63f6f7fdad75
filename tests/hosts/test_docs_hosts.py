"""The commands of docs/hostfile.md, word for word, on two hosts with the page's names and its `hosts.txt`."""

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.hosts.test_hostfile import PATH
from tests.infra.bare_rank import ranks_of
from tests.infra.documents import Checkout, lines_of, make_checkout
from tests.infra.host_network import CONTROL, NEEDED, HostNetwork
from tests.infra.machine import ROOT, only_run

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(240), *NEEDED]
NAMES = ["node1", "node2"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostNetwork]:
    with HostNetwork(tmp_path_factory.mktemp("hosts") / "network", NAMES) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """With the page's hosts.txt; its ranks are bare."""
    checkout = make_checkout(
        tmp_path_factory.mktemp("docs") / "checkout",
        *("name=demo", "launcher.module=tests.infra.bare_rank"),
    )
    page = (ROOT / "docs" / "hostfile.md").read_text()
    lines = re.findall(r"^    (\S+ slots=\d+)$", page, re.M)
    (checkout.folder / "hosts.txt").write_text("\n".join(lines) + "\n")
    return checkout


def start(hosts: HostNetwork, name: str, checkout: Checkout, line: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        hosts.inside(name, ["bash", "-c", line], checkout.folder),
        env=checkout.environment | {"PATH": f"{checkout.environment['PATH']}:{PATH}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_eight_ranks_on_each(checkout: Checkout) -> None:
    ranks = ranks_of(only_run(checkout.folder))
    assert [rank["host"] for rank in ranks] == ["node1"] * 8 + ["node2"] * 8
    assert [rank["RANK"] for rank in ranks] == [str(rank) for rank in range(16)]
    assert len({rank["MASTER_ADDR"] for rank in ranks}) == 1
    shutil.rmtree(checkout.folder / "runs")


def test_through_pdsh(hosts: HostNetwork, checkout: Checkout) -> None:
    (line,) = lines_of("test_through_pdsh")
    process = start(hosts, CONTROL, checkout, line)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert_eight_ranks_on_each(checkout)


def test_without_ssh(hosts: HostNetwork, checkout: Checkout) -> None:
    """Each host runs the line with its own rank."""
    lines = lines_of("test_without_ssh")
    processes = [start(hosts, *pair, line) for pair, line in zip(
        [(name, checkout) for name in NAMES], lines, strict=True)]  # fmt: skip
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_eight_ranks_on_each(checkout)
