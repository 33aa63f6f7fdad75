"""Load a pretrained MoE model: every rank reads the tensors it holds, and no others.

The model is built on the meta device, its sparse blocks become `ExtendedMoE`, and only then is
memory
allocated: dense weights as frozen parameters, this rank's experts and the router rows as buffers.
Tensors are copied out of the memory-mapped files one slice at a time, so that a rank's anonymous
memory grows by what it holds and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as hf_init

from moe_ext.config import FrozenFormat, Placement
from moe_ext.model.attention import use_short_attention
from moe_ext.model.context import ContextHolder
from moe_ext.model.experts import Bank, FrozenBank, PackedBank
from moe_ext.model.families import LAYER_PREFIX, Config, Family, family_of
from moe_ext.model.files import Checkpoint
from moe_ext.model.layouts import ExpertLayout, ExpertTensors
from moe_ext.model.moe import ExtendedMoE, extended_layers
from moe_ext.model.packed import Packed, pack_rows
from moe_ext.model.placement import cold_experts, owners
from moe_ext.model.routing import Router


@dataclass
class BaseInfo:
    """Where a loaded model came from and what this rank holds of it; `lm.base_info`."""

    path: Path
    family: Family
    ep_rank: int
    ep_size: int
    dtype: torch.dtype


class BaseExperts:
    """Reads single experts and router rows of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, family: Family, layers: list[int]):
        self.checkpoint = checkpoint
        self.layout = _layout_of(checkpoint, family, layers)

    def read(self, layer: int, expert: int) -> ExpertTensors:
        """One expert's numbers, as views of the mapped file."""
        return self.layout.read(self.checkpoint, LAYER_PREFIX.format(layer=layer), expert)


def _layout_of(checkpoint: Checkpoint, family: Family, layers: list[int]) -> ExpertLayout:
    """The layout that this checkpoint uses, told by the keys of the first sparse layer."""
    prefix = LAYER_PREFIX.format(layer=layers[0])
    for layout in family.layouts:
        if prefix + layout.key() in checkpoint:
            return layout
    tried = " nor ".join(repr(prefix + layout.key()) for layout in family.layouts)
    raise ValueError(
        f"base.path={checkpoint.path} has neither {tried}, so its experts are in a layout that "
        "this "
        "architecture's row in moe_ext/model/families.py lacks"
    )


def load_base(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    ep_rank: int = 0,
    ep_size: int = 1,
    ep_group: Any = None,
    frozen_placement: Placement = Placement.shard,
    attn_implementation: str | None = None,
    frozen_bits: int = 0,
    frozen_format: FrozenFormat = FrozenFormat.plain,
    hot: Mapping[int, Sequence[int]] | None = None,
) -> PreTrainedModel:
    """The pretrained model with `ExtendedMoE` blocks without new experts, frozen, in eval mode.

    Its layers find the routing context in `lm.context_holder`; `lm.base_info` says what was loaded.
    Equal to the Hugging Face model in what it computes. Reads this rank's share of the experts
    only; `ep_group` is the process group of the `ep_size` ranks that share them.

    Args:
        frozen_bits: 8 or 4 keeps the experts' matrices in so many bits (`model/packed.py`); 0 in `dtype`.
        frozen_format: how 4 bits keep a number.
        hot: layer -> experts of a sharded bank that every rank holds, so that no token travels for them.

    Raises:
        ValueError: unsupported architecture, a missing file or tensor, a wrong shape, or a form of
            quantisation that cannot be read.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"base.path={path} has no config.json; give the folder of a Hugging Face model"
        )
    config = AutoConfig.from_pretrained(path)
    family = family_of(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is read is plain; the checkpoint knows how
    checkpoint = Checkpoint(path, dtype)
    lm = build_on_meta(config, dtype, attn_implementation)
    lm.base_info = BaseInfo(path, family, ep_rank, ep_size, dtype)  # type: ignore[assignment]

    device = torch.device(device)
    holder = lm.context_holder = ContextHolder()  # type: ignore[assignment]
    for index, layer in enumerate(lm.model.layers):
        if not family.is_sparse(config, index):
            continue
        cold, hot_here = cold_experts(
            family.num_experts(config), ep_size, frozen_placement, (hot or {}).get(index, ())
        )
        held = [cold[e] for e in owners(len(cold), ep_size, frozen_placement)[ep_rank]]

        def bank_of(held: list[int], num_experts: int, placement: Placement) -> FrozenBank:
            nf4 = frozen_format is FrozenFormat.nf4
            kind = partial(PackedBank, bits=frozen_bits, nf4=nf4) if frozen_bits else FrozenBank
            shape = family.expert_shape(config)
            return kind(shape, held, num_experts, placement, dtype=dtype, device=device)

        block = getattr(layer, family.block)
        extended = ExtendedMoE(
            index,
            _empty_router(config, family, dtype, device),
            bank_of(held, len(cold), frozen_placement),
            family.shared(block),
            holder,
            ep_group,
            returns_tuple=family.returns_tuple,
            hot=bank_of(hot_here, len(hot_here), Placement.replicate) if hot_here else None,
        )
        setattr(layer, family.block, extended)

    _read_dense(lm, checkpoint, family, device)
    _read_sparse(lm, checkpoint, family)
    _rebuild_buffers(lm, device)
    if (path / "generation_config.json").is_file():
        lm.generation_config = GenerationConfig.from_pretrained(path)
    return lm.requires_grad_(False).eval()


def build_on_meta(
    config: Config, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The Hugging Face model with shapes and without memory."""
    if getattr(config, "output_router_logits", False):
        # Its auxiliary loss looks for router modules that are no longer there; ours is built by hand.
        config.output_router_logits = False
    with torch.device("meta"), hf_init.meta_device_safe_creation_ops():
        lm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    if attn_implementation is None:
        use_short_attention(lm.config)
    return lm


