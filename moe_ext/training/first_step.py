"""The first step of a start, watched from outside: by hooks that change no number.

A gradient is followed by two *fingerprints*, fixed linear functionals of it: those of the ranks'
own gradients, added up, must be those of the reduced gradient that the optimizer gets. That holds
only if the reduction went over the right ranks, once, and with the right factor, and it costs two
products a tensor and no memory. Routing is read off the routers' results and the batch.
"""

import math
from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.config import Scope
from moe_ext.model.context import LayerRecord, RoutingContext
from moe_ext.model.extend import extended_layers
from moe_ext.model.moe import ExtendedMoE
from moe_ext.model.multimodal import MultimodalMoE, Output
from moe_ext.model.rows import NewRows
from moe_ext.training.engine import Engine
from moe_ext.training.parts import bit_sum
from moe_ext.training.zero import reduced_gradients

TABLE_LENGTH = 1 << 18


class FirstStep:
    """Collects what happens in one step, and compares."""

    def __init__(self, model: MultimodalMoE, engine: Engine):
        self.model, self.engine = model, engine
        self.blocks = extended_layers(model.lm)
        stream = torch.Generator().manual_seed(0)
        table = torch.randn(TABLE_LENGTH, 2, generator=stream)
        self.table_P2 = table.to(engine.topology.device)
        self.tolerance = 1e-2 if engine.settings.bf16 else 1e-4
        """Of fingerprints and sums, relative to the sizes of what is added up."""
        self.hooks = [
            item.parameter.register_hook(partial(self._gradient, item.name))
            for item in engine.trainable
        ]
        self.hooks += [
            block.router.register_forward_hook(partial(self._routed, index))
            for index, block in self.blocks.items()
        ]
        self.restart()

    def restart(self) -> None:
        """Forget the step so far."""
        self.local: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        """Parameter -> the fingerprints of this rank's own gradients, and the sum of their norms."""
        self.scales: list[float] = []
        """What the engine multiplies the loss by, as it arrives at the loss."""
        self.loss = [0.0, 0.0, 0.0]
        """Share of the token loss; sum of the targets' losses; number of targets."""
        self.choices: dict[tuple[int, int], tuple[RoutingContext, Tensor]] = {}
        self.found: list[str] = []
        self.sums: dict[str, int] = {}
        self.reached: set[str] = set()
        self.norm = 0.0

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def fingerprint(self, flat: Tensor, start: int = 0) -> Tensor:
        """(2,) fp64 of elements `start`, ... of a tensor; pieces' add up to the whole tensor's."""
        total = torch.zeros(2, dtype=torch.float64, device=flat.device)
        position, end = start, start + flat.numel()
        while position < end:
            window, offset = divmod(position, TABLE_LENGTH)
            count = min(TABLE_LENGTH - offset, end - position)
            values = flat[position - start : position - start + count].float()
            # another factor for every window, or two windows changed places unseen
            factor = 0.5 + (window * 0.6180339887498949) % 1.0
            total += factor * (values @ self.table_P2[offset : offset + count]).double()
            position += count
        return total

    def _gradient(self, name: str, gradient: Tensor) -> None:
        flat = gradient.detach().reshape(-1)
        numbers = [*self.fingerprint(flat).tolist(), float(flat.float().norm())]
        self.local[name] = [a + b for a, b in zip(self.local[name], numbers, strict=True)]

    def _routed(self, index: int, _: Any, arguments: tuple[Any, ...], routing: Any) -> None:
        """A layer routes once in forward; when it does so again in backward, it must do the same."""
        context = arguments[1]
        _, earlier = self.choices.setdefault((id(context), index), (context, routing.expert_TS))
        if not torch.equal(earlier, routing.expert_TS):
            moved = int((earlier != routing.expert_TS).any(1).sum())
            self.found.append(
                f"layer {index} routed {moved} tokens to other experts when its activations were "
                "computed again in backward; routing must be kept, not recomputed"
            )

    def forward(self, output: Output, nll: Tensor, loss: Tensor) -> None:
        """After a forward pass; see `Audit.forward`."""
        values = (nll.detach(), output.nll_sum.detach(), output.nll_Z.numel())
        self.loss = [a + float(b) for a, b in zip(self.loss, values, strict=True)]
        loss.register_hook(lambda gradient: self.scales.append(float(gradient)))
        for index, block in self.blocks.items():
            record = output.context.records.get(index)
            if record is None:
                self.found.append(f"layer {index} left no record of its routing")
            else:
                self.found += routing_errors(index, block, record, output.context)

    def gradient_errors(self) -> list[str]:
        """Between the last backward pass and the optimizer. A collective."""
        scale = self.scales[0] if self.scales else math.nan
        topology, sharded = self.engine.topology, {}
        for item in self.engine.trainable:
            sharded[item.name] = f" of place {topology.ep_rank}" if item.sharded else ""
        own = {
            name + sharded[name]: [value / scale for value in numbers]
            for name, numbers in self.local.items()
        }
        reduced: dict[str, list[float]] = {}
        square = 0.0
        for name, start, gradient in reduced_gradients(self.engine):
            size = float(gradient.double().square().sum())
            square += size
            reduced[name + sharded[name]] = [*self.fingerprint(gradient, start).tolist(), size]
        self.sums = {n: bit_sum(piece.weight) for n, piece in self.engine.fragments().items()}
        wanted, got = _added(own), _added(reduced)
        self.reached = {name for name, numbers in got.items() if numbers[2] > 0}
        total = torch.tensor(square, dtype=torch.float64, device=topology.device)
        dist.all_reduce(total)
        self.norm = math.sqrt(float(total))
        if not math.isfinite(self.norm):
            return []  # the engine drops this step, and it is watched anew
        found = [*self.found, *self._loss_errors()]
        for name, numbers in got.items():
            local = wanted.get(name, [0.0, 0.0, 0.0])
            gap = max(abs(a - b) for a, b in zip(local[:2], numbers[:2], strict=True))
            if not gap <= self.tolerance * max(local[2], math.sqrt(numbers[2])):
                ratio = _ratio(numbers, local)
                found.append(
                    f"the gradient of {name} is {ratio:.3g} times the sum of what its ranks computed: "
                    "it was reduced over other ranks, more than once, not at all, or scaled wrongly"
                )
        return found

    def _loss_errors(self) -> list[str]:
        """The ranks' shares of the token loss add up to the mean over all targets. A collective."""
        sums = torch.tensor(self.loss, dtype=torch.float64, device=self.engine.topology.device)
        dist.all_reduce(sums)
        shares, nll_sum, targets = sums.tolist()
        mean = nll_sum / max(targets, 1.0)
        if abs(shares - mean) <= 1e-3 * abs(mean):
            return []
        return [
            f"the step's token loss is {shares:.6g}, added up over ranks and micro-batches, but its "
            f"{targets:.0f} targets have a mean of {mean:.6g}: a share was divided by a wrong count"
        ]

    def step_errors(self, norm: float) -> list[str]:
        """After the optimizer; `norm` is the engine's. A collective.

        Under ZeRO-0 without clipping the engine computes no norm.
        """
        found = []
        engine = self.engine
        tolerance = 1e-2 if engine.settings.bf16 else 1e-5
        if engine.settings.zero_stage > 0 and not abs(norm - self.norm) <= tolerance * self.norm:
            found.append(
                f"the engine says the gradient's norm is {norm:.6g}, the gradients themselves say "
                f"{self.norm:.6g}: a part was counted twice or left out"
            )
        place = f" of place {engine.topology.ep_rank}"
        of_rank = {item.name: item.name + place * item.sharded for item in engine.trainable}
        moved = {
            of_rank[name]: [float(bit_sum(piece.weight) != self.sums[name])]
            for name, piece in engine.fragments().items()
        }
        found += [
            f"{name} received a gradient and did not move: the optimizer skips it or holds another tensor"
            for name, (did,) in _added(moved).items()
            if name in self.reached and not did
        ]
        return found


