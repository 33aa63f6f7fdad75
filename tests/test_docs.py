"""Commands in the documents are real: each is executed by a test or says why it cannot be
(`tests/infra/documents.py`), launches are planned with exactly their words, files, options and messages exist."""

import ast
import itertools
import re
import shlex
import sysconfig
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest

from moe_ext import cli, launch
from moe_ext.benchmarks.commands import BENCHMARKS
from moe_ext.compose import CONF_DIR, expand, load, parser
from moe_ext.config import ExtensionConfig
from moe_ext.export_command import FORMS
from moe_ext.model.families import FAMILIES
from tests.infra.documents import (
    EXECUTED_BY,
    NOT_EXECUTED,
    PAGES,
    SAID_BY,
    commands,
    entry_of,
    executed_by,
    said,
)
from tests.infra.machine import ROOT

CI = ROOT / ".ci" / "run"


def starting(*words: str) -> list[str]:
    return [line for line in commands() if line.startswith(words)]


def test_every_entry_has_its_commands() -> None:
    assert len(commands()) > 25
    assert {entry_of(line) for line in commands()} == set(EXECUTED_BY)


@pytest.mark.parametrize("line", commands())
def test_a_command_is_executed_by_a_test_or_says_why_not(line: str) -> None:
    who = executed_by(line)
    if who.startswith(NOT_EXECUTED):
        return
    file, separator, name = who.partition("::" if "::" in who else ": ")
    source = (ROOT / file).read_text()
    if separator == ": ":  # a step of .ci/run
        assert name in source, who
        return
    assert f"def {name}(" in source, who
    is_here = Path(file).name == Path(__file__).name
    assert is_here or f'lines_of("{name}")' in source, f"{who} does not take its lines"


def test_no_command_hides_outside_of_the_blocks() -> None:
    """What could be pasted as it stands is in an `sh` block, or repeats one in a sentence."""
    programs = "(?:moe-ext|deepspeed|torchrun|docker|docker-compose|wandb|python) "
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        assert re.findall(rf"^    {programs}.*", prose, re.M) == [], page.name
        quoted = re.findall(rf"`({programs}[^`]*\b(?:runs/|experiment=)[^`]*)`", prose)
        assert set(quoted) <= set(commands()), page.name


def test_every_entry_of_sentences_has_its_commands() -> None:
    assert len(said()) > 20
    assert {next((k for k in SAID_BY if re.match(k, line)), line) for line in said()} == set(
        SAID_BY
    )


@pytest.mark.parametrize("line", said())
def test_a_command_of_a_sentence_is_executed_by_a_test_or_says_why_not(line: str) -> None:
    who = next(SAID_BY[beginning] for beginning in SAID_BY if re.match(beginning, line))
    if who.startswith(".ci/run"):
        name = who.partition(": ")[2]
        ours = [text for text in CI.read_text().splitlines() if text.strip().startswith(name)]
        assert re.search(rf"\b{line}\b(?!-)", "\n".join(ours)), who
    elif not who.startswith(NOT_EXECUTED):
        file, _, function = who.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), who
    words = line.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:.*## ", (ROOT / "Makefile").read_text(), re.M)
    if words[:2] == ["moe-ext", "bench"]:
        assert set(words[2:3] + line.split(" | ")[1:]) <= set(BENCHMARKS)
    for form in (after for word, after in itertools.pairwise(words) if word == "--form"):
        assert form in FORMS
    for path in (word for word in words if word.startswith("tests/")):
        assert (ROOT / path).exists()
    for extra in re.findall(r"\[(\w+)\]", line):
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text()


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


# Messages of the table that are not ours -> (file of the environment, what it holds of the message), or
# nothing where they come from outside of it: ssh, ch-run, the kernel, CUDA.
MESSAGES_OF_OTHERS: dict[str, tuple[str, str] | None] = {
    "address already in use": ("torch/lib/libtorch_cpu.so", "address already in use"),
    "Timed out waiting ...ms for recv operation": (
        "torch/lib/libtorch_cpu.so",
        "ms for recv operation",
    ),
    "Connection closed by peer": ("torch/lib/libtorch_cpu.so", "Connection closed by peer"),
    "Gloo connectFullMesh failed ... Connection refused": (
        "torch/lib/libtorch_cpu.so",
        "connectFullMesh failed",
    ),
    "bus error": ("torch/utils/data/_utils/signal_handling.py", "bus error"),
    "no viable alternative at input": (
        "antlr4/error/ErrorStrategy.py",
        "no viable alternative at input",
    ),
    "ModuleNotFoundError: No module named 'mpi4py'": (
        "deepspeed/comm/comm.py",
        "from mpi4py import",
    ),
    "CUDA out of memory": None,
    "Permission denied (publickey)": None,
    "Host key verification failed": None,
    "Permission denied: '/runs/...'": None,
    "ch-run: error: can't mkdir: ...: Read-only file system": None,
    "ch-run: error: $USER not set": None,
    "nvidia-*": None,
}
COMMANDS_NAMED = {"make install", "deepspeed"}


def messages() -> list[str]:
    """What the table quotes in its first column: messages, without the commands that it names there."""
    table = (ROOT / "docs" / "troubleshooting.md").read_text().split("|---|---|---|\n")[1]
    rows = table.strip().splitlines()
    assert all(row.count(" | ") == 2 for row in rows)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    return [text for text in quoted if text not in COMMANDS_NAMED]


def test_the_messages_of_the_troubleshooting_table_are_those_of_the_source() -> None:
    files = [
        *(ROOT / "moe_ext").rglob("*.py"),
        ROOT / "launchers" / "slurm.sbatch",
        ROOT / "Makefile",
    ]
    source = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files)
    source = source.replace("$(PYTHON)", "python3.11")
    ours = [text for text in messages() if text not in MESSAGES_OF_OTHERS]
    assert len(ours) >= 20
    for text in ours:
        for piece in re.split(r"\.\.\.|\(rank 0.*|: Invalid generic resource", text):
            assert piece.strip(" .:") in source, text


def test_the_messages_of_libraries_are_in_them() -> None:
    assert set(MESSAGES_OF_OTHERS) <= set(messages())
    for text, place in MESSAGES_OF_OTHERS.items():
        if place is not None:
            file, piece = place
            content = (Path(sysconfig.get_path("purelib")) / file).read_bytes()
            assert piece.encode() in content, text
