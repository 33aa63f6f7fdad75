"""What needs no travelling is computed between the start and the end of an exchange, both ways."""

import torch
import torch.distributed as dist
from torch import nn

from moe_ext.config import Scope
from moe_ext.model import dispatch
from moe_ext.model.routing import RoutingRule
from tests.model.layers import DIM, Weights, build, sequences
from tests.ranks import run_ranks


def events() -> list[str]:
    """A forward and a backward pass of one of two ranks, in the order in which things happened."""
    log: list[str] = []

    class Flight(dispatch._Flight):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            log.append("start")

        def wait(self):
            log.append("wait")
            return super().wait()

    dispatch._Flight = Flight
    rank, group = dist.get_rank(), dist.group.WORLD
    layer = build(Weights(5, 2), RoutingRule(2), scope=Scope.joint, group=group, rank=rank, world=2)
    layer.shared = nn.Linear(DIM, DIM, bias=False)
    for name, module in (("shared", layer.shared), ("new", layer.new["vision"])):
        module.register_forward_pre_hook(lambda *_, name=name: log.append(name))
        first = next(module.parameters())
        first.register_post_accumulate_grad_hook(lambda _, name=name: log.append(f"{name} back"))
    layer.holder.context = sequences(3, 8, seed=rank)
    y = layer(torch.randn(3, 8, DIM).requires_grad_())
    log.append("backward")
    y.square().sum().backward()
    return log


def test_exchanges_are_in_flight_while_the_rank_computes():
    tokens = ["start", "start"]  # rows; weights and ids
    forward = [*tokens, "shared", "wait", "wait", "start", "new", "wait"]
    backward = ["start", "new back", "wait", *tokens, "shared back", "wait", "wait"]
    for log in run_ranks(events, 2):
        assert log == [*forward, "backward", *backward]
