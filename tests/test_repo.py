"""What holds for the whole repository: nothing of one machine in it, no registry's address, files
of a readable size, and documents whose commands exist."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = {
    ".py",
    ".md",
    ".yaml",
    ".yml",
    ".sh",
    ".toml",
    ".cfg",
    ".txt",
    ".lock",
    ".sbatch",
    ".html",
    "",
}

# Joined from pieces, so that this file passes its own test.
REGISTRY_HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "registry." + "npmjs",
    "deb." + "debian.org",
    "download." + "py" + "torch.org",
    "proxy." + "golang.org",
]
MACHINE_PATHS = ["/" + "opt/", "/" + "work/", "/" + "root/"]
MAX_MODULE_LINES = 420
TABLES = {"config.py"}  # one setting and its meaning after the other: length is no burden there
MAX_FUNCTION_LINES = 120
MAX_FILE_BYTES = 1_000_000


def tracked() -> list[Path]:
    """Files that git would carry: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def texts() -> list[Path]:
    return [path for path in tracked() if path.suffix in TEXT]


@pytest.mark.parametrize("needle", MACHINE_PATHS + REGISTRY_HOSTS)
def test_no_file_names_a_machine_or_a_registry(needle: str) -> None:
    found = [str(path.relative_to(ROOT)) for path in texts() if needle in path.read_text()]
    # A container's own folders are no machine's: the images install below such paths.
    found = [name for name in found if not name.startswith("docker/")]
    assert found == []


def test_no_file_is_large() -> None:
    large = [
        str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > MAX_FILE_BYTES
    ]
    assert large == []


def test_modules_and_functions_can_be_read_in_one_sitting() -> None:
    long = []
    for path in sorted((ROOT / "moe_ext").rglob("*.py")):
        source = path.read_text()
        lines = source.count("\n")
        if lines > MAX_MODULE_LINES and path.name not in TABLES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert long == []


def test_markers_in_use_are_declared() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {line.split(":")[0] for line in settings["tool"]["pytest"]["ini_options"]["markers"]}
    builtin = {"parametrize", "skipif", "skip", "xfail", "usefixtures", "filterwarnings", "timeout"}
    used = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"pytest\.mark\.(\w+)", path.read_text())
    }
    assert used - builtin <= declared


def test_the_lock_pins_versions_and_nothing_else() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line[:1] not in {"", "#"}
    ]
    assert len(lines) > 50
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)
    ] == []
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(names) == len(set(names))


def test_the_lock_lies_within_the_ranges_of_setup() -> None:
    requirement = pytest.importorskip("packaging.requirements").Requirement
    setup = ast.parse((ROOT / "setup.py").read_text())
    wanted = [
        node.value
        for node in ast.walk(setup)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[A-Za-z0-9_-]+([<>=]=?[0-9.]+,?)*", node.value)
        and re.search(r"[<>=]=", node.value)
    ]
    pinned = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if "==" in line:
            name, version = line.split("==")
            pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    assert any(text.startswith("torch>") for text in wanted)
    for text in wanted:
        parsed = requirement(text)
        version = pinned.get(re.sub(r"[-_.]+", "-", parsed.name).lower())
        assert version is None or parsed.specifier.contains(version), (
            f"{text}, the lock has {version}"
        )


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))


def test_make_targets_in_the_documents_exist() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / ".ci" / "run"]:
        named = set(re.findall(r"(?:^|`|^step \S+ )make ([a-z][a-z0-9-]*)", path.read_text(), re.M))
        assert named <= targets(), path


def test_files_that_the_documents_link_exist() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):  # not URLs
            assert (path.parent / target).exists(), f"{path.name} links {target}"


def test_files_in_the_readme_s_reading_order_exist() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## The files, in reading order") :].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        folder = Path()
        for name in re.findall(r"`([^`]+)`", row):
            path = Path(name) if "/" in name else folder / name
            assert (ROOT / path).exists(), f"README.md names {path}"
            folder = path.parent


def test_the_readme_lists_every_command() -> None:
    cli = pytest.importorskip("moe_ext.cli")
    text = (ROOT / "README.md").read_text()
    for name, (_, line) in cli.COMMANDS.items():
        assert f"    {name:<10} {line}" in text, f"README.md lacks {name}, or says something else"


def test_moe_ext_commands_in_the_documents_exist() -> None:
    cli = pytest.importorskip("moe_ext.cli")
    named = set()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named |= set(re.findall(r"^(?:\$ )?moe-ext ([a-z]+)\b", path.read_text(), re.M))
    assert named <= set(cli.COMMANDS)
