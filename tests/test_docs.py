"""Commands in the documents are real: launches are composed and planned, files and options exist."""

import re
import shlex
from pathlib import Path

import pytest

from moe_ext import cli, launch
from moe_ext.compose import CONF_DIR, load, parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
        named = set(re.findall(r"\blauncher\.([a-z_]+)", page.read_text()))
        assert named <= known, page.name
