"""Every placement that a model and a cluster allow, what each costs, and which one is best."""

from dataclasses import dataclass, replace
from typing import Any

from moe_ext.config import (
    Features,
    Placement,
    Precision,
    StageConfig,
    StageKind,
    Trainable,
    TrainConfig,
)
from moe_ext.config_cluster import ClusterConfig
from moe_ext.model.dispatch import Liveness
from moe_ext.planning.memory import Placed, RankMemory, held_new, loads_of, rank_memory
from moe_ext.planning.sizes import (
    BaseSizes,
    EncoderSizes,
    ExtensionSizes,
    base_sizes,
    encoder_sizes,
    extension_sizes,
    trainable_tensors,
)
from moe_ext.planning.step import StepTime, Work, step_flops, step_time
from moe_ext.planning.wire import Traffic, layer_traffic, remote_ranks

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

    @property
    def trains(self) -> tuple[int, int]:
        """Elements that the stage trains: equal on every rank, and of all new experts."""
        held = [layer.num_new for layer in self.extension.layers]
        tensors = trainable_tensors(self.base, self.extension, self.encoders, held)
        trained = {part: sum(sizes) for part, sizes in tensors.items() if part in self.train}
        experts = trained.pop(Trainable.new_experts, 0)
        return sum(trained.values()), experts


@dataclass(frozen=True)
class Candidate:
    """One placement and its figures, of the rank that holds most."""

    placed: Placed
    memory: RankMemory
    fits: bool
    traffic: list[Traffic]
    """Of the layers whose tokens travel, in one micro-batch."""
    time: StepTime

    @property
    def visits(self) -> float:
        """Other ranks that a token's row goes to, expected, mean over these layers."""
        return sum(layer.visits for layer in self.traffic) / max(len(self.traffic), 1)

    @property
    def wire_bytes(self) -> float:
        """Of a live token in all layers, forward and backward, expected."""
        return sum(layer.bytes_a_token for layer in self.traffic)

    def to_json(self) -> dict[str, Any]:
        placed, memory, time = self.placed, self.memory, self.time
        return {
            "ep_size": placed.ep_size,
            "frozen_placement": placed.frozen.value,
            "new_placement": placed.new.value,
            "zero_stage": placed.zero_stage,
            "frozen_bits": placed.frozen_bits,
            "frozen_format": "nf4" if placed.nf4 else "plain",
            "hot_experts": list(placed.hot),
            "memory_bytes": {**vars(memory), "state": memory.state, "total": memory.total},
            "fits": self.fits,
            "visited_ranks_a_token_and_layer": self.visits,
            "wire_bytes_a_token": self.wire_bytes,
            "wire_bytes_a_micro_batch": sum(layer.counts for layer in self.traffic),
            "collectives_a_micro_batch": sum(layer.collectives for layer in self.traffic),
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
    live = base.num_layers
    if Trainable.connector not in stage.train and Trainable.router_delta not in stage.train:
        live -= extension.layers[0].layer
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
        live_input=Trainable.connector in stage.train,
    )
    return Subject(base, extension, encoders, stage.train, work)


def liveness_of(subject: Subject, placed: Placed) -> dict[int, Liveness]:
    """Sparse layer -> what a gradient flows to in it, from what trains: as
    `MultimodalMoE.set_liveness` tells the layers."""
    train, new_of, found = set(subject.train), subject.extension.new_of, {}
    below = Trainable.connector in train
    for layer in subject.base.sparse_layers:
        own = train if layer in new_of else train & {Trainable.router_delta}
        router = bool(own & {Trainable.new_rows, Trainable.calibration, Trainable.router_delta})
        experts = Trainable.new_experts in own
        weight = below or router
        travels = experts and placed.shards_new
        found[layer] = Liveness(input=below, weight=weight, output=weight or travels)
        below |= router or experts
    return found


