"""`moe-ext export RUN FOLDER`: what a run has learnt, in a form that others can load."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from moe_ext.compose import CONF_DIR, ConfigError, load
from moe_ext.config import EncoderConfig, TrainConfig
from moe_ext.export import MANIFEST, TENSORS, check_file, read_manifest, refuse_existing

FORMS = {
    "folder": "base, extension and code: AutoModelForCausalLM.from_pretrained(..., "
    "trust_remote_code=True), nothing of ours installed; text and images",
    "extension": "the extension alone: one safetensors file and its manifest",
    "checkpoint": "a checkpoint of the base's own architecture with the new experts among its own; "
    "only where the architecture can express the extension",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 when it cannot be (the reason on standard error)."""
    options = argparse.ArgumentParser(
        prog="moe-ext export",
        description="Write what a finished run has learnt to a new folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="forms:\n" + "\n".join(f"  {name:<11} {text}" for name, text in FORMS.items()),
    )
    options.add_argument("run", type=Path, help="folder of a finished run, or of an extension")
    options.add_argument("folder", type=Path, help="where to; must not exist")
    options.add_argument("--form", choices=list(FORMS), default="folder")
    options.add_argument(
        "--base", default="", help="the base's folder, where `run` is an extension"
    )
    options.add_argument("--dtype", default="", help="float32 or bfloat16; as trained by default")
    options.add_argument(
        "--link", action="store_true", help="folder: hard links to the base's files, no copies"
    )
    options.add_argument(
        "--approximate", action="store_true", help="checkpoint: leave out what cannot be expressed"
    )
    given = options.parse_args(argv)
    try:
        for line in export(
            given.run,
            given.folder,
            given.form,
            base=given.base,
            dtype=given.dtype,
            link=given.link,
            approximate=given.approximate,
        ):
            print(line)
    except (ConfigError, ValueError, OSError) as error:
        options.exit(2, f"moe-ext export: {error}\n")
    print(given.folder)
    return 0


def export(
    source: Path,
    folder: Path,
    form: str,
    *,
    base: str = "",
    dtype: str = "",
    link: bool = False,
    approximate: bool = False,
) -> list[str]:
    """Write one form; what was left out, a line each.

    Raises:
        ValueError: `source` is neither a finished run nor an extension, or the form cannot hold it.
    """
    refuse_existing(folder)
    extension, config = source, None
    if (source / "config.json").is_file():
        config = load(CONF_DIR, [], source / "config.json")
        extension = source / "extension"
        if not (extension / MANIFEST).is_file():
            raise ValueError(
                f"{source} has no extension/ yet; finish the run first (moe-ext train)"
            )
    manifest = read_manifest(extension)
    check_file(extension, manifest)
    if form == "extension":
        folder.mkdir(parents=True)
        for name in (TENSORS, MANIFEST):
            shutil.copy2(extension / name, folder)
        return []
    place = base or (_base_of(config) if config is not None else "")
    if not place:
        raise ValueError(f"{source} is an extension: name the folder of its base with --base")
    stored = dtype or _stored_dtype(extension)
    if form == "checkpoint":
        import torch

        from moe_ext.export import load_extension
        from moe_ext.export_hf import export_uniform
        from moe_ext.model.load import load_base

        lm = load_base(place, dtype=getattr(torch, stored))
        load_extension(lm, extension)
        return export_uniform(lm, folder, approximate=approximate)
    from moe_ext.export_folder import export_folder

    known: dict[str, EncoderConfig] = {} if config is None else dict(config.encoder)
    # a run beside finished extensions has their encoders too
    encoders = {name: known[name] for name in manifest["connectors"] if name in known}
    export_folder(place, extension, folder, encoders=encoders, dtype=stored, link=link)
    return (
        []
        if encoders or not manifest["connectors"]
        else ["images are left out: no encoder is known"]
    )


def _base_of(config: TrainConfig) -> str:
    """The base's folder of a run, upcycled again if it was removed."""
    from moe_ext.train import base_folder
    from moe_ext.training.tracking import Tracker

    return str(base_folder(config, Tracker(Path(), {}, rank=1)))


def _stored_dtype(extension: Path) -> str:
    """float32 or bfloat16: what the extension's experts are stored in."""
    from safetensors import safe_open

    with safe_open(extension / TENSORS, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith("connectors.")]  # noqa: SIM118
        kinds = {file.get_slice(name).get_dtype() for name in names}
    return "bfloat16" if "BF16" in kinds else "float32"
