"""Bytes of tensors that a rank holds, by kind, for one placement.

With e bytes an element (2 in bf16, 4 in fp32) and n elements that this rank trains, each held alike
by dp ranks (the world for what is on every rank, world / ep_size for sharded new experts):

    frozen experts  e * held; in 8 and 4 bits see `model/packed.py`
    rest            e * (the base apart from its experts, what the extension keeps frozen)
    trained         e * n
    gradients       e * n / dp: of this rank's partition, from the end of backward to the step
    optimizer       12 * n / dp: fp32 master weights and two moments

While backward runs DeepSpeed 0.19.8 has more: a bucket of min(n, 50 M) elements that gradients are
reduced in and, with several micro-batches a step, at stage 1 all n elements between them and at stage 2
this rank's part a second time. With the bucket, a step of one micro-batch in bf16 is
2 * frozen + (4 + 12/dp) * n, the rule of thumb; between backward and step it is
2 * frozen + (2 + 14/dp) * n. Both are measured in `tests/planning/test_memory.py`. A step then needs
an fp32 copy of one parameter group's gradient.

Activations are an estimate of what autograd keeps (`activation_bytes`).
"""

from dataclasses import dataclass
from math import prod

from moe_ext.config import Placement
from moe_ext.model.head import LOGIT_BYTES
from moe_ext.model.packed import packed_shapes
from moe_ext.model.placement import owners
from moe_ext.planning.sizes import BaseSizes, EncoderSizes, ExtensionSizes
from moe_ext.planning.step import Work

MASTER_AND_MOMENTS = 12
BUCKET_ELEMENTS = 50_000_000
"""Of the bucket that `training/engine.py` asks DeepSpeed for, at most."""


