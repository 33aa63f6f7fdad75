"""Predicted seconds of a training step of one rank: products, exchange, reduction of gradients.

A model to compare placements with, not a promise: experts of a bank are taken to be equally loaded, and
the step lasts as long as the rank that holds most of them needs; nothing overlaps, an exchange costs
its bytes over the link's bandwidth and a fixed latency, a reduction its bytes alone. Left out are the
optimizer, the loader, and encoders whose features come from a cache.

Products, counted as two operations a multiply-add, of one token:

    dense weights        2 forward, 2 backward to the input (no weight gradient: they are frozen)
    chosen experts       the same, and 2 more for the weight gradient of a new one
    routers              the same; 2 more for new rows and calibrations
    attention            2 * heads * (query + value width) * positions / 2 forward, twice that backward
    output layer         2 + 2 an element of D x V, for tokens that are targets
    recomputation        all of the layers' forward once more with activation checkpointing

Where no connector trains, layers below the first extended one have no backward pass, and that one has
none beyond its experts.
"""

from dataclasses import dataclass

from moe_ext.config_cluster import ClusterConfig
from moe_ext.planning.sizes import BaseSizes, EncoderSizes, ExtensionSizes


@dataclass(frozen=True)
class Work:
    """What one rank computes in one step, and what the plan has to take for granted."""

    sequences: int
    """Of a micro-batch of one rank."""
    length: int
    """Tokens of a sequence, padding included."""
    items: int
    """Media items a sequence."""
    accumulation: int
    recompute: bool
    """Activation checkpointing."""
    new_share: float
    """Share of the slots, in extended layers, that choose new experts."""
    live_layers: int
    """Decoder layers with a backward pass: those above the lowest trained tensor."""
    element_bytes: int
    runs_encoders: bool = True
    live_input: bool = True
    """Whether the lowest of the live layers has a gradient to its input: something trains below it."""

    @property
    def micro_tokens(self) -> int:
        return self.sequences * self.length

    @property
    def tokens(self) -> int:
        """Of one rank in one step."""
        return self.micro_tokens * self.accumulation

    def targets(self, encoders: list[EncoderSizes]) -> int:
        """Target tokens of a micro-batch, at most: all but the media's own."""
        media = self.items * sum(encoder.tokens_per_item for encoder in encoders)
        return self.sequences * max(self.length - media, 1)


EVEN = (1.0, 1.0)


def step_flops(
    base: BaseSizes,
    extension: ExtensionSizes,
    encoders: list[EncoderSizes],
    work: Work,
    loads: dict[int, tuple[float, float]] | None = None,
) -> float:
    """Operations of one rank in one step.

    Args:
        loads: sparse layer -> work of the rank over the mean, of frozen and of new experts
            (`memory.loads_of`); None: even.
    """
    first = base.num_layers - work.live_layers
    new_of = {layer.layer: layer for layer in extension.layers}
    expert = 2 * base.expert_elements * base.top_k
    trained = sum(extension.trained_expert) / base.expert_elements
    dense = 2 * base.linear / base.num_layers
    attention = base.attention_width * work.length
    layers = 0.0
    for layer in range(base.num_layers):
        live = layer >= first
        forward = 2 if live and work.recompute else 1
        backward = int(live and (work.live_input or layer > first))
        layers += dense * (forward + backward) + attention * (forward + 2 * backward)
        if layer not in base.sparse_layers:
            continue
        of_frozen, of_new = (loads or {}).get(layer, EVEN)
        added = new_of.get(layer)
        share = work.new_share if added else 0.0
        # above nothing that trains, only the weights of the sum have a gradient: one product of three
        to_input = backward if backward or not live else 1 / 3
        passes = forward + to_input
        routed = (1 - share) * of_frozen * passes + share * of_new * (passes + trained)
        layers += expert * routed + 2 * base.router * (forward + backward)
        if added:
            layers += 2 * (sum(added.rows) + sum(added.calibration)) * (forward + 2)
    layers *= work.tokens
    head = 4 * base.vocabulary * base.hidden_dim * work.targets(encoders) * work.accumulation
    items = work.items * work.sequences * work.accumulation if work.runs_encoders else 0
    media = items * sum(encoder.flops_per_item for encoder in encoders)
    return layers + head + media


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    exchange_within: float
    """Tokens to ranks of the same node and back."""
    exchange_between: float
    reduction: float
    """Gradients summed, updated weights gathered."""

    @property
    def total(self) -> float:
        return self.compute + self.exchange_within + self.exchange_between + self.reduction


def step_time(
    flops: float,
    wire_bytes: float,
    num_exchanges: int,
    ep_size: int,
    reduced_bytes: tuple[float, float],
    zero_stage: int,
    work: Work,
    cluster: ClusterConfig,
) -> StepTime:
    """Seconds of one step.

    Args:
        wire_bytes: of a token's exchange in all layers, forward and backward.
        num_exchanges: collectives of a step for it, counts of rows included.
        reduced_bytes: gradients that the whole world, and that the replicas of sharded experts sum.

    A group of consecutive ranks fills nodes in order: of a rank's `ep_size - 1` peers so many are in
    its node as fit. A sum over dp ranks and a gathering of the result send (dp - 1) / dp of the bytes
    each; stage 2 sums every micro-batch, stage 1 once a step.
    """
    peers = max(ep_size - 1, 1)
    within = min(ep_size, cluster.ranks_per_node) - 1
    sent = wire_bytes * work.tokens
    crosses = ep_size > cluster.ranks_per_node
    latency = num_exchanges * (cluster.inter_latency_us if crosses else cluster.intra_latency_us)
    world = cluster.num_ranks
    times = work.accumulation if zero_stage == 2 else 1
    replicas = {world: reduced_bytes[0], world // ep_size: reduced_bytes[1]}
    if ep_size == 1:
        replicas = {world: sum(reduced_bytes)}
    reduced = sum(b * (times + 1) * (dp - 1) / dp for dp, b in replicas.items())
    slowest = cluster.intra_gb_per_s if cluster.nodes == 1 else cluster.inter_gb_per_s
    return StepTime(
        compute=flops / (cluster.peak_tflops * 1e12 * cluster.achieved_share),
        exchange_within=sent * within / peers / (cluster.intra_gb_per_s * 1e9)
        + (0.0 if crosses else latency * 1e-6),
        exchange_between=sent * (peers - within) / peers / (cluster.inter_gb_per_s * 1e9)
        + (latency * 1e-6 if crosses else 0.0),
        reduction=reduced / (slowest * 1e9),
    )
