"""The files of a Hugging Face checkpoint: tensors by key and by row, and the hash of the whole."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moe_ext.model.quantised import fp8_block, unpack_fp8

_log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FP8_FACTOR = "_scale_inv"
_HASH_CACHE = ".moe_ext_sha256.json"


class Checkpoint:
    """A Hugging Face folder of safetensors files, one or sharded with an index; read by key and row.

    Tensors are views of the mapped files: copy them, never write to them. FP8 weights come out
    multiplied by their factors; the factors themselves are no keys.

    Args:
        dtype: of these products.

    Raises:
        ValueError: the folder or one of its files is missing, a tensor is not in it, or it is
            quantised in a form that cannot be read.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32):
        self.path, self.dtype = Path(path), dtype
        self.file_of = self._find_files()
        self._open: dict[str, Any] = {}
        config = self.path / "config.json"
        known = json.loads(config.read_text()) if config.is_file() else {}
        self._fp8_block = fp8_block(known.get("quantization_config"), str(path))

    def _find_files(self) -> dict[str, str]:
        """Key -> name of the file that holds it."""
        if (self.path / _INDEX).is_file():
            index = json.loads((self.path / _INDEX).read_text())
            file_of: dict[str, str] = index["weight_map"]
            missing = sorted({f for f in file_of.values() if not (self.path / f).is_file()})
            if missing:
                raise ValueError(
                    f"base.path={self.path}: {_INDEX} names {len(missing)} files that are not there "
                    f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); fetch them"
                )
            return file_of
        if (self.path / _SINGLE).is_file():
            with safe_open(self.path / _SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        if list(self.path.glob("pytorch_model*.bin")):
            raise ValueError(
                f"base.path={self.path} holds pickled weights only, which are not read because loading "
                "a pickle runs code; convert them to safetensors"
            )
        raise ValueError(
            f"base.path={self.path} is not a checkpoint: it has neither {_SINGLE} nor {_INDEX}; "
            "give the folder of a Hugging Face model"
        )

    def __contains__(self, key: str) -> bool:
        return key in self.file_of

    def __iter__(self) -> Iterator[str]:
        """Every key, sorted."""
        return iter(sorted(key for key in self.file_of if not key.endswith(_FP8_FACTOR)))

    def _file(self, key: str) -> Any:
        name = self.file_of.get(key)
        if name is None:
            raise ValueError(
                f"base.path={self.path} has no tensor {key!r}; its config.json says it should. "
                "The folder is incomplete, or its layout is one that moe_ext/model/families.py lacks"
            )
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]

    def tensor(self, key: str) -> Tensor:
        """The whole tensor of `key`, as stored."""
        value = self._file(key).get_tensor(key)
        factor = key + _FP8_FACTOR
        if self._fp8_block is None or factor not in self.file_of:
            return value
        factors = self._file(factor).get_tensor(factor)
        return unpack_fp8(value, factors, self._fp8_block, self.dtype)

    def row(self, key: str, index: int) -> Tensor:
        """Entry `index` of the first dimension, as stored."""
        return self._file(key).get_slice(key)[index]

    @cached_property
    def files(self) -> list[Path]:
        """The tensor files, sorted by name."""
        return [self.path / name for name in sorted(set(self.file_of.values()))]


def base_sha256(path: str | Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's tensor files.

    Hashing reads every byte, so the result is kept beside the files, for as long as their sizes and
    modification times stay; a read-only folder is hashed every time.
    """
    files = Checkpoint(path).files
    stamps = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    cache = Path(path) / _HASH_CACHE
    if cache.is_file():
        known = json.loads(cache.read_text())
        if known["stamps"] == stamps:
            return known["sha256"]
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name}:{digest}\n".encode())
    result = total.hexdigest()
    try:
        scratch = cache.with_name(f"{cache.name}.{os.getpid()}")
        scratch.write_text(json.dumps({"sha256": result, "stamps": stamps}))
        scratch.replace(cache)
    except OSError:
        _log.debug("cannot keep the hash of %s beside it", path)
    return result
