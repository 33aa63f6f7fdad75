"""Bytes of tensors that a rank holds, by kind, for one placement.

With e bytes an element (2 in bf16, 4 in fp32) and n elements that this rank trains, each held alike
by dp ranks (the world for what is on every rank, world / ep_size for sharded new experts):

    frozen experts  e * held; in 8 and 4 bits see `model/packed.py`
    rest            e * (the base apart from its experts, what the extension keeps frozen)
    trained         e * n
    gradients       e * n / dp: of this rank's partition, from the end of backward to the step; a tensor
                    that reaches into it is kept whole (`kept_gradient`)
    optimizer       12 * n / dp: fp32 master weights and two moments

Layers differ in their number of new experts and of hot ones: every sum is over layers. Router rows of
a family that keeps its own in fp32 (Ernie) are 4 bytes an element, a low-rank expert's source is part
of the rest.

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

from moe_ext.config import Placement, Trainable
from moe_ext.model.head import LOGIT_BYTES
from moe_ext.model.packed import packed_shapes
from moe_ext.model.placement import owners
from moe_ext.planning.sizes import BaseSizes, EncoderSizes, ExtensionSizes, trainable_tensors
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
    hot: tuple[int, ...] = ()
    """Sparse layer by sparse layer: frozen experts that every rank holds though the bank is sharded;
    empty: none."""
    nf4: bool = False
    """The 4 bits are bitsandbytes' (`base.frozen_format`)."""

    @property
    def exchanges(self) -> bool:
        """Whether tokens travel at all."""
        return self.ep_size > 1 and Placement.shard in (self.frozen, self.new)

    @property
    def shards_new(self) -> bool:
        return self.ep_size > 1 and self.new is Placement.shard

    def hot_in(self, sparse_index: int) -> int:
        """Hot experts of one sparse layer, counted from 0."""
        return self.hot[sparse_index] if self.hot else 0


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


def expert_bytes(base: BaseSizes, element_bytes: int, bits: int, nf4: bool = False) -> int:
    """Of one frozen expert: plain, or packed with its scales; biases stay plain."""
    if bits == 0:
        return base.expert_elements * element_bytes
    dim, wide = base.expert.hidden_dim, base.expert.intermediate_dim
    packed = sum(
        prod(size) * dtype.itemsize
        for matrix in ((1, 2 * wide, dim), (1, dim, wide))
        for size, dtype in packed_shapes(matrix, bits, nf4).values()
    )
    return packed + (base.expert_elements - 3 * dim * wide) * element_bytes


def rank_memory(
    base: BaseSizes,
    extension: ExtensionSizes,
    encoders: list[EncoderSizes],
    train: list[Trainable],
    placed: Placed,
    work: Work,
    world: int,
    rank: int | None = None,
) -> RankMemory:
    """Bytes of one rank; None: of the first of a group, which holds most, and of the largest gradient.

    Args:
        train: the parts that the stage trains.
    """
    e, ep_rank = work.element_bytes, (rank or 0) % placed.ep_size
    frozen = expert_bytes(base, e, placed.frozen_bits, placed.nf4) * sum(
        held_experts(base.num_experts, placed.ep_size, placed.frozen, placed.hot_in(i))[ep_rank]
        for i in range(len(base.sparse_layers))
    )
    held = held_new(extension, placed, ep_rank)
    tensors = trainable_tensors(base, extension, encoders, held)
    sizes = {part: sum(each) for part, each in tensors.items()}
    width_of = dict.fromkeys(sizes, e)
    if base.router_fp32:
        width_of |= {Trainable.new_rows: 4, Trainable.router_delta: 4}
    dp_of = dict.fromkeys(sizes, world)
    index_of: dict[Trainable, int | None] = dict.fromkeys(sizes, rank)
    if placed.shards_new:
        dp_of[Trainable.new_experts] = world // placed.ep_size
        index_of[Trainable.new_experts] = None if rank is None else rank // placed.ep_size
    # the probe's difference is there only where it trains
    stay = sizes.keys() - set(train) - {Trainable.router_delta}
    own = base.dense + len(base.sparse_layers) * base.router
    rest = (own - base.always_fp32) * e + base.always_fp32 * 4 + base.buffer_bytes
    rest += sum(width_of[part] * sizes[part] for part in stay)
    rest += sum(held) * extension.fixed_expert * e
    rest += 4 * extension.num_new if extension.corrected else 0
    rest += sum(encoder.connector_buffer_bytes for encoder in encoders)
    owned = {part: sizes[part] / dp_of[part] for part in train}
    trained = sum(width_of[part] * sizes[part] for part in train)
    gradients = sum(
        width_of[part] * kept_gradient(tensors[part], dp_of[part], index_of[part]) for part in train
    )
    buckets = e * min(sum(sizes[part] for part in train), BUCKET_ELEMENTS)
    if work.accumulation > 1:
        buckets += max(trained - gradients, 0) if placed.zero_stage == 1 else gradients
    return RankMemory(
        frozen=round(frozen),
        rest=round(rest),
        encoder=sum(encoder.elements for encoder in encoders) * e,
        trained=trained,
        gradients=gradients,
        optimizer=round(MASTER_AND_MOMENTS * sum(owned.values())),
        activations=round(activation_bytes(base, extension, encoders, work)),
        logits=round(logit_bytes(base, encoders, work)),
        buckets=buckets,
        step=round(max(owned.values(), default=0.0) * (4 + e)),  # an optimizer group is a part
    )


