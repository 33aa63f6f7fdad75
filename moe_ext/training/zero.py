"""What DeepSpeed's optimizers keep to themselves, read for the audit: groups of ranks, gradients."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from moe_ext.training.engine import Engine


def reductions(engine: "Engine") -> Iterator[tuple[nn.Parameter, list[int], list[int]]]:
    """(parameter, ranks its gradient is reduced over, ranks its optimizer state is divided among).

    As often as an optimizer group has the parameter.
    """
    zero: Any = engine.deepspeed.optimizer
    world = list(range(engine.topology.world_size))
    if engine.settings.zero_stage == 0:
        for group in engine.adam.param_groups:
            for parameter in group["params"]:
                over = _tagged(parameter) or world
                yield parameter, over, over
        return
    for parameters, group in zip(zero.bit16_groups, zero.real_dp_process_group, strict=True):
        for parameter in parameters:
            yield parameter, _tagged(parameter) or world, ranks_of(group)


def _tagged(parameter: Any) -> list[int]:
    """Ranks that hold the same experts, of a parameter with DeepSpeed's tags; else none."""
    from deepspeed.utils import groups

    if getattr(parameter, "allreduce", True):
        return []
    return ranks_of(groups._get_expert_data_parallel_group(parameter.group_name))


def ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    """The global ranks of a process group, ascending; of None, the world's."""
    return sorted(dist.get_process_group_ranks(group or dist.group.WORLD))


def reduced_gradients(engine: "Engine") -> Iterator[tuple[str, int, Tensor]]:
    """(name, first element, flat gradient) of the pieces that this rank owns.

    Between the last backward pass of a step and the optimizer. All ranks' pieces tile every
    replicated parameter once, as `Engine.fragments` do.
    """
    if engine.settings.zero_stage == 0:
        held = engine.fragments()
        for item in engine.trainable:
            if item.name in held and item.parameter.grad is not None:
                yield item.name, 0, item.parameter.grad.reshape(-1)
        return
    zero: Any = engine.deepspeed.optimizer
    names = {id(item.parameter): item.name for item in engine.trainable}
    for index, parameters in enumerate(zero.bit16_groups):
        pieces, end = {}, 0
        for piece in zero.averaged_gradients[index] or []:  # one a parameter, and padding
            pieces[end] = piece.reshape(-1)
            end += piece.numel()
        for parameter in parameters:
            if id(parameter) not in names or parameter._hp_mapping is None:
                continue
            held_at = parameter._hp_mapping.hp_fragment_address
            first = parameter._hp_mapping.lp_fragment_address.start
            yield names[id(parameter)], first, pieces[held_at.start][: held_at.numel]