def _empty_router(
    config: Config, family: Family, dtype: torch.dtype, device: torch.device
) -> Router:
    """Router of one layer, allocated on the device, not yet filled."""
    keys = family.router
    return Router(
        family.rule(config),
        family.num_experts(config),
        config.hidden_size,
        dtype=torch.float32 if keys.fp32 else dtype,
        device=device,
        bias=bool(keys.bias),
        correction_bias=bool(keys.correction_bias),
    )


def _fill(target: Tensor, value: Tensor | None, what: str) -> None:
    """Copy, casting to the target's dtype and device."""
    assert value is not None, what
    if target.shape != value.shape:
        raise ValueError(
            f"base.path: {what} has shape {tuple(value.shape)}, but config.json implies "
            f"{tuple(target.shape)}; the two do not belong together"
        )
    target.copy_(value)


@torch.no_grad()
def _read_dense(
    lm: PreTrainedModel, checkpoint: Checkpoint, family: Family, device: torch.device
) -> None:
    """Allocate and read every parameter and persistent buffer that is still on meta."""
    key_of = {_module_name(key, family): key for key in checkpoint}
    fp32_names = lm._keep_in_fp32_modules_strict or ()
    done: dict[int, Tensor] = {}  # tied tensors are one object under several names
    tensors: dict[str, Tensor] = dict(lm.named_parameters(remove_duplicate=False))
    tensors |= {name: buffer for name, buffer in lm.named_buffers() if _is_persistent(lm, name)}
    # A tied pair may be stored under either name: read the names that are there first.
    for name in sorted(tensors, key=lambda name: name not in key_of):
        empty = tensors[name]
        if empty.device.type != "meta":
            continue
        if id(empty) not in done:
            dtype = empty.dtype
            if any(part in name for part in fp32_names) and dtype.is_floating_point:
                dtype = torch.float32
            value = torch.empty(empty.shape, dtype=dtype, device=device)
            _fill(value, checkpoint.tensor(key_of.get(name, name)), name)
            is_parameter = isinstance(empty, nn.Parameter)
            done[id(empty)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        owner, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(owner), attribute, done[id(empty)])


def _module_name(key: str, family: Family) -> str:
    for pattern, replacement in family.renames:
        key = re.sub(pattern, replacement, key)
    return key