@dataclass(frozen=True)
class Placed:
    """One placement of the banks, and how the optimizer and the frozen bank are kept."""

    ep_size: int
    frozen: Placement
    new: Placement
    zero_stage: int
    frozen_bits: int = 0
    """0: the run's precision."""
    num_hot: int = 0
    """Frozen experts a layer that every rank holds though the bank is sharded."""

    @property
    def exchanges(self) -> bool:
        """Whether tokens travel at all."""
        return self.ep_size > 1 and Placement.shard in (self.frozen, self.new)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    frozen: int
    rest: int
    encoder: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """Of one part of the output layer's rows, for a moment at the end of forward."""
    buckets: int
    """What reduces gradients, beside `gradients`, while backward runs."""
    step: int
    """What an optimizer step needs for a moment, when activations and buckets are gone."""

    @property
    def state(self) -> int:
        """All tensors between backward and step."""
        base = self.frozen + self.rest + self.encoder
        return base + self.trained + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The most that is there at a time."""
        return self.state + max(self.activations + max(self.buckets, self.logits), self.step)


def expert_bytes(base: BaseSizes, element_bytes: int, bits: int) -> int:
    """Of one frozen expert: plain, or packed with its scales; biases stay plain."""
    if bits == 0:
        return base.expert_elements * element_bytes
    dim, wide = base.expert.hidden_dim, base.expert.intermediate_dim
    packed = sum(
        prod(size) * dtype.itemsize
        for matrix in ((1, 2 * wide, dim), (1, dim, wide))
        for size, dtype in packed_shapes(matrix, bits).values()
    )
    return packed + (base.expert_elements - 3 * dim * wide) * element_bytes


def rank_memory(
    base: BaseSizes,
    extension: ExtensionSizes,
    encoders: list[EncoderSizes],
    trains: tuple[int, int],
    placed: Placed,
    work: Work,
    world: int,
    ep_rank: int = 0,
) -> RankMemory:
    """Bytes of the rank at `ep_rank` of its group; rank 0 holds the most.

    Args:
        trains: elements that the stage trains (`sizes.trained_elements`).
    """
    e = work.element_bytes
    held = held_experts(base.num_experts, placed.ep_size, placed.frozen, placed.num_hot)[ep_rank]
    new = len(owners(extension.num_new, placed.ep_size, placed.new)[ep_rank])
    frozen = len(base.sparse_layers) * held * expert_bytes(base, e, placed.frozen_bits)
    share = new / extension.num_new
    replicated, experts = trains[0], round(trains[1] * share)
    sharded = placed.new is Placement.shard and placed.ep_size > 1
    dp_of_experts = world // placed.ep_size if sharded else world
    whole = extension.num_layers * (
        new * (extension.trained_expert + extension.fixed_expert)
        + extension.rows
        + extension.calibration
    ) + sum(encoder.connector for encoder in encoders)
    trained = replicated + experts
    own = base.dense + len(base.sparse_layers) * base.router
    rest = (own - base.always_fp32) * e + base.always_fp32 * 4 + base.buffer_bytes
    rest += max(whole - trained, 0) * e + sum(x.connector_buffer_bytes for x in encoders)
    owned = replicated / world + experts / dp_of_experts
    largest = max(replicated / world, experts / dp_of_experts)
    buckets: float = min(trained, BUCKET_ELEMENTS)
    if work.accumulation > 1:
        buckets += trained - owned if placed.zero_stage == 1 else owned
    return RankMemory(
        frozen=round(frozen),
        rest=round(rest),
        encoder=sum(encoder.elements for encoder in encoders) * e,
        trained=trained * e,
        gradients=round(owned * e),
        optimizer=round(MASTER_AND_MOMENTS * owned),
        activations=round(activation_bytes(base, extension, encoders, work)),
        logits=round(logit_bytes(base, encoders, work)),
        buckets=round(buckets * e),
        step=round(largest * (4 + e)),
    )


def held_experts(num_experts: int, ep_size: int, placement: Placement, num_hot: int) -> list[int]:
    """Frozen experts of a layer that each rank of a group holds."""
    if placement is Placement.replicate or ep_size == 1:
        return [num_experts] * ep_size
    return [num_hot + len(ids) for ids in owners(num_experts - num_hot, ep_size, placement)]


def activation_bytes(
    base: BaseSizes, extension: ExtensionSizes, encoders: list[EncoderSizes], work: Work
) -> float:
    """What one micro-batch keeps for its backward pass, ranks equally loaded.

    A frozen linear layer keeps nothing. A token of a live layer keeps, in bytes:

        norms       4 a number of their input, which transformers takes in fp32
        attention   e * (query + key + value + output) + 4 a head
        dense MLP   e * 3 I (gate, its activation, up); a shared expert the same
        experts     K (2 I e + 4 + 24) + 8: `h`, the weight and the row order of every chosen expert
        router      12 an expert: probabilities and their calibration, in fp32
        new experts e * D: the layer's input; 12 each of the router, 8 a hidden unit of its calibration

    With activation checkpointing a layer keeps its input, e * D, and one layer at a time the above.
    Of the output layer: e * D for tokens that are targets, the gradient of their likelihood.
    """
    e, sparse = work.element_bytes, set(base.sparse_layers)
    slots = base.top_k * (2 * base.expert.intermediate_dim * e + 28) + 8
    by_layer = []
    for layer in range(base.num_layers - work.live_layers, base.num_layers):
        kept = 4 * base.saved_norms[layer] + e * base.saved_widths[layer]
        if layer in sparse:
            kept += slots + 12 * base.num_experts
        by_layer.append(kept)
    hidden_units = extension.calibration // (2 * (base.num_experts + extension.num_new))
    of_new = extension.num_layers * (
        e * base.hidden_dim + 12 * extension.num_new + 8 * hidden_units
    )
    kept = sum(by_layer) + of_new
    if work.recompute and by_layer:
        kept = len(by_layer) * e * base.hidden_dim + max(by_layer) + e * base.hidden_dim
    return kept * work.micro_tokens + e * base.hidden_dim * work.targets(encoders)


def logit_bytes(base: BaseSizes, encoders: list[EncoderSizes], work: Work) -> float:
    """One part of the logits, in fp32 and in the run's precision, and their probabilities."""
    numbers = min(base.vocabulary * work.targets(encoders), LOGIT_BYTES / 4)
    return numbers * (8 + 2 * work.element_bytes if work.element_bytes < 4 else 8)
