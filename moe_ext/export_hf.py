"""A whole Hugging Face checkpoint of the base's own architecture, with the new experts among its own.

For those who want `from_pretrained` and nothing of ours. An architecture knows one router rule and one
number of experts, so this form exists only where these can express the extension; everything else
is refused with the reason. `export.save_extension` can save every extension.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from moe_ext.config import Scope
from moe_ext.export import refuse_existing, sync
from moe_ext.model.checkpoint_files import publish_folder, save_tensors
from moe_ext.model.experts import Bank
from moe_ext.model.families import LAYER_PREFIX, Family, sparse_layers
from moe_ext.model.files import Checkpoint
from moe_ext.model.layouts import ExpertTensors, Stacked
from moe_ext.model.load import BaseExperts, BaseInfo, views_of
from moe_ext.model.lora import LoraBank
from moe_ext.model.moe import ExtendedMoE, extended_layers
from moe_ext.model.rows import NewRows
from moe_ext.model.state import extension_keys, extension_state

_log = logging.getLogger(__name__)


def export_uniform(
    lm: PreTrainedModel, folder: str | Path, *, approximate: bool = False
) -> list[str]:
    """Write a Hugging Face checkpoint of the base's architecture with E + N experts a sparse layer.

    `from_pretrained` loads it without this package. Every sparse layer gets the same number of
    experts: the architecture counts them once. Where a bias can keep experts from ever being chosen
    (GPT-OSS, DeepSeek-V3), layers with fewer are padded with such; elsewhere that is refused.

    Args:
        approximate: write it although the architecture cannot express scopes other than `joint`,
            calibrations or new rows' biases, and leave those out.

    Returns:
        What was left out, one line each, as logged; empty: the export computes the same function.

    Raises:
        ValueError: the extension cannot be expressed; the message lists why.
    """
    folder = Path(folder)
    refuse_existing(folder)
    info: BaseInfo = lm.base_info  # type: ignore[assignment]
    blocks = extended_layers(lm)
    _refuse_inexpressible(lm, blocks, info.family)
    left_out = _left_out(blocks)
    if left_out and not approximate:
        raise ValueError(
            f"a checkpoint of {lm.config.model_type} cannot express this extension: "
            f"{'; '.join(left_out)}. Use save_extension, or approximate=True to leave these out"
        )
    for line in left_out:
        _log.warning("the export leaves out: %s", line)
    total = max(block.num_frozen + block.num_new for block in blocks.values())

    def write(partial: Path) -> None:
        save_tensors(partial, _uniform_tensors(lm, blocks, info, total))
        for file in info.path.iterdir():  # tokenizer, chat template, generation settings
            texts = file.suffix in (".json", ".txt", ".model", ".jinja")
            if texts and "safetensors" not in file.name and not file.name.startswith("."):
                shutil.copy(file, partial)
        config = AutoConfig.from_pretrained(info.path)
        setattr(config, info.family.experts_key, total)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = info.dtype
        config.save_pretrained(partial)
        sync(partial)

    publish_folder(folder, write)
    return left_out


def _refuse_inexpressible(lm: nn.Module, blocks: dict[int, ExtendedMoE], family: Family) -> None:
    """Raise for what not even an approximation could write."""
    counts = {index: block.num_new for index, block in blocks.items()}
    first = next(iter(blocks.values())).router
    # Padding must not take part in a softmax: then it would shrink the others' probabilities.
    corrects = first.correction_bias is not None and first.rule.score == "sigmoid"
    pads = corrects or bool(family.router.bias)
    reasons = []
    if not any(counts.values()):
        raise ValueError("the model has no extension: its base's folder is the export")
    if len(set(counts.values())) > 1 and not pads:
        reasons.append(
            f"its layers have different numbers of new experts ({counts}) and its router no bias "
            "that could switch padding off"
        )
    if first.rule.num_groups > 1:
        reasons.append("its experts form groups of equal size, and new experts are in none")
    if extension_keys(lm) - extension_state(lm).keys():
        reasons.append("some of its experts are on other ranks (load with parallel.ep_size=1)")
    rows = [rows for block in blocks.values() for rows in block.router.rows.values()]
    if any(row.shared_with for row in rows if isinstance(row, NewRows)):
        reasons.append("clone_shared gives two experts one top-k slot")
    if reasons:
        raise ValueError(
            f"this extension cannot become a checkpoint of its architecture: {'; '.join(reasons)}. "
            "Use save_extension"
        )


def _left_out(blocks: dict[int, ExtendedMoE]) -> list[str]:
    """What an architecture's own router does not have."""
    found = {}
    for index, block in blocks.items():
        for name, rows in block.router.rows.items():
            assert isinstance(rows, NewRows)
            if rows.scope is not Scope.joint:
                found[
                    f"{name}'s scope={rows.scope.value}: every token may choose the new experts"
                ] = 0
            if rows.bias.any() and block.router.frozen_bias is None:
                found[f"{name}'s row biases in layer {index}"] = 0
            if rows.learns_correction and block.router.correction_bias is None:
                found[f"{name}'s loss-free balance in layer {index}"] = 0
            calibration = rows.calibration
            if calibration is not None:
                width = block.num_frozen + rows.weight.shape[0]
                probe = torch.eye(width, device=rows.weight.device)
                if calibration(probe).any():
                    found[f"{name}'s calibration in layer {index}"] = 0
    return list(found)


