"""Commands in the documents are real: each is run by a test or says why it cannot be, launches are
composed and planned with exactly their words, files and options exist."""

import ast
import re
import shlex
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest

from moe_ext import cli, launch
from moe_ext.compose import CONF_DIR, expand, load, parser
from moe_ext.config import ExtensionConfig
from moe_ext.model.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# Beginning of a command -> the tests that run it (with smaller settings, the same path), or the reason
# why none can here. The first that fits counts.
RUN_BY: dict[str, str] = {
    "make demo": ".ci/run: step demo-smoke make demo-smoke",
    "make test": ".ci/run: step test make test",
    "moe-ext launch .*launcher=slurm.*ch-run": (
        "tests/docker/test_charliecloud.py::test_two_nodes_train_from_the_unpacked_image"
    ),
    "moe-ext launch --dry-run": "tests/test_docs.py::test_launches_can_be_planned",
    "moe-ext launch .*launcher=slurm.*seed=": (
        "tests/slurm/test_slurm_jobs.py::"
        "test_an_array_requeues_exactly_the_stopped_task_and_shows_the_failed_one"
    ),
    "moe-ext launch .*launcher=slurm.*job_per_stage": (
        "tests/slurm/test_slurm_jobs.py::test_a_job_a_stage_waits_for_the_stage_before"
    ),
    "moe-ext launch .*launcher=slurm": (
        "tests/slurm/test_slurm_training.py::test_a_requeued_job_ends_with_the_same_losses"
    ),
    "moe-ext launch .*launcher=hostfile.*ssh=false": (
        "tests/hosts/test_hostfile.py::test_without_ssh_every_host_starts_its_own_rank"
    ),
    "moe-ext launch .*launcher=hostfile": (
        "tests/hosts/test_hostfile.py::test_pdsh_starts_a_rank_on_each_host_and_carries_our_variables"
    ),
    "moe-ext launch .*tracking=tensorboard": (
        "tests/training/test_run_tracking.py::test_tensorboard_reads_the_same_values"
    ),
    "moe-ext launch": (
        "tests/jobs/test_launch.py::test_the_local_launcher_stops_on_request_and_goes_on"
    ),
    "moe-ext train .*beside": "tests/training/test_beside.py::test_every_run_ends_as_it_should",
    "moe-ext jobs": "tests/jobs/test_launch.py::test_jobs_shows_where_runs_stand",
    "moe-ext watch .*--once": (
        "tests/training/test_run_tracking.py::test_a_finished_run_can_be_watched"
    ),
    "python -m moe_ext.sweep": "tests/slurm/test_submitit.py::test_a_sweep_of_two_is_stopped_requeued_and_finished",
    "moe-ext plan": "tests/planning/test_plan.py::test_the_command_prints_and_writes",
    "moe-ext watch": (
        "tests/jobs/test_watch.py::test_live_in_a_terminal_it_follows_the_run_to_its_end"
    ),
    "moe-ext dashboard .*--save": "not run: it needs W&B's own server and a team there",
    "moe-ext dashboard": (
        "tests/training/test_run_tracking.py::test_the_specification_of_the_dashboard_is_complete"
    ),
    "wandb sync": "tests/training/test_wandb.py::test_an_offline_run_is_synced_later_as_it_was",
    "tensorboard": "not run: a server for a browser; its own reader reads the files in test_run_tracking.py",
    "deepspeed": ".ci/run: step demo-smoke make demo-smoke",
    "(torchrun|python -m moe_ext.train)": (
        "tests/training/test_run_tracking.py::test_a_stage_is_a_run_and_all_are_one_group"
    ),
    "docker build": "tests/docker/test_images.py::test_an_image_holds_no_secret_and_no_test_tool",
    "docker run .*--gpus": "not run: it needs a GPU and NVIDIA's container toolkit",
    "docker run": (
        "tests/docker/test_images.py::test_docker_stop_publishes_and_the_next_start_goes_on"
    ),
    "docker-compose": "tests/docker/test_images.py::test_two_containers_train_the_smoke_run_together",
    "docker export": (
        "tests/docker/test_charliecloud.py::test_two_nodes_train_from_the_unpacked_image"
    ),
}


