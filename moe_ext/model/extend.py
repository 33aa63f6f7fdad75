"""Put extensions into a pretrained model, and take them out again.

An extension is new experts, router rows and calibrations in some layers, under one name. Several
stand side by side on one base; each is added, saved, loaded and removed by itself.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ext.config import CalibrationKind, ExpertInit, ExpertType, ExtensionConfig, RowInit
from moe_ext.model.experts import Bank, FrozenBank, NewBank, PackedBank
from moe_ext.model.files import Checkpoint, base_sha256
from moe_ext.model.load import BaseExperts, BaseInfo, fill_expert, load_base
from moe_ext.model.lora import LoraBank
from moe_ext.model.moe import ExtendedMoE, extended_layers
from moe_ext.model.packed import Rounding
from moe_ext.model.placement import owners
from moe_ext.model.rows import Calibration, NewRows
from moe_ext.model.start import start_expert, start_rows
from moe_ext.model.state import extension_state, load_extension_state

__all__ = [
    "LayerPlan",
    "add_extension",
    "announce",
    "attach_extension",
    "base_sha256",
    "extended_layers",
    "extension_state",
    "load_base",
    "load_extension_state",
    "parameter_counts",
    "remove_extension",
]


@dataclass
class LayerPlan:
    """What an extension adds to one layer: the probe's manifest holds one a chosen layer."""

    layer: int
    num_new: int
    sources: list[int]
    """The frozen expert that each new expert starts from."""
    bias: list[float] = field(default_factory=list)
    """Start of each new row's scalar bias; empty: zeros."""


