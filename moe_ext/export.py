"""An extension <-> a folder that other people can load.

`save_extension` writes what was added and nothing else: one safetensors file with every expert under
its logical number, and `manifest.json`, which names the base by hash. `load_extension` puts it into
any loaded copy of that base. (`export_hf` writes a whole checkpoint of the base's architecture.)
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext import __version__
from moe_ext.config import CalibrationKind, ExpertType, ExtensionConfig, Placement, RowInit, Scope
from moe_ext.model.checkpoint_files import publish_folder
from moe_ext.model.experts import Bank
from moe_ext.model.extend import LayerPlan, attach_extension, base_sha256
from moe_ext.model.load import BaseInfo
from moe_ext.model.lora import LoraBank
from moe_ext.model.moe import extended_layers
from moe_ext.model.rows import NewRows
from moe_ext.model.state import extension_keys, extension_state, load_extension_state

TENSORS, MANIFEST, FORMAT = "extension.safetensors", "manifest.json", 1


@dataclass
class Layer:
    """One layer of an extension, as the manifest has it."""

    num_new: int
    sources: list[int]
    """The frozen expert that each new expert started from."""
    shares_slots: bool
    """Each new expert shares its source's top-k slot (row initialisation `clone_shared`)."""


@dataclass
class Extension:
    """One extension, as the manifest has it."""

    scope: str
    modalities: list[int]
    """Ids; 1, 2, ... are the manifest's `connectors` in order."""
    calibration: str
    expert_type: str
    lora_rank: int
    lora_alpha: float
    loss_free: bool
    layers: dict[str, Layer] = field(default_factory=dict)
    """By decoder layer index; a string, since JSON knows no other keys."""


def describe(lm: nn.Module) -> dict[str, Extension]:
    """Name -> structure of every extension in the model, layers ascending."""
    found: dict[str, Extension] = {}
    for index, block in extended_layers(lm).items():
        for name, bank in block.new.items():
            rows = block.router.rows[name]
            assert isinstance(rows, NewRows)
            assert isinstance(bank, Bank)
            if name not in found:
                found[name] = Extension(
                    scope=rows.scope.value,
                    modalities=list(rows.modalities),
                    calibration=(
                        "none" if rows.calibration is None else rows.calibration.kind.value
                    ),
                    expert_type=ExpertType.lora.value
                    if isinstance(bank, LoraBank)
                    else ExpertType.full.value,
                    lora_rank=bank.rank if isinstance(bank, LoraBank) else 0,
                    lora_alpha=bank.alpha if isinstance(bank, LoraBank) else 0.0,
                    loss_free=rows.learns_correction,
                )
            layer = Layer(bank.num_experts, list(bank.sources), bool(rows.shared_with))
            found[name].layers[str(index)] = layer
    return found


def save_extension(
    lm: PreTrainedModel,
    folder: str | Path,
    *,
    names: Collection[str] | None = None,
    connectors: nn.ModuleDict | None = None,
    state: Mapping[str, Tensor] | None = None,
    notes: dict[str, Any] | None = None,
) -> Path:
    """Write extensions of the model, and connectors, to a new folder; returns it.

    The folder appears whole or not at all.

    Args:
        names: the extensions to write, without the connectors of modalities that only others have;
            None: all there are.
        connectors: the model's, in the order of its modality ids.
        state: tensors in the place of the model's, for one the experts that other ranks hold; not
            needed when this process holds every new expert.
        notes: kept in the manifest as they are (the configuration, metrics): plain JSON.

    Raises:
        ValueError: there is nothing to save, experts of other ranks are missing, or the folder
            exists.
    """
    folder = Path(folder)
    refuse_existing(folder)
    keys = extension_keys(lm, names)
    tensors = extension_state(lm, names) | {k: v for k, v in (state or {}).items() if k in keys}
    missing = sorted(keys - tensors.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} tensors of the extension are on other ranks ({', '.join(missing[:3])}); "
            "load the checkpoint with parallel.ep_size=1 and save from there, or pass `state`"
        )
    described = describe(lm)
    extensions = {n: e for n, e in described.items() if names is None or n in names}
    used = {modality for extension in extensions.values() for modality in extension.modalities}
    others = {m for n, e in described.items() if n not in extensions for m in e.modalities}
    kept = {
        modality: name
        for modality, name in enumerate(connectors or (), start=1)
        if modality in used or modality not in others
    }
    for name in kept.values():
        values = connectors[name].state_dict().items()  # type: ignore[index]
        tensors |= {f"connectors.{name}.{key}": value for key, value in values}
    if not tensors:
        raise ValueError(
            "the model has neither extensions nor connectors: there is nothing to save"
        )
    place = {modality: number for number, modality in enumerate(kept, start=1)}
    for extension in extensions.values():
        extension.modalities = [place.get(m, m) for m in extension.modalities]
    info: BaseInfo = lm.base_info  # type: ignore[assignment]
    manifest = {
        "format": FORMAT,
        "moe_ext": __version__,
        "base": {
            "name": info.path.resolve().name,
            "model_type": lm.config.model_type,
            "sha256": base_sha256(info.path),
        },
        "extensions": {name: asdict(extension) for name, extension in extensions.items()},
        "connectors": list(kept.values()),
        "notes": notes or {},
    }

    def write(partial: Path) -> None:
        plain = {key: value.detach().cpu().contiguous() for key, value in sorted(tensors.items())}
        save_file(plain, partial / TENSORS, metadata={"format": "pt"})
        content = (partial / TENSORS).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"] = {TENSORS: {"bytes": len(content), "sha256": digest}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        sync(partial)

    return publish_folder(folder, write)