def traffic_of(subject: Subject, placed: Placed) -> list[Traffic]:
    """Every sparse layer's exchange in one micro-batch; none where no token travels.

    A layer without experts that travel (frozen ones on every rank, no new ones) exchanges nothing.
    """
    base, extension, work = subject.base, subject.extension, subject.work
    new_of, liveness, found = extension.new_of, liveness_of(subject, placed), []
    for index, layer in enumerate(base.sparse_layers):
        num_new = new_of.get(layer, 0)
        frozen_travel = placed.frozen is Placement.shard
        if not placed.exchanges or not (frozen_travel or (num_new and placed.shards_new)):
            continue
        visits = remote_ranks(
            base.num_experts,
            base.top_k,
            placed.ep_size,
            num_hot=placed.hot_in(index),
            num_new=num_new,
            new_placement=placed.new,
            new_share=work.new_share,
            frozen_placement=placed.frozen,
            groups=base.num_groups,
            kept=base.groups_kept,
        )
        live = layer >= base.num_layers - work.live_layers
        found.append(
            layer_traffic(
                layer,
                base.hidden_dim,
                work.element_bytes,
                base.top_k + (num_new if extension.shares_slots else 0),
                placed.ep_size,
                visits,
                liveness[layer],
                again=work.recompute and live,
            )
        )
    return found


def evaluate(subject: Subject, placed: Placed, cluster: ClusterConfig) -> Candidate:
    """The figures of one placement."""
    base, extension, encoders, work = (
        subject.base, subject.extension, subject.encoders, subject.work
    )  # fmt: skip
    world = cluster.num_ranks
    memory = rank_memory(base, extension, encoders, subject.train, placed, work, world)
    traffic = traffic_of(subject, placed)
    replicated, experts = subject.trains
    reduced = (float(replicated * work.element_bytes), float(experts * work.element_bytes))
    if placed.shards_new:
        held = sum(held_new(extension, placed)) / extension.num_new
        reduced = (reduced[0], reduced[1] * held)
    else:
        reduced = (sum(reduced), 0.0)
    time = step_time(
        step_flops(base, extension, encoders, work, loads_of(base, extension, placed)),
        sum(layer.bytes_a_token for layer in traffic),
        sum(layer.collectives for layer in traffic) * work.accumulation,
        placed.ep_size if traffic else 1,
        reduced,
        placed.zero_stage,
        work,
        cluster,
    )
    fits = memory.total <= cluster.memory_bytes
    return Candidate(placed, memory, fits, traffic, time)


def placements(
    subject: Subject, world: int, bits: tuple[int, ...], hot: tuple[int, ...] = ()
) -> list[Placed]:
    """Every combination that the run accepts, the plainest first."""
    num_experts, num_new = subject.base.num_experts, subject.extension.most_new
    hot = tuple(min(count, num_experts - 1) for count in hot)
    sizes = [n for n in range(1, world + 1) if world % n == 0 and n <= max(num_experts, num_new)]
    shard, replicate = Placement.shard, Placement.replicate
    found = []
    for frozen_bits in bits:
        for zero_stage in (1, 2):
            found.append(Placed(1, shard, replicate, zero_stage, frozen_bits))
            for ep_size in sizes[1:]:
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
    hot: tuple[int, ...] = (),
    nf4: bool = False,
) -> Plan:
    """Candidates in order: fitting before not, exact base before packed, then time, then memory.

    `hot` counts the hot experts of every sparse layer (`Placed.hot`).
    Deterministic: times are compared to four digits, and equal ones by memory and plainness.
    """
    found = [
        evaluate(subject, replace(placed, nf4=nf4 and placed.frozen_bits == 4), cluster)
        for placed in placements(subject, cluster.num_ranks, bits, hot)
    ]

    def rank(item: tuple[int, Candidate]) -> tuple[Any, ...]:
        index, c = item
        packed = 0 if c.placed.frozen_bits == bits[0] else 16 - c.placed.frozen_bits
        if not c.fits:
            return (1, 0, 0.0, c.memory.total, index)
        return (0, packed, float(f"{c.time.total:.4g}"), c.memory.total, index)

    ordered = [c for _, c in sorted(enumerate(found), key=rank)]
    return Plan(subject, replace(cluster), ordered)