def _uniform_tensors(
    lm: nn.Module, blocks: dict[int, ExtendedMoE], info: BaseInfo, total: int
) -> Iterator[tuple[str, Tensor]]:
    """The export's tensors: the base's dense ones as stored, then layer by layer the sparse ones."""
    checkpoint, family = Checkpoint(info.path), info.family
    experts = BaseExperts(checkpoint, family, sparse_layers(lm.config))
    router_keys = (*family.router.weight, *family.router.bias, *family.router.correction_bias)
    replaced = set()
    sparse = {}
    for index, block in blocks.items():
        prefix = LAYER_PREFIX.format(layer=index)
        read = _reader(experts, block, index, info.dtype)
        replaced |= set(experts.layout.keys(prefix, total))
        replaced |= {prefix + key for key in router_keys}
        sparse[index] = (prefix, read)
    for key in checkpoint:
        if key not in replaced:
            value = checkpoint.tensor(key)
            yield key, value.to(info.dtype) if value.is_floating_point() else value
    # a quantised layout is only read: plain numbers go out in the architecture's first one
    quantised = isinstance(experts.layout, Stacked) and experts.layout.mxfp4
    layout = family.layouts[0] if quantised else experts.layout
    for index, (prefix, read) in sparse.items():
        yield from layout.write(prefix, total, read).items()
        yield from _router_tensors(checkpoint, family, blocks[index], prefix, total)


def _reader(
    experts: BaseExperts, block: ExtendedMoE, index: int, dtype: torch.dtype
) -> Callable[[int], ExpertTensors]:
    """Logical expert -> its numbers: frozen ones from the base's files, new ones from the model."""
    new: list[tuple[Bank, int]] = []
    for bank in block.new.values():
        assert isinstance(bank, Bank)
        new += [(bank, slot) for slot in range(len(bank.expert_ids))]

    def read(expert: int) -> ExpertTensors:
        if expert < block.num_frozen:
            stored = experts.read(index, expert)
        elif expert - block.num_frozen < len(new):
            bank, slot = new[expert - block.num_frozen]
            views = views_of(bank, slot)
            if isinstance(bank, LoraBank):
                gate_up, down = bank.merged(slot)
                gate, up = gate_up.chunk(2)
                views |= {"gate": gate, "up": up, "down": down}
            stored = ExpertTensors(**views).map(lambda view: view.detach().cpu())
        else:  # padding: never chosen
            stored = experts.read(index, 0).map(torch.zeros_like)
        return stored.map(lambda value: value.to(dtype))

    return read


def _router_tensors(
    checkpoint: Checkpoint, family: Family, block: ExtendedMoE, prefix: str, total: int
) -> Iterator[tuple[str, Tensor]]:
    """Router rows and biases with the new experts' after the frozen ones', padding switched off."""
    rows = [rows for rows in block.router.rows.values() if isinstance(rows, NewRows)]
    count = sum(row.weight.shape[0] for row in rows)
    pad = total - block.num_frozen - count
    # A finite number, so that no arithmetic on it gives NaN; far below every score.
    never = -1e4

    def joined(spellings: tuple[str, ...], new: list[Tensor], fill: float) -> tuple[str, Tensor]:
        key = next(prefix + s for s in spellings if prefix + s in checkpoint)
        stored = checkpoint.tensor(key)
        frozen = stored.reshape(block.num_frozen, -1)
        parts = [frozen, *(part.detach().cpu().reshape(-1, frozen.shape[1]) for part in new)]
        padding = torch.full((pad, frozen.shape[1]), fill)
        value = torch.cat([*(part.to(stored.dtype) for part in parts), padding.to(stored.dtype)])
        # (E,) biases stay vectors; Ernie's is (1, E)
        shape = [total if size == block.num_frozen else size for size in stored.shape]
        return key, value.reshape(shape)

    keys = family.router
    yield joined(keys.weight, [row.weight for row in rows], 0.0)
    if keys.bias:
        yield joined(keys.bias, [row.bias for row in rows], never)
    if keys.correction_bias:
        corrections = [row.correction for row in rows if row.correction is not None]
        yield joined(keys.correction_bias, corrections, never)