def load_extension(
    lm: PreTrainedModel,
    folder: str | Path,
    *,
    connectors: nn.ModuleDict | None = None,
    placement: Placement = Placement.replicate,
    modality_ids: Mapping[int, int] | None = None,
    row_bias: float = 0.0,
    check_base: bool = True,
) -> dict[str, Any]:
    """Put a saved extension into a loaded base, frozen; returns the manifest.

    Beside extensions that the model has already, each under its own name and with no joint training:
    router rows stand side by side. What the model has stays as it is, trainable or not.

    Args:
        connectors: the model's, in the order of its modality ids; those that the manifest names are
            filled, and are of the saved sizes.
        modality_ids: saved id -> this model's. Without it, ids follow the connectors' names, or stay
            where there are none: every run calls its first modality 1. The model may lack the connector
            of one that it names.
        row_bias: added to its router rows' biases. Extensions that were trained apart never competed:
            a negative one lets a token keep the others' experts more often (FlexOlmo).
        check_base: hash the base's files and compare; False trusts the caller.

    Raises:
        ValueError: another base, a damaged file, a name that is taken, or a connector that is missing.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_file(folder, manifest)
    info: BaseInfo = lm.base_info  # type: ignore[assignment]
    expected = manifest["base"]
    if check_base and base_sha256(info.path) != expected["sha256"]:
        raise ValueError(
            f"{folder} extends the base {expected['name']} ({expected['model_type']}, sha256 "
            f"{expected['sha256'][:12]}...), but base.path={info.path} has other tensors; load that base"
        )
    names = list(manifest["extensions"])
    taken = [name for block in extended_layers(lm).values() for name in block.new if name in names]
    if taken:
        raise ValueError(f"extension.name={taken[0]} is in the model already; remove it first")
    here = {name: modality for modality, name in enumerate(connectors or (), start=1)}
    saved = dict(enumerate(manifest["connectors"], start=1))
    said = modality_ids or {}
    if connectors is not None and not {n for i, n in saved.items() if i not in said} <= here.keys():
        raise ValueError(
            f"{folder} holds connectors {manifest['connectors']}, the model has {list(here)}; name the "
            "modalities alike (encoder.<name>), or load it without connectors"
        )
    ids = {number: here.get(name, number) for number, name in saved.items()}
    ids |= _checked_ids(said, manifest)
    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    for name, structure in manifest["extensions"].items():
        layers = {index: Layer(**layer) for index, layer in structure["layers"].items()}
        extension = Extension(**{**structure, "layers": layers})
        extension.modalities = [ids.get(m, m) for m in extension.modalities]
        _attach(lm, name, extension, placement)
    own = {key: value for key, value in tensors.items() if not key.startswith("connectors.")}
    load_extension_state(lm, own, names)
    with torch.no_grad():
        for block in extended_layers(lm).values():
            for name in block.new.keys() & set(names):
                rows = block.router.rows[name]
                assert isinstance(rows, NewRows)
                block.new[name].requires_grad_(False)
                rows.requires_grad_(False)
                rows.bias.add_(row_bias)
    for name in saved.values() if connectors is not None else ():
        if name not in connectors:
            continue
        start = f"connectors.{name}."
        state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        connectors[name].load_state_dict(state)
    return manifest


def _checked_ids(modality_ids: Mapping[int, int], manifest: dict[str, Any]) -> dict[int, int]:
    known = {m for extension in manifest["extensions"].values() for m in extension["modalities"]}
    if not modality_ids.keys() <= known or min(modality_ids.values(), default=1) < 1:
        raise ValueError(
            f"modality_ids={dict(modality_ids)} must give ids of the folder ({sorted(known)}) ids of "
            "this model, which count its modalities from 1 (0 is text)"
        )
    return dict(modality_ids)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an extension folder.

    Raises:
        ValueError: there is none, or a newer version of moe_ext wrote it.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no extension: it has no {MANIFEST}")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')}, this version of moe_ext reads {FORMAT}"
        )
    return manifest


def _attach(lm: PreTrainedModel, name: str, extension: Extension, placement: Placement) -> None:
    for shares in (False, True):
        plans = [
            LayerPlan(int(index), layer.num_new, layer.sources)
            for index, layer in extension.layers.items()
            if layer.shares_slots is shares
        ]
        settings = ExtensionConfig(
            name=name,
            scope=Scope(extension.scope),
            placement=placement,
            calibration=CalibrationKind(extension.calibration),
            row_init=RowInit.clone_shared if shares else RowInit.clone,
            expert_type=ExpertType(extension.expert_type),
            lora_rank=extension.lora_rank,
            lora_alpha=extension.lora_alpha,
            loss_free_rate=1.0 if extension.loss_free else 0.0,
        )
        modalities = tuple(extension.modalities)
        attach_extension(lm, name, plans, settings, modalities=modalities)


def check_file(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError when the tensors are not those that the manifest was written with."""
    known, content = manifest["files"][TENSORS], (folder / TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise ValueError(
            f"{folder / TENSORS} has {len(content):,} bytes and another hash than the manifest's "
            f"({known['bytes']:,} bytes): it is damaged or was changed"
        )


def refuse_existing(folder: Path) -> None:
    """Raise ValueError when the folder is there: an export never overwrites."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder or remove it")


def sync(folder: Path) -> None:
    """Everything in the folder is on the disk before it gets its name."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
