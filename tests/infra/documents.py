"""The commands that README.md and docs/ show, and which test executes each, word for word.

A command is a line of an `sh` block. Tests take theirs from here (`lines_of`), so a page's change is
executed as it stands, and a new command fails `tests/test_docs.py` until a test takes it. What the words
name is made small instead: a `Checkout` is this project with another `experiment=demo`.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.infra.machine import ROOT
from tests.training.tiny import make_inputs, overrides

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_EXECUTED = "not executed: "

EXECUTED_BY: dict[str, str] = {
    "make demo": NOT_EXECUTED
    + "ten minutes; .ci/run takes the same path on little data, make demo-smoke",
    "make test": ".ci/run: step test make test",
    "moe-ext launch --dry-run": "tests/test_docs.py::test_launches_can_be_planned",
    "moe-ext launch .*launcher.wrapper": (
        "tests/docker/test_charliecloud.py::test_two_nodes_train_from_the_unpacked_image"
    ),
    "(mkdir|docker export)": (
        "tests/docker/test_charliecloud.py::test_two_nodes_train_from_the_unpacked_image"
    ),
    "moe-ext launch .*launcher=slurm": "tests/slurm/test_docs_slurm.py::test_jobs_of_the_page",
    "python -m moe_ext.sweep": "tests/slurm/test_docs_slurm.py::test_a_sweep_of_hydras_own",
    "moe-ext launch .*launcher.ssh=false": "tests/hosts/test_docs_hosts.py::test_without_ssh",
    "moe-ext launch .*launcher=hostfile": "tests/hosts/test_docs_hosts.py::test_through_pdsh",
    "moe-ext launch": "tests/test_docs_run.py::test_other_ways_to_train",
    "(torchrun|python -m moe_ext.train)": "tests/test_docs_run.py::test_other_ways_to_train",
    "tensorboard": "tests/test_docs_run.py::test_tensorboard_serves_the_runs",
    "deepspeed": "tests/conftest.py::finished_demo",
    "moe-ext dashboard .*--save": NOT_EXECUTED + "it needs W&B's own server and a team there",
    "moe-ext (jobs|watch|dashboard|evaluate|report|export)": (
        "tests/test_docs_run.py::test_what_can_be_asked_of_a_finished_run"
    ),
    "wandb sync": "tests/test_docs_run.py::test_an_offline_run_is_sent_later",
    "moe-ext train .*beside": "tests/training/test_beside.py::runs",
    "moe-ext plan": "tests/test_docs_run.py::test_a_cluster_is_planned_from_the_configuration_alone",
    "moe-ext (shards|train .*--show)": "tests/data/test_docs.py::test_shards_are_made_as_the_page_says",
    "docker run .*--gpus": NOT_EXECUTED + "it needs a GPU and NVIDIA's container toolkit",
    "docker build": "tests/docker/conftest.py::built",
    "docker run": "tests/docker/test_images.py::test_the_page_s_run_is_stopped_and_goes_on",
    "docker-compose": "tests/docker/test_images.py::test_two_containers_train_the_smoke_run_together",
}
"""Beginning of a command (a pattern; the first that fits counts) -> who executes it, or why nobody can."""

SAID_BY: dict[str, str] = {
    "make help": NOT_EXECUTED + "it prints the Makefile's own lines",
    "make (install|test|demo-smoke|test-docker-cpu|test-bitsandbytes)$": ".ci/run: step",
    "make test-(slurm|hosts)$": ".ci/run: two_steps",
    "make (demo|demo-seeds|test-docker|test-store|test-slow)$": ".ci/run: skip",
    "make test-(slurm|hosts)-slow": NOT_EXECUTED + "minutes to hours",
    "make chaos": NOT_EXECUTED + "hours; tests/chaos has the same with fewer kills",
    "pip install": NOT_EXECUTED + "it asks a package registry; the extras it names are looked up",
    "pytest -m gpu": NOT_EXECUTED + "it needs a GPU",
    "pytest tests/model": NOT_EXECUTED
    + "tests do not start themselves; what it names is looked up",
    "moe-ext bench layer": "tests/benchmarks/test_layer.py::test_command_writes_every_ratio_and_sample",
    "moe-ext bench step": "tests/benchmarks/test_step.py::test_command_writes_every_ratio_and_sample",
    "moe-ext bench stream": "tests/benchmarks/test_stream.py::test_command",
    "moe-ext bench (checkpoint|plan)": NOT_EXECUTED + "a measurement of minutes",
    "moe-ext export": "tests/test_export_folder.py::test_the_command_writes_each_form",
}
"""The same for commands that sentences name, in the form of a kind and not to be pasted as they stand."""

SAID = "(?:make|pip install|pytest|moe-ext bench|moe-ext export) "


def said() -> list[str]:
    """What sentences of the pages name of the programs of SAID, each once, in order."""
    found: dict[str, None] = {}
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        found |= dict.fromkeys(re.findall(rf"`({SAID}[^`]+)`", prose))
    return list(found)


def commands() -> list[str]:
    """All commands of all pages, each once, in order, without their comments."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
            lines = (re.sub(r"\s+#.*", "", line) for line in block.splitlines())
            found |= dict.fromkeys(line for line in lines if line and line[0] != "#")
    return list(found)


def executed_by(line: str) -> str:
    """Who executes a command: `file::function`, a step of `.ci/run`, or the reason why nobody does."""
    return EXECUTED_BY[entry_of(line)]


def entry_of(line: str) -> str:
    """The key of EXECUTED_BY that counts for a command."""
    for beginning in EXECUTED_BY:
        if re.match(beginning, line):
            return beginning
    raise AssertionError(f"{line}: name the test that executes it in EXECUTED_BY")


def lines_of(function: str) -> list[str]:
    """The commands that a test executes, in the order of the pages."""
    return [line for line in commands() if executed_by(line).endswith(f"::{function}")]


@dataclass(frozen=True)
class Checkout:
    """A copy of the project's package, launchers and `conf/` in which `experiment=demo` is another run."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """With the commands of this interpreter's environment first, and this copy's package."""
        programs = str(Path(sys.executable).parent)
        return os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.folder}:{ROOT}",
        }

    def sh(self, line: str, timeout_s: float = 240, **variables: str) -> str:
        """What a command prints, run by the shell in the checkout; AssertionError when it fails."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-6000:]}"
        return done.stdout


def make_checkout(folder: Path, *experiment: str) -> Checkout:
    """The experiment's overrides become `conf/experiment/demo.yaml`: choices of groups, and values."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("moe_ext", "launchers", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "conf" / "experiment" / "demo.yaml").write_text(_experiment(experiment))
    return Checkout(folder)


def tiny_demo(folder: Path, *more: str) -> Checkout:
    """A checkout whose demonstration takes a few steps, on inputs made beside it."""
    make_inputs(folder / "inputs")
    ours = ("name=", "run_dir=", "cache_dir=", "tracking=")
    tiny = [word for word in overrides(folder / "inputs", "demo") if not word.startswith(ours)]
    return make_checkout(folder / "checkout", "name=demo", *tiny, *more)


def _experiment(overrides: Sequence[str]) -> str:
    """The YAML file of an experiment that says what these overrides say."""
    groups, values = [], {}
    for override in overrides:
        key, _, value = override.partition("=")
        if (ROOT / "conf" / key.partition("@")[0]).is_dir():
            groups.append({f"override /{key}": value})
            continue
        *parents, name = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = yaml.safe_load(value)
    return "# @package _global_\n" + yaml.safe_dump({"defaults": groups, **values}, sort_keys=False)