def commands() -> list[str]:
    """Lines of the `sh` blocks, each once, in order."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
            found |= dict.fromkeys(line for line in block.splitlines() if line and line[0] != "#")
    return list(found)


def starting(*words: str) -> list[str]:
    return [line for line in commands() if line.startswith(words)]


def test_there_are_commands() -> None:
    assert len(commands()) > 15


@pytest.mark.parametrize("line", commands())
def test_a_command_is_run_by_a_test_or_says_why_not(line: str) -> None:
    known = [where for beginning, where in RUN_BY.items() if re.match(beginning, line)]
    assert known, f"{line}: name the test that runs it in RUN_BY"
    where = known[0]
    if where.startswith("not run: "):
        return
    file, separator, name = where.partition("::" if "::" in where else ": ")
    wanted = f"def {name}(" if separator == "::" else name
    assert wanted in (ROOT / file).read_text(), where


@pytest.mark.parametrize("line", starting("moe-ext launch"))
def test_launches_can_be_planned(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.txt").write_text("node1 slots=8\nnode2 slots=8\n")
    words = [word for word in shlex.split(line)[2:] if word != "--dry-run"]
    if "launcher=" not in line and "ranks_per_node" not in line:
        words.append("launcher.ranks_per_node=8")  # as on a machine with so many GPUs
    assert launch.main(["--dry-run", *words]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("line", starting("deepspeed", "torchrun", "python -m moe_ext.train"))
def test_trainings_compose(line: str) -> None:
    words = shlex.split(line)
    overrides = parser("test").parse_args(words[words.index("moe_ext.train") + 1 :]).overrides
    assert load(CONF_DIR, overrides).chain


@pytest.mark.parametrize("line", starting("python -m moe_ext.sweep"))
def test_sweeps_of_hydras_own_compose(line: str) -> None:
    words = shlex.split(line)
    ours = [w for w in words[words.index("--multirun") + 1 :] if not w.startswith("hydra")]
    points = expand(ours)
    assert len(points) > 1
    assert all(load(CONF_DIR, point).chain for point in points)


@pytest.mark.parametrize("line", starting("moe-ext"))
def test_commands_of_ours_exist(line: str) -> None:
    assert shlex.split(line)[1] in cli.COMMANDS


@pytest.mark.parametrize("line", starting("docker"))
def test_files_of_docker_commands_exist(line: str) -> None:
    words = shlex.split(line)
    if "-f" in words:
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    inner = words[words.index("launch") + 1 :] if "launch" in words else []
    if inner:
        assert load(CONF_DIR, inner).chain


def test_settings_named_in_the_pages_exist() -> None:
    known = set(vars(load(CONF_DIR, ["experiment=demo"]).launcher))
    for page in PAGES:
        named = set(re.findall(r"(?<!hydra\.)\blauncher\.([a-z_]+)", page.read_text()))
        assert named <= known, page.name


def test_lists_named_in_the_pages_are_overrides_that_hydra_reads() -> None:
    found = [
        text
        for page in PAGES
        for text in re.findall(r"`'?(launcher\.\w+=\[[^`]*\w[^`]*\])'?`", page.read_text())
    ]
    assert len(found) >= 3
    for text in found:
        assert load(CONF_DIR, ["experiment=demo", "launcher=slurm", text]).chain, text


def test_the_page_of_architectures_lists_them_and_a_row_is_short() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []
    tree = ast.parse((ROOT / "moe_ext" / "model" / "families.py").read_text())
    (rows,) = (
        node.value.values
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FAMILIES"
    )
    assert len(rows) == len(FAMILIES)
    assert max(row.end_lineno - row.lineno + 1 for row in rows) <= 60


def test_the_page_of_extensions_has_every_option() -> None:
    page = (ROOT / "docs" / "extension.md").read_text()
    options = [field.name for field in fields(ExtensionConfig) if field.name != "name"]
    for field in fields(ExtensionConfig):
        if isinstance(field.default, Enum):
            options += [member.value for member in type(field.default)]
    unnamed = {"shard", "replicate", "full"}  # said in words
    assert [option for option in options if option not in page and option not in unnamed] == []
    for name in re.findall(r"`(?:\w+/)*(test_\w+\.py)`", page):
        assert list((ROOT / "tests").rglob(name)), name


# Messages of other programs, as the table has them; all others are ours and must be in the source.
FOREIGN = (
    "nvidia-*", "python3.11 has no", "address already", "deepspeed", "Timed out", "Connection closed",
    "bus error", "no viable", "CUDA out of", "Gloo", "Permission denied", "Host key", "ModuleNotFound",
    "ch-run", "make install", "sbatch refused",
)  # fmt: skip


def test_the_messages_of_the_troubleshooting_table_are_those_of_the_source() -> None:
    source = (
        "".join(
            re.sub(r'"\s*\n\s*f?"', "", path.read_text())
            for path in (ROOT / "moe_ext").rglob("*.py")
        )
        + (ROOT / "launchers" / "slurm.sbatch").read_text()
    )
    table = (ROOT / "docs" / "troubleshooting.md").read_text().split("|---|---|---|\n")[1]
    checked = 0
    for row in table.strip().splitlines():
        assert row.count(" | ") == 2, row
        for text in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            if text.startswith(FOREIGN):
                continue
            for piece in re.split(r"\.\.\.|\(rank 0.*", text):
                assert piece.strip(" .:") in source, text
            checked += 1
    assert checked >= 12
