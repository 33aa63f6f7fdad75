"""A command line or a YAML file becomes a TrainConfig, or one readable line says why not.

The compose API is used, not `@hydra.main`: no run folder of Hydra's own (it would be computed per
rank), no change of directory, and the launcher's `--local_rank` never reaches Hydra. OmegaConf's
objects end here: everything else is given the dataclasses of `config.py`.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from moe_ext.config import TrainConfig
from moe_ext.config_check import check

_BESIDE = Path(__file__).resolve().parent.parent / "conf"
CONF_DIR = _BESIDE if _BESIDE.is_dir() else Path(sys.prefix) / "share" / "moe_ext" / "conf"
"""The groups and their files: beside the package in a checkout, else where pip put them."""
SCHEMA_NAME = "train_schema"
"""Name under which `conf/train.yaml` finds the schema of TrainConfig."""


class ConfigError(ValueError):
    """The configuration is refused; the message is one line for the user."""


def parser(program: str) -> argparse.ArgumentParser:
    """Options of a command that composes a configuration; everything else is Hydra overrides."""
    result = argparse.ArgumentParser(
        prog=program,
        description="Train an extension: align -> probe -> extend -> tune, resumed where it stopped.",
        epilog="Overrides are Hydra's: group=choice or key=value, for example "
        "`experiment=demo parallel.ep_size=2 stages.tune.steps=100`. Groups and files: conf/.",
    )
    result.add_argument(
        "--config-file", type=Path, help="a resolved YAML file instead of conf/ and overrides"
    )
    result.add_argument("--config-dir", type=Path, default=CONF_DIR, help="another conf/ folder")
    result.add_argument(
        "--show", action="store_true", help="print the resolved configuration and stop"
    )
    result.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher
    result.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return result


def load(config_dir: Path, overrides: list[str], config_file: Path | None = None) -> TrainConfig:
    """The checked configuration, its placement planned where `parallel.auto` asks for it.

    Raises:
        ConfigError: with one line: an unknown group, key or choice, a wrong type, an impossible combination,
            a model that fits nowhere.
    """
    config = compose_only(config_dir, overrides, config_file)
    if not config.parallel.auto:
        return config
    from moe_ext.plan import resolve_auto  # heavy imports, which only `auto` needs

    try:
        return resolve_auto(config)
    except ValueError as error:
        raise ConfigError(_one_line(error)) from error


def compose_only(
    config_dir: Path, overrides: list[str], config_file: Path | None = None
) -> TrainConfig:
    """The checked configuration as it is written; nothing is planned."""
    try:
        if config_file is not None:
            if not config_file.is_file():
                raise ConfigError(f"--config-file {config_file} does not exist")
            loaded = OmegaConf.load(config_file)
            return from_hydra(OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides)))
        if not (config_dir / "train.yaml").is_file():
            raise ConfigError(
                f"{config_dir} holds no train.yaml; give the conf folder by --config-dir"
            )
        register_schema()
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            return from_hydra(compose("train", overrides))
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_one_line(error)) from error


def register_schema() -> None:
    """Make the schema known to Hydra; called once before composing, never at import."""
    ConfigStore.instance().store(name=SCHEMA_NAME, node=TrainConfig)


def from_hydra(composed: Any) -> TrainConfig:
    """The typed configuration of a composed or loaded DictConfig, checked.

    Raises:
        ValueError: an unknown key, a wrong type, a missing value, or a value that breaks a rule;
            one line that names value, rule, remedy and key.
    """
    try:
        # As plain values: a key that `+key=value` added to a typed node would slip through the merge.
        plain = OmegaConf.to_container(composed) if OmegaConf.is_config(composed) else composed
        _number_layers(plain)
        typed = OmegaConf.merge(OmegaConf.structured(TrainConfig), plain)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from error
    assert isinstance(config, TrainConfig)
    check(config)
    return config


def _number_layers(plain: Any) -> None:
    """Keys that are layers become numbers again: in JSON (a run's config.json) they are strings."""
    for part, key in (("extension", "sources"), ("parallel", "hot_lists")):
        by_layer = (plain.get(part) or {}).get(key)
        if isinstance(by_layer, dict):
            plain[part][key] = {int(k) if str(k).isdigit() else k: v for k, v in by_layer.items()}


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as text that `from_hydra(OmegaConf.create(text))` reads back
    equal."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of Hydra's sweep overrides (`seed=0,1,2`); without one, the overrides alone.

    Raises:
        ConfigError: Hydra cannot read one of them.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        reason = str(error).partition("\nSee https")[0]
        raise ConfigError(f"overrides {' '.join(overrides)}: {' '.join(reason.split())}") from error
    choices = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [item.input_line or ""]
        for item in parsed
    ]
    return [list(point) for point in product(*choices)]


def _one_line(error: BaseException) -> str:
    """The innermost reason that Hydra wrapped, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return _explain(cause)
        cause = cause.__cause__
    if isinstance(error, MissingConfigException):
        options = error.options or []
        missing = (error.missing_cfg_file or "").rpartition("/")[2]
        near = difflib.get_close_matches(missing, options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        first = str(error).strip().split("\n")[0].removeprefix("In 'train': ")
        return f"{first}{hint} (choices: {', '.join(options)})" if options else first
    return " ".join(line.strip() for line in str(error).strip().splitlines() if line.strip())


def _explain(error: OmegaConfBaseException) -> str:
    """One line for an OmegaConf error: the key, what is wrong, and the nearest key that exists."""
    key = error.full_key or str(error.key or "")
    reason = (error.msg or str(error)).strip().split("\n")[0]
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing: give it on the command line as {key}=VALUE"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        known = (
            [f.name for f in fields(error.object_type)] if is_dataclass(error.object_type) else []
        )
        near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
        prefix = key.rpartition(".")[0] + "." if "." in key else ""
        hint = f"; did you mean {prefix}{near[0]}?" if near else ""
        known_text = f" (known here: {', '.join(known)})" if known and not near else ""
        return f"{key} is not a setting{hint}{known_text}"
    return f"{key}: {reason}"