def kept_gradient(tensors: list[int], among: int, index: int | None) -> int:
    """Elements of an optimizer group's gradient that a rank keeps from the end of backward to the step.

    DeepSpeed lays a group's tensors end to end, divides that among the ranks, and keeps of every rank's
    part *views* of gradients: a tensor that lies in the parts of two ranks is kept whole by both.

    Args:
        index: the rank's place among those; None: the place that keeps most.
    """
    share = max(-(-sum(tensors) // among), 1)
    kept, end = [0] * among, 0
    for size in tensors:
        first, end = end, end + size
        for place in range(first // share, (end - 1) // share + 1) if size else ():
            kept[place] += size
    return max(kept) if index is None else kept[index]


def held_new(extension: ExtensionSizes, placed: Placed, ep_rank: int = 0) -> list[int]:
    """New experts of every extended layer that the rank at `ep_rank` of its group holds."""
    return [
        len(owners(layer.num_new, placed.ep_size, placed.new)[ep_rank])
        for layer in extension.layers
    ]


def held_experts(num_experts: int, ep_size: int, placement: Placement, num_hot: int) -> list[int]:
    """Frozen experts of a layer that each rank of a group holds."""
    if placement is Placement.replicate or ep_size == 1:
        return [num_experts] * ep_size
    return [num_hot + len(ids) for ids in owners(num_experts - num_hot, ep_size, placement)]


def loads_of(
    base: BaseSizes, extension: ExtensionSizes, placed: Placed
) -> dict[int, tuple[float, float]]:
    """Sparse layer -> work of a group's first rank over the mean, of frozen and of new experts, where all
    experts of a bank are chosen equally often. One new expert on two ranks: its holder has twice the mean."""
    ep, new_of, found = placed.ep_size, extension.new_of, {}
    for index, layer in enumerate(base.sparse_layers):
        frozen = new = 1.0
        if ep > 1 and placed.frozen is Placement.shard:
            hot = placed.hot_in(index)
            held = held_experts(base.num_experts, ep, placed.frozen, hot)[0]
            frozen = (hot + ep * (held - hot)) / base.num_experts
        if placed.shards_new and layer in new_of:
            new = ep * len(owners(new_of[layer], ep, placed.new)[0]) / new_of[layer]
        found[layer] = (frozen, new)
    return found


def activation_bytes(
    base: BaseSizes, extension: ExtensionSizes, encoders: list[EncoderSizes], work: Work
) -> float:
    """What one micro-batch keeps for its backward pass, ranks equally loaded.

    A frozen linear layer keeps nothing. A token of a live layer keeps, in bytes:

        norms       4 a number of their input, which transformers takes in fp32
        attention   e * (query + key + value + output) + 4 a head; where no fused kernel does it
                    (GPT-OSS: `eager`), e * heads * positions of weights, too
        dense MLP   e * 3 I (gate, its activation, up); a shared expert the same
        experts     K (2 I e + 4 + 24) + 8: `h`, the weight and the row order of every chosen expert
        router      12 an expert: probabilities and their calibration, in fp32
        new experts e * D: the layer's input, and 4 D where the router takes it in fp32; 12 each of the
                    router, 8 a hidden unit of its calibration
        low-rank    e (2 D + 4 I + 3 r) + 28 a slot: plain autograd keeps every step of such an expert

    With activation checkpointing a layer keeps its input, e * D, and one layer at a time the above.
    Of the output layer: e * D for tokens that are targets, the gradient of their likelihood.
    """
    e, sparse = work.element_bytes, set(base.sparse_layers)
    slot = 2 * base.expert.intermediate_dim * e + 28
    by_layer: dict[int, float] = {}
    for layer in range(base.num_layers - work.live_layers, base.num_layers):
        kept = 0.0
        if work.live_input or by_layer:
            kept = 4 * base.saved_norms[layer] + e * base.saved_widths[layer]
            kept += e * base.saved_weights * work.length
        if layer in sparse:
            kept += base.top_k * slot + 8 + 12 * base.num_experts
        by_layer[layer] = kept
    copy = 4 * base.hidden_dim if base.router_product_fp32 and e < 4 else 0
    for added in extension.layers:
        low = _low_rank_bytes(base, extension, e) - slot if extension.lora_rank else 0
        by_layer[added.layer] = by_layer.get(added.layer, 0) + (
            e * base.hidden_dim + copy + 12 * added.num_new + 8 * added.calibration_units
            + work.new_share * base.top_k * low
        )  # fmt: skip
    kept = sum(by_layer.values())
    if work.recompute and by_layer:
        kept = (len(by_layer) + 1) * e * base.hidden_dim + max(by_layer.values())
    return kept * work.micro_tokens + e * base.hidden_dim * work.targets(encoders)


def _low_rank_bytes(base: BaseSizes, extension: ExtensionSizes, e: int) -> int:
    """Of one slot that goes to a low-rank expert: its input and output; `h`, the two factors of its
    activation and their product; what is between the two factors of three differences."""
    dim, wide = base.expert.hidden_dim, base.expert.intermediate_dim
    return e * (2 * dim + 4 * wide + 3 * extension.lora_rank) + 28


def logit_bytes(base: BaseSizes, encoders: list[EncoderSizes], work: Work) -> float:
    """One part of the logits, in fp32 and in the run's precision, and their probabilities."""
    numbers = min(base.vocabulary * work.targets(encoders), LOGIT_BYTES / 4)
    return numbers * (8 + 2 * work.element_bytes if work.element_bytes < 4 else 8)
