"""Finished extensions beside the one that a run trains (`beside.<word>=folder`): checked, then loaded."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from moe_ext.config import Trainable, TrainConfig
from moe_ext.export import MANIFEST, TENSORS, check_file, load_extension, read_manifest
from moe_ext.model.files import base_sha256
from moe_ext.planning.sizes import encoder_sizes
from moe_ext.training.build import Beside

INSIDE_RUN = "extension"
"""Where a finished run keeps its extension."""


@dataclass(frozen=True)
class Finished:
    """One finished extension, as its folder describes it."""

    key: str
    folder: Path
    manifest: dict[str, Any]
    row_bias: float

    @property
    def names(self) -> list[str]:
        return list(self.manifest["extensions"])

    @property
    def connectors(self) -> list[str]:
        return self.manifest["connectors"]

    def connector_sizes(self, modality: str) -> tuple[int, int]:
        """(feature width, hidden width) of a connector that the folder holds."""
        with safe_open(self.folder / TENSORS, framework="pt") as file:
            hidden, features = file.get_slice(f"connectors.{modality}.hidden_weight").get_shape()
        return features, hidden


def read_beside(config: TrainConfig) -> list[Finished]:
    """The finished extensions that a configuration names.

    Raises:
        ValueError: a folder is missing, damaged or holds no extension; the line names its key.
    """
    found = []
    for word, named in config.beside.items():
        key, folder = f"beside.{word}", Path(named)
        if not (folder / MANIFEST).is_file() and (folder / INSIDE_RUN / MANIFEST).is_file():
            folder = folder / INSIDE_RUN
        try:
            manifest = read_manifest(folder)
            check_file(folder, manifest)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{key}={named}: {error}; give a finished run, or an extension that "
                "`moe-ext export --form extension` wrote"
            ) from error
        if not manifest["extensions"]:
            raise ValueError(f"{key}={named} holds connectors and no new experts; leave it out")
        found.append(Finished(key, folder, manifest, config.beside_bias.get(word, 0.0)))
    return found


def check_beside(config: TrainConfig) -> None:
    """Raise ValueError where the extensions cannot stand beside the run's; needs no process group.

    A base that is to be upcycled is compared when it is there.
    """
    if unknown := sorted(config.beside_bias.keys() - config.beside.keys()):
        raise ValueError(
            f"beside_bias.{unknown[0]} has no extension to go with; name its folder as beside.{unknown[0]}"
        )
    finished = read_beside(config)
    taken = {config.extension.name: "extension.name"}
    brings: dict[str, str] = {}
    for one in finished:
        for name in one.names:
            if name in taken:
                raise ValueError(
                    f"{one.key}={one.folder} holds an extension {name}, which {taken[name]} names too; "
                    "choose another extension.name for what this run trains, or leave one out"
                )
            taken[name] = one.key
        expected, path = one.manifest["base"], config.base.path
        if path and base_sha256(path) != expected["sha256"]:
            raise ValueError(
                f"{one.key}={one.folder} extends the base {expected['name']} "
                f"(sha256 {expected['sha256'][:12]}...), but base.path={path} has other tensors; "
                "extensions stand side by side on one base"
            )
        for modality in one.connectors:
            if modality in config.encoder and modality in brings:
                raise ValueError(
                    f"{one.key}={one.folder} and {brings[modality]} both hold a connector {modality}, and "
                    f"encoder.{modality} can have one: train one of them with its encoder under another "
                    "name, or leave one out"
                )
            brings[modality] = one.key
            if modality in config.encoder:
                _check_connector(one, modality, config)
    _check_trains(config, brings)


def _check_connector(one: Finished, modality: str, config: TrainConfig) -> None:
    width, encoder = one.connector_sizes(modality)[0], config.encoder[modality]
    own = encoder_sizes(encoder, 1, 1).feature_dim
    if width != own:
        raise ValueError(
            f"{one.key}={one.folder} has a connector for {width} features, encoder.{modality} gives {own}; "
            f"use the encoder it was trained with, or name this one otherwise (encoder.<name>)"
        )


def _check_trains(config: TrainConfig, brings: dict[str, str]) -> None:
    if not config.beside or any(name not in brings for name in config.encoder):
        return
    for name in config.chain:
        if Trainable.connector in config.stages[name].train:
            first = next(iter(config.encoder))
            raise ValueError(
                f"stages.{name}.train holds connector, but encoder.{first}'s connector is that of "
                f"{brings[first]} and stays as it is; leave stage align out of chain and connector out of "
                "train, or name the encoder otherwise to train a connector of its own"
            )


def beside_of(config: TrainConfig) -> Beside:
    """What `prepare` needs of them."""
    finished = read_beside(config)
    widths = {
        modality: one.connector_sizes(modality)[1]
        for one in finished
        for modality in one.connectors
        if modality in config.encoder
    }
    identity = {
        name: {"sha256": one.manifest["files"][TENSORS]["sha256"], "row_bias": one.row_bias}
        for one in finished
        for name in one.names
    }
    names = frozenset(name for one in finished for name in one.names)
    return Beside(names, widths, identity, partial(_put, finished, config))


def _put(finished: list[Finished], config: TrainConfig, lm: Any, connectors: nn.ModuleDict) -> None:
    """A modality that the run has no encoder for gets an id after those: no sample brings it."""
    others = dict.fromkeys(m for one in finished for m in one.connectors if m not in connectors)
    id_of = {name: len(connectors) + number for number, name in enumerate(others, start=1)}
    for one in finished:
        saved = dict(enumerate(one.connectors, start=1))
        load_extension(
            lm,
            one.folder,
            connectors=connectors,
            placement=config.extension.placement,
            modality_ids={number: id_of[n] for number, n in saved.items() if n in id_of},
            row_bias=one.row_bias,
        )
