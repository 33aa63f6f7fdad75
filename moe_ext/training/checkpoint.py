"""What a checkpoint holds, and reading one: own format, safetensors and JSON, by logical tensor name.

A published folder holds one safetensors file a rank with the pieces of optimizer state that the rank
owns, one with tensors that are equal everywhere, and `manifest.json`: for every logical tensor its
shape and where its pieces lie, sizes and hashes of all files, and the run's position as JSON. Since
pieces are found by name and element, another number of ranks, another ep_size or ZeRO stage reads the
same files. Frozen weights are never in it.

`publishing.py` writes it, whole or not at all.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or is not what its manifest says."""


@dataclass
class Piece:
    """A contiguous run of elements of one logical tensor, owned by this rank."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    """Kind (`weight`, `exp_avg`, `exp_avg_sq`) -> flat fp32 tensor; all of one length."""


@dataclass
class Snapshot:
    """What one rank contributes to a checkpoint."""

    pieces: list[Piece]
    state: dict[str, Any]
    """JSON, equal on all ranks."""
    rank_state: dict[str, Any] = field(default_factory=dict)
    """JSON of this rank alone."""
    rank_tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of this rank alone (generator states)."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are equal on all ranks; rank 0's are written."""


def published(folder: Path) -> list[Path]:
    """Published checkpoints in a folder, in the order of their names."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and (p / MANIFEST).is_file())


def build_manifest(
    snapshot: Snapshot, entries: list[dict[str, Any]], world_size: int
) -> dict[str, Any]:
    """What `manifest.json` says, from every rank's entry.

    Raises:
        CheckpointError: some elements of a tensor are in no piece, or in two.
    """
    tensors: dict[str, Any] = {}
    for entry in entries:
        for piece in entry["pieces"]:
            known = tensors.setdefault(piece["name"], {"shape": piece["shape"], "pieces": []})
            known["pieces"].append({k: piece[k] for k in ("start", "count", "file", "kinds")})
    for name, tensor in tensors.items():
        tensor["pieces"].sort(key=lambda p: p["start"])
        _check_tiles(name, tensor)
    return {
        "format": FORMAT,
        "world_size": world_size,
        "state": snapshot.state,
        "rank_states": [entry["rank_state"] for entry in entries],
        "shared": sorted(snapshot.shared),
        "files": {name: value for entry in entries for name, value in entry["files"].items()},
        "tensors": tensors,
    }


def _check_tiles(name: str, tensor: dict[str, Any]) -> None:
    """Every element is in exactly one piece, or a resume would silently lose some."""
    end, total = 0, 1
    for size in tensor["shape"]:
        total *= size
    for piece in tensor["pieces"]:
        if piece["start"] != end:
            raise CheckpointError(
                f"{name}: elements {end} to {piece['start']} are in no or two pieces"
            )
        end += piece["count"]
    if end != total:
        raise CheckpointError(f"{name}: {end} of {total} elements are in the checkpoint's pieces")


class Published:
    """A published folder, open for reading. Nothing in it is executed: safetensors and JSON only.

    Raises:
        CheckpointError: no manifest, another format, or a file whose size is not the manifest's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no readable {MANIFEST}: {error}") from error
        if self.manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {self.manifest['format']}, this version reads {FORMAT}"
            )
        for name, entry in self.manifest["files"].items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{folder / name} has {size} bytes, its manifest says {entry['bytes']}; remove "
                    f"{folder} to resume from the checkpoint before it"
                )
        self.state: dict[str, Any] = self.manifest["state"]
        self.tensors: dict[str, Any] = self.manifest["tensors"]
        self._open: dict[str, Any] = {}

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare this rank's share of the files with their hashes.

        Raises:
            CheckpointError: a file differs.
        """
        for name in sorted(self.manifest["files"])[rank::world_size]:
            digest = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            if digest != self.manifest["files"][name]["sha256"]:
                raise CheckpointError(
                    f"{self.folder / name} is damaged (its hash differs); remove {self.folder} to "
                    "resume from the checkpoint before it"
                )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(str(self.folder / name), "pt")
        return self._open[name]

    def fill(self, name: str, start: int, out: Tensor, kind: str = "weight") -> None:
        """Elements [start, start + out.numel()) of a logical tensor, into the flat tensor `out`.

        Raises:
            CheckpointError: the tensor, or that kind of it, is not here.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        end = start + out.numel()
        for piece in self.tensors[name]["pieces"]:
            first, last = max(start, piece["start"]), min(end, piece["start"] + piece["count"])
            if first >= last:
                continue
            if kind not in piece["kinds"]:
                raise CheckpointError(f"{self.folder} holds no {kind} of {name}")
            data = self._file(piece["file"]).get_slice(f"{name}@{piece['start']}.{kind}")
            values = data[first - piece["start"] : last - piece["start"]]
            out[first - start : last - start].copy_(values)

    def tensor(self, name: str, kind: str = "weight") -> Tensor:
        """A whole logical tensor, fp32."""
        shape = self.tensors[name]["shape"] if name in self.tensors else [0]
        out = torch.empty(shape)
        self.fill(name, 0, out.view(-1), kind)
        return out

    def shared(self) -> dict[str, Tensor]:
        """The tensors that are equal on all ranks."""
        if not self.manifest["shared"]:
            return {}
        file = self._file("shared.safetensors")
        return {name: file.get_tensor(name) for name in self.manifest["shared"]}

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """That rank's own tensors; none when the checkpoint has fewer ranks."""
        name = f"rank-{rank:05d}.safetensors"
        if name not in self.manifest["files"]:
            return {}
        file = self._file(name)
        return {
            key.removeprefix("rank."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 (safe_open is no mapping)
            if key.startswith("rank.")
        }
