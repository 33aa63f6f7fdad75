"""Every placement that a model and a cluster allow, what each costs, and which one is best."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moe_ext.config import (
    Features,
    Placement,
    Precision,
    RowInit,
    StageConfig,
    StageKind,
    Trainable,
    TrainConfig,
)
from moe_ext.config_cluster import ClusterConfig
from moe_ext.planning.memory import Placed, RankMemory, rank_memory
from moe_ext.planning.sizes import (
    BaseSizes,
    EncoderSizes,
    ExtensionSizes,
    base_sizes,
    encoder_sizes,
    extension_sizes,
    trained_elements,
)
from moe_ext.planning.step import StepTime, Work, step_flops, step_time
from moe_ext.planning.wire import remote_ranks, row_bytes

NEW_SHARE = 0.06
"""Share of the slots that choose new experts, where nobody says otherwise."""


@dataclass(frozen=True)
class Subject:
    """What is placed: a base, an extension and encoders, and the stage that needs most."""

    base: BaseSizes
    extension: ExtensionSizes
    encoders: list[EncoderSizes]
    train: list[Trainable]
    work: Work
    slots: int
    """Slots a token in the exchange: top_k, and one more for every clone that shares a slot."""

    @property
    def trains(self) -> tuple[int, int]:
        return trained_elements(self.train, self.base, self.extension, self.encoders)

    @property
    def live_input(self) -> bool:
        """Whether something below the sparse layers trains."""
        return Trainable.connector in self.train


@dataclass(frozen=True)
class Candidate:
    """One placement and its figures, of the rank that holds most."""

    placed: Placed
    memory: RankMemory
    fits: bool
    visits: float
    """Other ranks that a token's row goes to, expected, a sparse layer."""
    wire_bytes: float
    """Of a token in all layers, forward and backward, expected."""
    time: StepTime

    def to_json(self) -> dict[str, Any]:
        placed, memory, time = self.placed, self.memory, self.time
        return {
            "ep_size": placed.ep_size,
            "frozen_placement": placed.frozen.value,
            "new_placement": placed.new.value,
            "zero_stage": placed.zero_stage,
            "frozen_bits": placed.frozen_bits,
            "hot_experts": placed.num_hot,
            "memory_bytes": {**vars(memory), "state": memory.state, "total": memory.total},
            "fits": self.fits,
            "visited_ranks_a_token_and_layer": self.visits,
            "wire_bytes_a_token": self.wire_bytes,
            "step_s": {**vars(time), "total": time.total},
        }


@dataclass(frozen=True)
class Plan:
    """All candidates, the best first, and what they were computed from."""

    subject: Subject
    cluster: ClusterConfig
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate | None:
        """The first that fits; those that keep the base exactly come before the others."""
        return next((c for c in self.candidates if c.fits), None)

    def to_json(self) -> dict[str, Any]:
        base, work = self.subject.base, self.subject.work
        best = self.best
        return {
            "base": {
                "model_type": base.model_type,
                "parameters": base.total,
                "active_parameters": base.active,
                "sparse_layers": len(base.sparse_layers),
                "num_experts": base.num_experts,
                "top_k": base.top_k,
            },
            "trains": dict(zip(("replicated", "experts"), self.subject.trains, strict=True)),
            "cluster": vars(self.cluster),
            "work": vars(work),
            "best": None if best is None else self.candidates.index(best),
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }


def largest_stage(config: TrainConfig) -> StageConfig:
    """The stage of the chain that trains most; the extension is there in it if any stage adds it."""
    stages = [config.stages[name] for name in config.chain]
    training = [stage for stage in stages if stage.kind is StageKind.train]
    with_experts = [stage for stage in training if Trainable.new_experts in stage.train]
    return (with_experts or training or stages)[-1]


def subject_of(config: TrainConfig, base_config: Any, new_share: float = NEW_SHARE) -> Subject:
    """What a configuration places, given the configuration of its base."""
    base = base_sizes(base_config)
    extension = extension_sizes(base, config.extension)
    encoders = [
        encoder_sizes(encoder, config.connector.hidden_dim, base.hidden_dim)
        for encoder in config.encoder.values()
    ]
    stage, data = largest_stage(config), config.data
    shared = config.extension.row_init is RowInit.clone_shared
    live = base.num_layers
    if Trainable.connector not in stage.train and Trainable.router_delta not in stage.train:
        layers = config.extension.named_layers or base.sparse_layers[-extension.num_layers :]
        live = base.num_layers - min(layers)
    work = Work(
        sequences=stage.sequences_per_rank,
        length=data.sequence_length if data.pack else data.max_length,
        items=1,
        accumulation=stage.accumulation,
        recompute=config.parallel.activation_checkpointing,
        new_share=new_share,
        live_layers=live,
        element_bytes=4 if config.parallel.precision is Precision.fp32 else 2,
        runs_encoders=data.features is Features.live,
    )
    slots = base.top_k + (extension.num_new if shared else 0)
    return Subject(base, extension, encoders, stage.train, work, slots)


