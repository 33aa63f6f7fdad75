"""An extension's tensors by keys that do not depend on ranks, other extensions or the base's names.

`layers.{layer}.{extension}.experts.{expert}.gate_up` and the other parameters of its bank;
`...rows.weight`, `...rows.bias` and, with loss-free balancing, `...rows.correction`;
`...calibration.w1`. `expert` counts the extension's own experts of that layer.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from moe_ext.model.experts import Bank
from moe_ext.model.moe import ExtendedMoE, extended_layers
from moe_ext.model.rows import NewRows


def extension_state(lm: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of the extensions (all, or those of `names`) that this rank holds: live views.

    A rank holds a sharded bank's own experts; rows, calibrations and replicated banks it holds all.
    """
    state = {}
    for layer, block in extended_layers(lm).items():
        for name in _present(block, names):
            prefix = f"layers.{layer}.{name}"
            bank = _bank(block, name)
            for slot, expert in enumerate(bank.expert_ids):
                for part, stack in bank.named_parameters():
                    state[f"{prefix}.experts.{expert}.{part}"] = stack.detach()[slot]
            for path, tensor in _of_rows(block, name).items():
                state[f"{prefix}.{path}"] = tensor.detach()
    return state


def extension_keys(lm: nn.Module, names: Iterable[str] | None = None) -> set[str]:
    """The keys of `extension_state` over all ranks of the expert-parallel group."""
    keys = set()
    for layer, block in extended_layers(lm).items():
        for name in _present(block, names):
            prefix = f"layers.{layer}.{name}"
            bank = _bank(block, name)
            parts = [part for part, _ in bank.named_parameters()]
            keys |= {
                f"{prefix}.experts.{expert}.{part}"
                for expert in range(bank.num_experts)
                for part in parts
            }
            keys |= {f"{prefix}.{path}" for path in _of_rows(block, name)}
    return keys


@torch.no_grad()
def load_extension_state(
    lm: nn.Module, state: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> None:
    """Copy `state` into the extensions that the model has; experts held elsewhere are passed over.

    Raises:
        ValueError: a tensor is missing, has a wrong shape, or belongs to nothing in the model.
    """
    names = None if names is None else list(names)
    own = extension_state(lm, names)
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - extension_keys(lm, names))
    if missing or unknown:
        raise ValueError(
            f"the extension's state does not fit the model: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])}); "
            "it was saved with other layers, other numbers of experts or another name"
        )
    for key, target in own.items():
        value = state[key]
        if value.shape != target.shape:
            raise ValueError(
                f"the extension's {key} has shape {tuple(value.shape)}, the model's "
                f"{tuple(target.shape)}; it belongs to another base"
            )
        target.copy_(value)


def _present(block: ExtendedMoE, names: Iterable[str] | None) -> list[str]:
    return [name for name in block.new if names is None or name in names]


def _of_rows(block: ExtendedMoE, name: str) -> dict[str, Tensor]:
    rows = block.router.rows[name]
    assert isinstance(rows, NewRows)
    found = {}
    for path, parameter in rows.named_parameters():
        found[path if path.startswith("calibration.") else f"rows.{path}"] = parameter
    if rows.learns_correction and rows.correction is not None:
        found["rows.correction"] = rows.correction
    return found


def _bank(block: ExtendedMoE, name: str) -> Bank:
    bank = block.new[name]
    assert isinstance(bank, Bank)
    return bank
