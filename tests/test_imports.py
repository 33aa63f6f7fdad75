"""Imports point one way, and each library has its home: the two tables below are the rule.

Read from the syntax trees, so an import inside a function or under TYPE_CHECKING counts too: no
file imports one that imports it, however late.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_ext"

# What each part may import of ours besides itself. Parts that are not named are commands: they may
# import everything, and nothing but a command imports them.
ARROWS: dict[str, set[str]] = {
    "config": {"config_cluster", "config_launcher"},
    "config_check": {"config", "config_cluster", "config_launcher"},
    "config_cluster": set(),
    "config_launcher": set(),
    "batch": set(),
    "model": {"config", "batch"},
    "data": {"config", "batch"},
    "planning": {"config", "config_cluster", "model"},
    "analysis": {"config", "batch", "model", "data"},
    "training": {"config", "config_check", "batch", "model", "data", "analysis", "planning"},
    "export": {"config", "model"},
    "export_hf": {"config", "model", "export"},
}

# Library -> places that may import it; a folder ends in a slash. "commands" are the modules at the
# top of the package that are not in ARROWS, and benchmarks/ measures peers, so it may import them.
HOMES: dict[str, set[str]] = {
    "deepspeed": {"training/", "benchmarks/"},
    "torch.distributed": {"model/dispatch.py", "training/", "analysis/", "train.py", "benchmarks/"},
    "webdataset": {"data/shards.py", "benchmarks/"},
    "wandb": {"training/views.py"},
    "hydra": {"commands"},
    "omegaconf": {"config.py", "commands"},  # the former: its word for a value that must be given
    "transformers": {
        "model/families.py",
        "model/extend.py",  # the type of the language model
        "model/load.py",
        "model/attention.py",
        "model/upcycle.py",
        "model/gguf.py",
        "model/specialise.py",
        "model/encoders.py",
        "model/multimodal.py",  # the cache and the type of the language model it calls
        "data/samples.py",
        "data/commands.py",  # a tokenizer that measures lengths
        "export.py",
        "upcycle.py",
        "export_hf.py",
        "planning/sizes.py",  # configurations, and models without memory
        "benchmarks/",
    },
}


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names that a module imports or reaches by attribute (`torch.distributed.x`)."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source == "torch.distributed" and {a.name for a in node.names} == {"ProcessGroup"}:
                continue  # the type of an argument, no communication
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def part_of(name: str) -> str:
    """First component below the package: `model` for moe_ext.model.moe."""
    return name.split(".")[1] if name.count(".") else ""


def wrong_arrows(source: str, module: str) -> list[str]:
    """Imports of ours that the arrows forbid, in a module of the given dotted name."""
    own = part_of(module)
    if own not in ARROWS:
        return []
    allowed = ARROWS[own] | {own, "__version__"}
    found = set(imports_of(ast.parse(source), module))
    ours = {name for name in found if name.startswith("moe_ext.")}
    return sorted(name for name in ours if part_of(name) not in allowed)


def homeless(source: str, relative: str) -> list[str]:
    """Libraries that a file (path below the package) imports away from their homes."""
    module = "moe_ext." + relative.removesuffix(".py").replace("/", ".")
    names = set(imports_of(ast.parse(source), module))
    is_command = "/" not in relative and relative.removesuffix(".py") not in ARROWS
    wrong = []
    for library, homes in HOMES.items():
        if not any(name == library or name.startswith(library + ".") for name in names):
            continue
        at_home = any(
            relative == home or (home.endswith("/") and relative.startswith(home)) for home in homes
        )
        if not at_home and not (is_command and "commands" in homes):
            wrong.append(library)
    return wrong


def circle(sources: dict[str, str]) -> list[str]:
    """Modules (dotted name -> source) that import each other, in a ring; [] where there are none."""
    imported = {
        module: {name for name in imports_of(ast.parse(source), module) if name in sources}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def modules() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("relative", modules())
def test_a_module_keeps_to_the_arrows_and_homes(relative: str) -> None:
    source = (PACKAGE / relative).read_text()
    module = "moe_ext." + relative.removesuffix(".py").replace("/", ".")
    assert wrong_arrows(source, module) == []
    assert homeless(source, relative) == []


def test_no_file_imports_one_that_imports_it() -> None:
    named = {"moe_ext." + r.removesuffix(".py").replace("/", "."): r for r in modules()}
    sources = {n.removesuffix(".__init__"): (PACKAGE / r).read_text() for n, r in named.items()}
    assert circle(sources) == []


def test_a_circle_is_seen() -> None:
    one, other = "def f():\n    from moe_ext.b import g", "import moe_ext.a"
    assert set(circle({"moe_ext.a": one, "moe_ext.b": other})) == {"moe_ext.a", "moe_ext.b"}
    assert circle({"moe_ext.a": one, "moe_ext.b": "import ast"}) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moe_ext.model.moe", "from moe_ext.data.batches import Loader"),
        ("moe_ext.model.moe", "def f():\n    import moe_ext.training.loop"),
        ("moe_ext.data.shards", "from ..model import moe"),
        ("moe_ext.analysis.report", "from moe_ext import training"),
        ("moe_ext.config", "import moe_ext.batch"),
        ("moe_ext.config", "def f():\n    from moe_ext.config_check import check"),
        ("moe_ext.training.loop", "from moe_ext.train import main"),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str) -> None:
    assert wrong_arrows(source, module)


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("model/moe.py", "import torch\n\ndef f(x):\n    torch.distributed.all_reduce(x)"),
        ("model/moe.py", "from torch import distributed"),
        ("data/batches.py", "import torch.distributed as dist"),
        ("model/engine.py", "from deepspeed.moe import layer"),
        ("train.py", "import wandb"),
        ("training/loop.py", "from omegaconf import OmegaConf"),
    ],
)
def test_a_library_away_from_home_is_seen(relative: str, source: str) -> None:
    assert homeless(source, relative)


def test_what_is_allowed_passes() -> None:
    assert (
        wrong_arrows("from ..model import moe\nfrom . import loop", "moe_ext.training.engine") == []
    )
    assert homeless("import torch.distributed as dist", "training/loop.py") == []
    assert homeless("import hydra", "train.py") == []
    assert homeless("import torch.nn", "model/moe.py") == []
    assert homeless("from torch.distributed import ProcessGroup", "model/moe.py") == []
    assert homeless("from torch.distributed import ProcessGroup, all_reduce", "model/moe.py")
