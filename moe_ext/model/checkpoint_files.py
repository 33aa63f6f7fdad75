"""Writing a Hugging Face checkpoint folder: whole or not at all. `files.py` reads one."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def publish_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, holding what `write(folder)` wrote: whole or not there at all.

    Written beside it and renamed, so a killed build leaves no half folder under the final name. If
    another process publishes the same folder first, its result is kept.
    """
    target = Path(target)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(folder)
        folder.chmod(0o755)  # mkdtemp and safetensors make what they write private
        for file in folder.iterdir():
            file.chmod(0o644)
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def save_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_file_bytes: int = 4 << 30
) -> None:
    """Tensors as safetensors, one file or several with an index, holding one file in memory at a
    time."""
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        save_file(pending, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(pending))
        pending, pending_bytes = {}, 0

    for key, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_file_bytes:
            flush()
        pending[key] = tensor.contiguous()
        pending_bytes += size
        total_bytes += size
    flush()
    if len(files) == 1:
        os.rename(folder / "part-0", folder / SINGLE)
        return
    weight_map = {}
    for number, keys in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.rename(folder / f"part-{number}", folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