def _added(own: dict[str, list[float]]) -> dict[str, list[float]]:
    """Numbers by name, added up over ranks. A collective."""
    everybody: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    total: dict[str, list[float]] = {}
    for theirs in everybody:
        for name, numbers in theirs.items():
            known = total.get(name, [0.0] * len(numbers))
            total[name] = [a + b for a, b in zip(known, numbers, strict=True)]
    return total


def _ratio(numbers: list[float], local: list[float]) -> float:
    """The factor that brings the ranks' fingerprints nearest to the reduced gradient's."""
    square = sum(value * value for value in local[:2])
    product = sum(a * b for a, b in zip(numbers[:2], local[:2], strict=True))
    return product / square if square else math.inf


def routing_errors(
    index: int, block: ExtendedMoE, record: LayerRecord, context: RoutingContext
) -> list[str]:
    """What a layer's routing must be whatever the router thinks: by the batch's own ids."""
    expert_TS, real_T = record.expert_TS, context.segment_BS.reshape(-1) != 0
    used_TS, top_k = expert_TS >= 0, block.router.rule.top_k
    sorted_TS = expert_TS.sort(dim=1).values
    twice_T = ((sorted_TS[:, 1:] == sorted_TS[:, :-1]) & (sorted_TS[:, 1:] >= 0)).any(1)
    wrong = {
        "padding tokens go to experts": used_TS.any(1) & ~real_T,
        f"tokens have fewer than top_k={top_k} experts": (used_TS.sum(1) < top_k) & real_T,
        "tokens go to one expert twice": twice_T,
        "tokens go to an expert that is not there": (expert_TS >= record.num_experts).any(1),
    }
    if record.counted_T is not None:
        wrong["padding tokens count in the router's losses"] = record.counted_T & ~real_T
    first = block.num_frozen
    for name, rows in block.router.rows.items():
        assert isinstance(rows, NewRows)
        last = first + rows.weight.shape[0]
        chooses_T = ((expert_TS >= first) & (expert_TS < last)).any(1)
        closed_T = ~open_tokens(rows.scope, rows.modalities, context)
        wrong[
            f"tokens chose {name}'s experts though scope={rows.scope.value} closes these to them"
        ] = chooses_T & closed_T
        first = last
    counts = {what: int(tokens.sum()) for what, tokens in wrong.items()}
    return [f"layer {index}: {count} {what}" for what, count in counts.items() if count]


def open_tokens(scope: Scope, modalities: tuple[int, ...], context: RoutingContext) -> Tensor:
    """(T,) bool, from positions: a token of a segment may choose from its first placeholder on."""
    segment_BS = context.segment_BS
    real_BS = segment_BS != 0
    if scope is Scope.joint:
        return real_BS.reshape(-1)
    new_BS = torch.isin(context.modality_BS, context.modality_BS.new_tensor(modalities)) & real_BS
    if scope is Scope.modality:
        return new_BS.reshape(-1)
    batch, length = segment_BS.shape
    rows = torch.arange(batch, device=segment_BS.device).unsqueeze(1)
    key_BS = rows * (int(segment_BS.max()) + 1) + segment_BS
    position_BS = torch.arange(length, device=segment_BS.device).expand_as(segment_BS)
    first = torch.full((int(key_BS.max()) + 1,), length, device=segment_BS.device)
    first.scatter_reduce_(0, key_BS[new_BS], position_BS[new_BS], "amin")
    return ((position_BS >= first[key_BS]) & real_BS).reshape(-1)