def add_extension(
    lm: PreTrainedModel,
    base_path: str,
    name: str,
    plans: list[LayerPlan],
    settings: ExtensionConfig,
    *,
    modalities: tuple[int, ...] = (1,),
    modality_rows: dict[int, Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Add new experts, rows and calibrations to the planned layers, initialised, trainable.

    Every rank reads the source experts of what it will hold from the base's files: no collective.
    What is drawn at random depends on (seed, layer, expert) only, not on the placement.

    Args:
        base_path: the folder that `lm` was loaded from.
        modalities: ids of the modalities whose tokens open the new experts (`settings.scope`).
        modality_rows: layer -> (D,) mean router input of the new modality's tokens, for
            `extension.row_init=domain`.

    Raises:
        ValueError: a plan names no sparse layer or no frozen expert, or settings contradict.
    """
    blocks = extended_layers(lm)
    _check(blocks, name, plans, settings, modality_rows)
    info: BaseInfo = lm.base_info  # type: ignore[assignment]
    experts = BaseExperts(Checkpoint(base_path), info.family, list(blocks))
    attach_extension(lm, name, plans, settings, modalities=modalities, seed=seed)
    for plan in plans:
        block = blocks[plan.layer]
        bank, rows = block.new[name], block.router.rows[name]
        assert isinstance(bank, Bank)
        assert isinstance(rows, NewRows)
        with torch.no_grad():
            for slot, expert in enumerate(bank.expert_ids):
                stream = torch.Generator().manual_seed(_seed(seed, plan.layer, expert))
                if isinstance(bank, LoraBank):
                    bank.start(slot, stream)
                    continue
                source = experts.read(plan.layer, plan.sources[expert])
                weights = start_expert(source, settings, stream)
                fill_expert(bank, slot, weights, f"layer {plan.layer} expert {expert} of {name}")
            domain = None if modality_rows is None else modality_rows.get(plan.layer)
            init = settings.row_init
            start_rows(rows, block.router, plan.sources, plan.bias, init, domain)


def attach_extension(
    lm: PreTrainedModel,
    name: str,
    plans: list[LayerPlan],
    settings: ExtensionConfig,
    *,
    modalities: tuple[int, ...] = (1,),
    seed: int = 0,
) -> None:
    """Add the extension's modules with zero parameters, for a state that is loaded next."""
    info: BaseInfo = lm.base_info  # type: ignore[assignment]
    blocks = extended_layers(lm)
    for plan in plans:
        block = blocks[plan.layer]
        device, shape = block.frozen.gate_up.device, block.frozen.shape
        held = owners(plan.num_new, info.ep_size, settings.placement)[info.ep_rank]
        sizes = (shape, held, plan.num_new, settings.placement)
        bank: NewBank | LoraBank
        if settings.expert_type is ExpertType.lora:
            rank, alpha = settings.lora_rank, settings.lora_alpha
            bank = LoraBank(*sizes, rank=rank, alpha=alpha, dtype=info.dtype, device=device)
            experts = BaseExperts(Checkpoint(info.path), info.family, list(blocks))
            for slot, expert in enumerate(held):
                source = experts.read(plan.layer, plan.sources[expert])
                fill_expert(bank, slot, source, f"layer {plan.layer} source of expert {expert}")
        else:
            bank = NewBank(*sizes, dtype=info.dtype, device=device)
        bank.sources = list(plan.sources)
        calibration = None
        if settings.calibration is not CalibrationKind.none:
            calibration = Calibration(
                settings.calibration,
                block.num_frozen + plan.num_new,
                dtype=info.dtype,
                device=device,
                seed=_seed(seed, plan.layer, plan.num_new),
            )
        shared = settings.row_init is RowInit.clone_shared
        # a clone competes like its source where the base corrects the choice (DeepSeek-V3)
        correction = block.router.correction_bias
        learns = settings.loss_free_rate > 0
        if correction is not None:
            correction = correction[plan.sources].clone()
        elif learns:
            correction = torch.zeros(plan.num_new, device=device)
        row_dtype = block.router.frozen_weight.dtype  # fp32 in Ernie: a clone is its source
        rows = NewRows(
            torch.zeros(plan.num_new, shape.hidden_dim, dtype=row_dtype, device=device),
            torch.zeros(plan.num_new, dtype=row_dtype, device=device),
            settings.scope,
            modalities,
            calibration,
            plan.sources if shared else None,
            correction,
            learns,
        )
        block.add_bank(name, bank, rows)


def remove_extension(lm: PreTrainedModel, name: str) -> None:
    """Take an extension out of every layer; without any, the model is the base bit by bit.

    Raises:
        ValueError: there is no extension of that name.
    """
    found = [block for block in extended_layers(lm).values() if name in block.new]
    if not found:
        raise ValueError(
            f"extension.name={name} is in no layer; present are {_names(lm) or 'none'}"
        )
    for block in found:
        block.remove_bank(name)


def announce(model: nn.Module) -> str:
    """What trains: `trainable 41,209,036 of 238,411,488 parameters (17.3 %)`, then part by part."""
    counts, trains = parameter_counts(model)
    total, trainable = sum(counts.values()), sum(trains.values())
    line = (
        f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / max(total, 1):.1f} %)"
    )
    parts = [
        f"  {part}: {count:,} {'trainable' if trains[part] else 'frozen'}"
        for part, count in counts.items()
        if count
    ]
    return "\n".join([line, *parts, *_rounding(model)])


def _rounding(model: nn.Module) -> list[str]:
    """A line that says what 8 or 4 bits did to the experts that this rank holds."""
    banks = [module for module in model.modules() if isinstance(module, PackedBank)]
    if not banks:
        return []
    total = Rounding()
    for bank in banks:
        total.add(bank.rounding)
    packed, plain = total.relative
    kind = f"{banks[0].bits} bits{' (NF4)' if banks[0].nf4 else ''}"
    return [f"  frozen experts in {kind}: relative error {packed:.2%} (in bf16 {plain:.2%})"]


