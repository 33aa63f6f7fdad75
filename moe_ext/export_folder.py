"""A Hugging Face folder of base and extension that needs nothing of ours installed.

    folder/
      config.json, tokenizer, ...    the base's own, with a pointer to the code (`auto_map`)
      modeling_moe_ext.py, moe_ext_*.py   the code: this package's modules that loading and computing need
      base/                          the base's files, byte for byte: deleting all the rest is the removal
      extension/                     what `export.save_extension` wrote
      encoders/<modality>/           the frozen encoders' files, for images

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` gives the base's own class with
extended layers (`remote_model.py`): it computes what the live model does, and generates with a cache.
"""

import ast
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from moe_ext.config import EncoderConfig
from moe_ext.export import read_manifest, refuse_existing, sync
from moe_ext.model.checkpoint_files import publish_folder
from moe_ext.model.encoders import encoder_files

PACKAGE = Path(__file__).resolve().parent
ENTRY, MAIN = "moe_ext.remote_model", "modeling_moe_ext"
CONFIG = "moe_ext.config"
BASE_TEXTS = (".json", ".txt", ".model", ".jinja")
"""Suffixes of the base's small files (tokenizer, chat template, settings), which the folder repeats."""


def export_folder(
    base: str | Path,
    extension: str | Path,
    folder: str | Path,
    *,
    encoders: dict[str, EncoderConfig] | None = None,
    dtype: str = "float32",
    link: bool = False,
) -> Path:
    """Write the folder, whole or not at all; returns it. No tensor is loaded, files are copied.

    Args:
        base: folder of the base; the extension's manifest names it by hash, which is checked on loading.
        extension: a folder of `save_extension`.
        encoders: modality -> its encoder, in the order of the modality ids; without them, text only.
        dtype: what the model loads in unless the reader says otherwise.
        link: hard links in the place of copies of the base's files, where the file system is the same.

    Raises:
        ValueError: a folder is not what it should be, or `folder` exists.
    """
    base, extension, folder = Path(base), Path(extension), Path(folder)
    refuse_existing(folder)
    manifest = read_manifest(extension)
    if not (base / "config.json").is_file():
        raise ValueError(f"base.path={base} has no config.json; give the folder of the base")
    encoders = encoders or {}
    if encoders and list(encoders) != manifest["connectors"]:
        raise ValueError(
            f"{extension} has connectors {manifest['connectors']}, but encoders are given for "
            f"{list(encoders)}; name the same modalities in the same order"
        )

    def write(partial: Path) -> None:
        _copy(base, partial / "base", link)
        _copy(extension, partial / "extension", False)
        settings = {}
        for name, encoder in encoders.items():
            place = Path("encoders") / name
            (partial / place).mkdir(parents=True)
            files = encoder_files(encoder.name, encoder.path)
            for file in files:
                shutil.copy2(file, partial / place)
            only = f"/{files[0].name}" if encoder.name == "efficientnet_lite0" else ""
            settings[name] = asdict(encoder) | {"path": f"{place}{only}"}
        for file in base.iterdir():
            texts = file.suffix in BASE_TEXTS and "safetensors" not in file.name
            if texts and file.name != "config.json" and not file.name.startswith("."):
                shutil.copy2(file, partial)
        config = json.loads((base / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": f"{MAIN}.MoeExtForCausalLM"}
        config["moe_ext"] = {"dtype": dtype, "encoders": settings}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, source in bundled_code().items():
            (partial / f"{name}.py").write_text(source)
        sync(partial)

    return publish_folder(folder, write)


def _copy(source: Path, target: Path, link: bool) -> None:
    """The files of a folder, links followed; ours alone (cached hashes start with a dot) are left out."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("."):
            if link:
                (target / file.name).hardlink_to(file.resolve())
            else:
                shutil.copy2(file, target)
    sync(target)


def bundled_code() -> dict[str, str]:
    """Module name in the folder -> its source: `remote_model` and all it imports of this package.

    transformers copies a model's code by following `from .name import`, in one flat folder, so
    `from moe_ext.model.rows import` becomes `from .moe_ext_model_rows import`.
    """
    found: dict[str, str] = {}
    settings: set[str] = set()
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        source = _path(module).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_ext"):
                assert node.module is not None
                if node.module == CONFIG:
                    settings |= {alias.name for alias in node.names}
                else:
                    waiting.append(node.module)
        found[module] = re.sub(
            r"^(\s*)from (moe_ext[\w.]*) import",
            lambda match: f"{match[1]}from .{_flat(match[2])} import",
            source,
            flags=re.M,
        )
    code = {_flat(module): source for module, source in found.items()}
    return code | {_flat(CONFIG): _settings_code(settings)}


def _path(module: str) -> Path:
    path = PACKAGE.parent / Path(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def _flat(module: str) -> str:
    return MAIN if module == ENTRY else module.replace(".", "_")


def _settings_code(names: set[str]) -> str:
    """The classes of `config.py` that the others use, without its import of OmegaConf."""
    source = _path(CONFIG).read_text()
    classes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
    wanted, waiting = set(), sorted(names)
    while waiting:
        name = waiting.pop()
        if name in wanted:
            continue
        wanted.add(name)
        inside = {node.id for node in ast.walk(classes[name]) if isinstance(node, ast.Name)}
        waiting += sorted(inside & classes.keys())
    parts = ['"""Settings: classes out of the training configuration."""\n']
    parts += ["from dataclasses import dataclass, field\nfrom enum import Enum\n"]
    for name, node in classes.items():
        if name in wanted:
            decorated = "@dataclass\n" if node.decorator_list else ""
            parts.append(f"\n{decorated}{ast.get_source_segment(source, node)}\n")
    return "\n".join(parts)