def _is_persistent(lm: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute not in lm.get_submodule(owner)._non_persistent_buffers_set


@torch.no_grad()
def _read_sparse(lm: PreTrainedModel, checkpoint: Checkpoint, family: Family) -> None:
    """Fill the routers and the experts held here, one expert at a time."""
    blocks = extended_layers(lm)
    experts = BaseExperts(checkpoint, family, list(blocks))
    for index, block in blocks.items():
        prefix = LAYER_PREFIX.format(layer=index)
        for key, (target, stored) in stored_router(block.router, checkpoint, family, index).items():
            _fill(target, stored, key)
        for bank in block.frozen_banks:
            for slot, expert in enumerate(bank.expert_ids):
                fill_expert(bank, slot, experts.read(index, expert), f"{prefix}expert {expert}")


def stored_router(
    router: Router, checkpoint: Checkpoint, family: Family, layer: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Key of the checkpoint -> (frozen tensor of the layer's router, what is stored for it)."""
    prefix, found = LAYER_PREFIX.format(layer=layer), {}
    for target, spellings in (
        (router.frozen_weight, family.router.weight),
        (router.frozen_bias, family.router.bias),
        (router.correction_bias, family.router.correction_bias),
    ):
        if target is not None:
            keys = [prefix + key for key in spellings]
            key = next((key for key in keys if key in checkpoint), keys[0])
            found[key] = (target, checkpoint.tensor(key).view(target.shape))
    return found


def fill_expert(bank: Bank, slot: int, weights: ExpertTensors, what: str) -> None:
    """Copy one expert's numbers into entry `slot` of a bank; pack them where the bank is packed."""
    if isinstance(bank, PackedBank):
        _fill_packed(bank, slot, weights, what)
        return
    for name, target in views_of(bank, slot).items():
        _fill(target, getattr(weights, name), f"{what} {name}")


def _fill_packed(bank: PackedBank, slot: int, weights: ExpertTensors, what: str) -> None:
    """One expert's matrices as codes and scales, one matrix at a time."""
    wide = bank.shape.intermediate_dim
    gate_up, down = bank.gate_up, bank.down
    places = {
        "gate": (gate_up.codes[slot, :wide], gate_up.scale[slot, :wide]),
        "up": (gate_up.codes[slot, wide:], gate_up.scale[slot, wide:]),
        "down": (down.codes[slot], down.scale[slot]),
    }
    for name, (codes, scale) in places.items():
        found, scale_found = pack_rows(getattr(weights, name), bank.bits, bank.nf4)
        _fill(codes, found, f"{what} {name}")
        scale.copy_(scale_found)
        bank.rounding.note(getattr(weights, name), Packed(codes[None], scale[None]))
    if bank.gate_up_bias is not None and bank.down_bias is not None:
        _fill(bank.gate_up_bias[slot, :wide], weights.gate_bias, f"{what} gate_bias")
        _fill(bank.gate_up_bias[slot, wide:], weights.up_bias, f"{what} up_bias")
        _fill(bank.down_bias[slot], weights.down_bias, f"{what} down_bias")


def views_of(bank: Bank, slot: int) -> dict[str, Tensor]:
    """Field of `ExpertTensors` -> the view of entry `slot` of a bank that holds it."""
    wide = bank.shape.intermediate_dim
    gate_up = bank.gate_up[slot]
    views = {"gate": gate_up[:wide], "up": gate_up[wide:], "down": bank.down[slot]}
    if bank.gate_up_bias is not None and bank.down_bias is not None:
        bias = bank.gate_up_bias[slot]
        views |= {"gate_bias": bias[:wide], "up_bias": bias[wide:]}
        views |= {"down_bias": bank.down_bias[slot]}
    return views


@torch.no_grad()
def _rebuild_buffers(lm: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies), as transformers does."""
    for name, module in lm.named_modules():
        if isinstance(module, ExtendedMoE):
            continue
        lost = {
            key: buffer
            for key, buffer in module.named_buffers(recurse=False)
            if buffer.device.type == "meta"
        }
        if not lost:
            continue
        for key, buffer in lost.items():
            value = torch.full_like(buffer, float("nan"), device=device)
            module.register_buffer(key, value, persistent=False)
        lm._init_weights(module)
        left = [key for key in lost if module.get_buffer(key).isnan().any()]
        if left:
            raise ValueError(
                f"the buffers {left} of {name or 'the model'} are in no checkpoint and "
                "transformers "
                "does not say how to compute them; this architecture cannot be loaded"
            )