def parameter_counts(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Part -> elements, and part -> elements that train, of the whole model.

    Frozen experts are counted though they are buffers, and an expert that another rank of the
    expert-parallel group holds is counted once.
    """
    blocks = [m for m in model.modules() if isinstance(m, ExtendedMoE)]
    banks = [bank for block in blocks for bank in block.banks]
    elsewhere = {id(p) for bank in banks for p in bank.parameters()}
    counts = {"frozen experts": 0, "frozen routers": 0, "new experts": 0}
    trains = dict.fromkeys(counts, 0)
    for bank in banks:
        part = "frozen experts" if isinstance(bank, FrozenBank) else "new experts"
        size = _expert_size(bank) * bank.num_experts
        counts[part] += size
        trains[part] += size if any(p.requires_grad for p in bank.parameters()) else 0
    for block in blocks:
        counts["frozen routers"] += sum(buffer.numel() for buffer in block.router.buffers(False))
    for path, parameter in model.named_parameters():
        if id(parameter) in elsewhere:
            continue
        part = _part(path)
        counts[part] = counts.get(part, 0) + parameter.numel()
        trains.setdefault(part, 0)
        trains[part] += parameter.numel() if parameter.requires_grad else 0
    return counts, trains


def _part(path: str) -> str:
    if path.startswith("connectors."):
        return "connectors"
    if ".calibration." in path:
        return "calibrations"
    if ".router.rows." in path:
        return "new rows"
    return "router differences" if path.endswith(".router.delta") else "dense weights"


def _expert_size(bank: Bank) -> int:
    """Parameters of one expert; of a low-rank one what it adds to its source."""
    shape = bank.shape
    if isinstance(bank, LoraBank):
        return 3 * bank.rank * (shape.hidden_dim + shape.intermediate_dim)
    size = 3 * shape.hidden_dim * shape.intermediate_dim
    return size + (2 * shape.intermediate_dim + shape.hidden_dim if shape.bias else 0)


def _names(lm: nn.Module) -> str:
    return ", ".join(dict.fromkeys(name for b in extended_layers(lm).values() for name in b.new))


def _check(
    blocks: dict[int, ExtendedMoE],
    name: str,
    plans: list[LayerPlan],
    settings: ExtensionConfig,
    modality_rows: dict[int, Tensor] | None,
) -> None:
    """Everything that can be wrong, before a layer is touched."""
    if not name or "." in name:
        raise ValueError(f"extension.name={name!r} must be a non-empty word without dots")
    if settings.expert_type is ExpertType.lora and settings.expert_init is not ExpertInit.copy:
        raise ValueError(
            f"extension.expert_init={settings.expert_init.value} has no meaning with "
            "extension.expert_type=lora, which starts as its source; use copy"
        )
    if len({plan.layer for plan in plans}) < len(plans):
        raise ValueError(f"extension.layers={[plan.layer for plan in plans]} names a layer twice")
    for plan in plans:
        block = blocks.get(plan.layer)
        if block is None:
            raise ValueError(
                f"extension.layers holds {plan.layer}, which is no sparse layer of the base; "
                f"choose among {list(blocks)}"
            )
        if name in block.new:
            raise ValueError(
                f"extension.name={name} is already present in layer {plan.layer}; "
                "choose another name or remove it first"
            )
        if len(plan.sources) != plan.num_new or len(plan.bias) not in (0, plan.num_new):
            raise ValueError(
                f"layer {plan.layer} gets {plan.num_new} new experts, but the plan names "
                f"{len(plan.sources)} sources and {len(plan.bias)} biases; give one each"
            )
        wrong = [source for source in plan.sources if not 0 <= source < block.num_frozen]
        if wrong:
            raise ValueError(
                f"layer {plan.layer}: sources {wrong} are no frozen experts; "
                f"they are numbered 0 to {block.num_frozen - 1}"
            )
        if settings.row_init is RowInit.domain and plan.layer not in (modality_rows or {}):
            raise ValueError(
                f"extension.row_init=domain needs the mean router input of layer {plan.layer}; "
                "it comes from the probe, so run a probe stage before or use clone"
            )


def _seed(seed: int, layer: int, expert: int) -> int:
    return (seed * 1_000_003 + layer) * 1_000_003 + expert
