"""What DeepSpeed's engine is shown of a model: its trainable parameters, and a sign that it has experts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_ext.training.topology import Topology


@dataclass(frozen=True)
class TrainableParameter:
    """One parameter of this rank that a stage trains."""

    name: str
    parameter: nn.Parameter
    part: str
    """Name of the part it belongs to (connector, new_experts, ...): its optimizer group."""
    sharded: bool = False
    """Other ranks of the expert-parallel group hold other experts under this name."""

    @property
    def is_fp32(self) -> bool:
        """Kept so, in a bf16 run as well: a router row beside frozen ones that are (Ernie)."""
        return self.parameter.dtype is torch.float32


class Shown(nn.Module):
    """The trainable parameters, for DeepSpeed to see; forward is the whole model's."""

    def __init__(
        self, forward: Callable[..., Any], parameters: list[TrainableParameter], bf16: bool
    ):
        super().__init__()
        self.kept = {id(item.parameter) for item in parameters if bf16 and item.is_fp32}
        # not through __setattr__: a module given here would become a submodule, seen by DeepSpeed
        object.__setattr__(self, "_forward_model", forward)
        for item in parameters:
            self.register_parameter(item.name.replace(".", "/"), item.parameter)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those that DeepSpeed may cast: in a bf16 run all but the fp32 ones.

        DeepSpeed 0.19.8 casts whatever it finds here (its `keep_in_fp32_modules` is for buffers only).
        Nothing else that ZeRO 1 and 2 do reads this: the optimizer's groups are ours, and the broadcast
        from rank 0 goes by `named_parameters`.
        """
        return (p for p in super().parameters(recurse) if id(p) not in self.kept)

    def forward(self, *args: Any) -> Any:
        return self._forward_model(*args)


def expert_marker(topology: Topology) -> nn.Module:
    """A parameterless module that makes DeepSpeed's engine set up its expert groups.

    Its class is AutoEPMoELayer, of which only `nn.Module.__init__` runs. A stray
    `engine.save_checkpoint` then fails with an AttributeError instead of losing every expert that
    is not rank 0's.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class ExpertMarker(AutoEPMoELayer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.ep_size, self.ep_group_name = topology.ep_size, topology.ep_group_name
            self.num_experts = self.num_local_experts = topology.ep_size
            self.deepep_scope = None

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups exist already: `topology.start` made them."""

        def forward(self, *_: Any) -> Any:
            raise AssertionError("the marker computes nothing")

    return ExpertMarker()