def wire_of(subject: Subject, placed: Placed) -> tuple[float, float]:
    """(other ranks a token visits in a layer without new experts, bytes a token in all layers)."""
    if not placed.exchanges:
        return 0.0, 0.0
    base, extension, work = subject.base, subject.extension, subject.work
    visited = partial(
        remote_ranks,
        base.num_experts,
        base.top_k,
        placed.ep_size,
        num_hot=placed.num_hot,
        frozen_placement=placed.frozen,
        groups=base.num_groups,
        kept=base.groups_kept,
    )
    plain = visited()
    extended = visited(
        num_new=extension.num_new, new_placement=placed.new, new_share=work.new_share
    )
    live_from = base.num_layers - work.live_layers
    rows = 0
    for layer in base.sparse_layers:
        below = subject.live_input or layer > live_from
        rows += row_bytes(
            base.hidden_dim, work.element_bytes, subject.slots, below, layer >= live_from
        )
        if work.recompute:  # the forward exchange happens again
            rows += row_bytes(base.hidden_dim, work.element_bytes, subject.slots, False, False)
    share = extension.num_layers / len(base.sparse_layers)
    return plain, rows * ((1 - share) * plain + share * extended)


def exchanges_of(subject: Subject) -> int:
    """Collectives of a step for tokens that travel: counts, tokens and results forward, the gradients
    of both backward, and the first three again with activation checkpointing."""
    base, work = subject.base, subject.work
    first = base.num_layers - work.live_layers
    live = sum(layer >= first for layer in base.sparse_layers)
    forward = 3 * len(base.sparse_layers) * (2 if work.recompute else 1)
    return (forward + 2 * live) * work.accumulation


def evaluate(subject: Subject, placed: Placed, cluster: ClusterConfig) -> Candidate:
    """The figures of one placement."""
    world, work = cluster.num_ranks, subject.work
    memory = rank_memory(
        subject.base, subject.extension, subject.encoders, subject.trains, placed, work, world
    )
    visits, wire_bytes = wire_of(subject, placed)
    sharded = placed.new is Placement.shard and placed.ep_size > 1
    replicated, experts = subject.trains
    reduced = (float(replicated * work.element_bytes), float(experts * work.element_bytes))
    reduced = (reduced[0], reduced[1] / placed.ep_size) if sharded else (sum(reduced), 0.0)
    time = step_time(
        step_flops(subject.base, subject.extension, subject.encoders, work),
        wire_bytes,
        exchanges_of(subject) if placed.exchanges else 0,
        placed.ep_size if placed.exchanges else 1,
        reduced,
        placed.zero_stage,
        work,
        cluster,
    )
    return Candidate(placed, memory, memory.total <= cluster.memory_bytes, visits, wire_bytes, time)


def placements(
    subject: Subject, world: int, bits: tuple[int, ...], num_hot: int = 0
) -> list[Placed]:
    """Every combination that the run accepts, the plainest first."""
    num_experts, num_new = subject.base.num_experts, subject.extension.num_new
    sizes = [n for n in range(1, world + 1) if world % n == 0 and n <= max(num_experts, num_new)]
    shard, replicate = Placement.shard, Placement.replicate
    found = []
    for frozen_bits in bits:
        for zero_stage in (1, 2):
            found.append(Placed(1, shard, replicate, zero_stage, frozen_bits))
            for ep_size in sizes[1:]:
                hot = min(num_hot, num_experts - 1)
                found += [
                    Placed(ep_size, shard, replicate, zero_stage, frozen_bits, hot),
                    Placed(ep_size, shard, shard, zero_stage, frozen_bits, hot),
                    Placed(ep_size, replicate, shard, zero_stage, frozen_bits),
                ]
    return found


def make_plan(
    subject: Subject,
    cluster: ClusterConfig,
    bits: tuple[int, ...] = (0, 8, 4),
    num_hot: int = 0,
) -> Plan:
    """Candidates in order: fitting before not, exact base before packed, then time, then memory.

    Deterministic: times are compared to four digits, and equal ones by memory and plainness.
    """
    found = [
        evaluate(subject, placed, cluster)
        for placed in placements(subject, cluster.num_ranks, bits, num_hot)
    ]

    def rank(item: tuple[int, Candidate]) -> tuple[Any, ...]:
        index, c = item
        packed = 0 if c.placed.frozen_bits == bits[0] else 16 - c.placed.frozen_bits
        if not c.fits:
            return (1, 0, 0.0, c.memory.total, index)
        return (0, packed, float(f"{c.time.total:.4g}"), c.memory.total, index)

    ordered = [c for _, c in sorted(enumerate(found), key=rank)]
    return Plan(subject, replace(cluster), ordered)
