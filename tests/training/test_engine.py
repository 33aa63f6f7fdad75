"""The engine against one process and plain torch: gradient norm, steps, tags, what is refused.

The stand-in model is a frozen linear, replicated trainable weights, and experts sharded over the
ranks whose tokens travel by an all-to-all, uneven (rank 0 holds one or no expert).
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.topology import Ranks, ranks_from_environment, start
from tests.ranks import run_ranks

DIM, EXPERTS, STEPS = 40, 3, 3
SETTINGS = EngineSettings(
    zero_stage=1, clip_norm=0.05, accumulation=2, sequences_per_rank=4, bf16=False
)


def _start():
    topology = start(ranks_from_environment(), 2, timeout_s=60.0)
    total = torch.tensor([1.0])
    dist.all_reduce(total, group=topology.ep_group)
    return total.item()


def test_no_op_is_built_and_a_lock_of_a_killed_build_hangs_nobody(tmp_path, monkeypatch):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert run_ranks(_start, 2, timeout_s=60) == [2.0, 2.0]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [lock]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sent, received, anchor):
        ctx.splits = (sent, received)
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, grad):
        sent, received = ctx.splits
        out = grad.new_empty(sum(sent), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), sent, received)
        return out, None, None, None


def _tensors():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(DIM, DIM, generator=g),  # frozen
        torch.randn(DIM, DIM, generator=g),  # connector
        torch.randn(EXPERTS, DIM, DIM, generator=g),
    )


def _batch(rank, index):
    g = torch.Generator().manual_seed(100 * index + rank)
    return torch.randn(4 + rank, DIM, generator=g), torch.randint(EXPERTS, (4 + rank,), generator=g)


def _loss(y):
    return y.square().sum() / 50 + y.sum() / 7


class Reference:
    """All experts on one rank."""

    def __init__(self):
        self.frozen, connector, experts = _tensors()
        self.connector, self.experts = nn.Parameter(connector), nn.Parameter(experts)

    def loss(self, x, choice):
        h = (x @ self.frozen) @ self.connector
        return _loss(torch.einsum("td,tde->te", h, self.experts[choice]))


class Sharded:
    """Experts by rank: `owned[rank]` are the ids that a rank holds."""

    def __init__(self, owned):
        self.owned = owned
        self.frozen, connector, experts = _tensors()
        self.connector = nn.Parameter(connector)
        self.experts = nn.Parameter(experts[owned[dist.get_rank()]].clone())

    def loss(self, x, choice):
        h = (x @ self.frozen) @ self.connector
        owner = torch.tensor(
            [r for e in range(EXPERTS) for r, ids in enumerate(self.owned) if e in ids]
        )
        order = torch.argsort(owner[choice], stable=True)
        sent = torch.bincount(owner[choice], minlength=len(self.owned))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        sent, received = sent.tolist(), received.tolist()
        anchor = torch.zeros(1, requires_grad=True)
        h = _AllToAll.apply(h[order], sent, received, anchor)
        ids = torch.empty(sum(received), dtype=torch.int64)
        dist.all_to_all_single(ids, choice[order], received, sent)
        mine = self.owned[dist.get_rank()]
        if mine:
            local = torch.tensor([mine.index(i) for i in ids.tolist()], dtype=torch.int64)
            y = torch.einsum("td,tde->te", h, self.experts[local])
        else:
            y = h
        return _loss(_AllToAll.apply(y, received, sent, anchor))


def _reference_run(settings, world_size):
    model = Reference()
    parameters = [model.connector, model.experts]
    adam = torch.optim.AdamW(
        parameters, lr=0.01, betas=(settings.beta1, settings.beta2), weight_decay=0.0
    )
    norms = []
    for step in range(STEPS):
        adam.zero_grad()
        for micro in range(settings.accumulation):
            for rank in range(world_size):
                model.loss(*_batch(rank, step * settings.accumulation + micro)).backward()
        limit = settings.clip_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit).item())
        adam.step()
    return norms, model.connector.detach(), model.experts.detach()


def _engine_run(topology, settings, owned):
    model = Sharded(owned) if owned else Reference()
    engine = Engine(
        lambda x, choice: model.loss(x, choice),
        [
            TrainableParameter("connector.weight", model.connector, "connector"),
            TrainableParameter("experts", model.experts, "new_experts", sharded=bool(owned)),
        ],
        settings,
        topology,
    )
    moments = sum(state["exp_avg"].numel() for state in engine.adam.state.values())
    norms, parts = [], []
    for step in range(STEPS):
        for micro in range(settings.accumulation):
            engine.backward(engine(*_batch(topology.rank, step * settings.accumulation + micro)))
        squares = engine.part_squares()
        dist.all_reduce(squares)
        parts.append(dict(zip(engine.parts, squares.sqrt().tolist(), strict=True)))
        taken, norm = engine.step(0.01)
        assert taken
        norms.append(norm)
    pieces = {
        name: (f.start, f.weight.numel(), f.step.item()) for name, f in engine.fragments().items()
    }
    if owned:
        with pytest.raises(AttributeError):  # a stray save must not lose experts silently
            engine.deepspeed.save_checkpoint("/nowhere")
    trainable, engine.trainable = engine.trainable, engine.trainable[:1]
    with pytest.raises(RuntimeError, match="something frozen is in them"):
        engine._check_state()  # the second half of the parameters counts as frozen now
    engine.trainable = trainable
    pieces["moments"] = moments
    engine.destroy()
    return norms, parts, model.connector.detach().float(), model.experts.detach().float(), pieces


def _nan_is_skipped(topology, settings):
    model = Reference()
    engine = Engine(
        lambda x, choice: model.loss(x, choice),
        [TrainableParameter("connector.weight", model.connector, "connector")],
        settings,
        topology,
    )
    before = model.connector.detach().clone()
    x, choice = _batch(topology.rank, 0)
    bad = x * float("nan") if topology.rank == 0 else x  # one rank only
    for _ in range(settings.accumulation):
        engine.backward(engine(bad, choice))
    taken, _ = engine.step(0.01)
    assert not taken and torch.equal(before, model.connector)
    for _ in range(settings.accumulation):
        engine.backward(engine(x, choice))
    taken, _ = engine.step(0.01)
    assert taken and not torch.equal(before, model.connector)
    engine.destroy()


def _weights_after(topology, settings, owned, dropped):
    """Weights, moments and norms after steps on batches 0, 2 and 3, with 1 dropped in between or left out."""
    model = Sharded(owned) if owned else Reference()
    trainable = [
        TrainableParameter("connector.weight", model.connector, "connector"),
        TrainableParameter("experts", model.experts, "new_experts", sharded=bool(owned)),
    ]
    engine = Engine(lambda x, choice: model.loss(x, choice), trainable, settings, topology)
    norms = []
    for number in (0, 1, 2, 3) if dropped else (0, 2, 3):
        for micro in range(settings.accumulation):
            x, choice = _batch(topology.rank, number * settings.accumulation + micro)
            # as big as a spike is, and not finite without ZeRO: Adam alone would not notice
            scale = 1.0 if number != 1 else 1e3 if settings.zero_stage else float("nan")
            engine.backward(scale * engine(x.to(model.connector.dtype), choice))
        squares = engine.part_squares()
        dist.all_reduce(squares)
        taken, _ = engine.step(0.01, drop=number == 1)
        assert taken == (number != 1)
        if taken:
            norms.append(squares.sum().sqrt().item())
    pieces = engine.fragments().values()
    state = [t.clone() for f in pieces for t in (f.weight, f.exp_avg, f.exp_avg_sq, f.step)]
    state += [p.detach().clone() for p in (model.connector, model.experts)]
    engine.destroy()
    return norms, state


def canary(topology):
    """The private surface of the pinned DeepSpeed that the engine stands on."""
    import deepspeed
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups

    assert deepspeed.__version__.startswith("0.19.8"), "look at engine.py's assumptions again"
    assert issubclass(AutoEPMoELayer, nn.Module)
    for name in ("update_lp_params", "_link_all_hp_params", "get_grad_norm_direct"):
        assert hasattr(DeepSpeedZeroOptimizer, name), name
    for name in ("_create_expert_and_data_parallel", "_get_expert_parallel_group_dict"):
        assert hasattr(groups, name), name
    assert "ep_size_2" in groups._get_expert_parallel_group_dict()


def _all_cases(ep_size):
    rank, world = dist.get_rank(), dist.get_world_size()
    topology = start(Ranks(rank, world, rank, world), ep_size=ep_size, timeout_s=60)
    flat = dataclasses.replace(topology, ep_size=1, ep_rank=0, ep_group=None)
    results = {}
    for stage in (1, 2):
        settings = dataclasses.replace(SETTINGS, zero_stage=stage)
        results[stage, "replicated"] = _engine_run(flat, settings, None)
        results[stage, "uneven"] = _engine_run(topology, settings, [[0], [1, 2]])
        results[stage, "skewed"] = _engine_run(topology, settings, [[], [0, 1, 2]])
        _nan_is_skipped(flat, settings)

    canary(topology)
    no_clip = dataclasses.replace(SETTINGS, zero_stage=0, clip_norm=0.0)
    results[0, "replicated"] = _engine_run(flat, no_clip, None)
    for stage in (0, 1, 2):
        settings = dataclasses.replace(SETTINGS if stage else no_clip, zero_stage=stage)
        for topology_, owned in ((flat, None), (topology, [[], [0, 1, 2]])):
            results["dropped", stage, bool(owned)] = [
                _weights_after(topology_, settings, owned, dropped) for dropped in (True, False)
            ]
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(_all_cases, 2, 2)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("experts", ["replicated", "uneven", "skewed"])
def test_steps_and_norms_equal_one_process(two_ranks, stage, experts):
    norms, connector, all_experts = _reference_run(SETTINGS, 2)
    assert min(norms) > SETTINGS.clip_norm  # or nothing would be clipped
    owned = {"replicated": [[0, 1, 2]] * 2, "uneven": [[0], [1, 2]], "skewed": [[], [0, 1, 2]]}
    for rank in range(2):
        got_norms, parts, got_connector, got_experts, _ = two_ranks[rank][stage, experts]
        torch.testing.assert_close(got_norms, norms, rtol=1e-5, atol=0)
        total = [sum(v * v for v in part.values()) ** 0.5 for part in parts]
        torch.testing.assert_close(total, norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(got_connector, connector, rtol=1e-5, atol=1e-6)
        wanted = all_experts[owned[experts][rank]]
        torch.testing.assert_close(got_experts, wanted, rtol=1e-5, atol=1e-6)


def test_without_clipping_stage_0_equals_one_process(two_ranks):
    settings = dataclasses.replace(SETTINGS, clip_norm=0.0)
    _, connector, experts = _reference_run(settings, 2)
    for rank in range(2):
        _, _, got_connector, got_experts, _ = two_ranks[rank][0, "replicated"]
        torch.testing.assert_close(got_connector, connector, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_experts, experts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_dropped_step_leaves_no_trace(two_ranks, stage, sharded):
    """Weights, moments, Adam's count and all later steps are as if it had never been."""
    reference, _, _ = _reference_run(dataclasses.replace(SETTINGS, clip_norm=0.0), 2)
    for rank in range(2):
        (norms, with_it), (_, without) = two_ranks[rank]["dropped", stage, sharded]
        assert len(with_it) == len(without)
        for ours, theirs in zip(with_it, without, strict=True):
            assert torch.equal(ours, theirs)
        assert norms[0] == pytest.approx(reference[0], rel=1e-5)  # each expert is counted once
        assert norms == two_ranks[0]["dropped", stage, sharded][0][0]  # equal on all ranks


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fragments_tile_every_replicated_parameter_once(two_ranks, stage):
    covered = {"connector.weight": [], "experts": []}
    for rank in range(2):
        pieces = dict(two_ranks[rank][stage, "replicated"][4])
        if stage:  # half of the moments, up to padding
            assert 0 <= 2 * pieces.pop("moments") - DIM * DIM * (1 + EXPERTS) < 64
        pieces.pop("moments", None)
        for name, (first, numel, steps) in pieces.items():
            covered[name] += range(first, first + numel)
            assert steps == STEPS
    assert sorted(covered["connector.weight"]) == list(range(DIM * DIM))
    assert sorted(covered["experts"]) == list(range(EXPERTS * DIM * DIM))


def test_fragments_of_sharded_experts_are_the_holders(two_ranks):
    sizes = [two_ranks[rank][1, "uneven"][4]["experts"][1] for rank in range(2)]
    assert sizes == [DIM * DIM, 2 * DIM * DIM]
    assert "experts" not in two_ranks[0][1, "skewed"][4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 3}, "zero_stage=3 is refused"),
        ({"zero_stage": 4}, "must be 0, 1 or 2"),
        ({"zero_stage": 0}, "wrong norm"),
        ({"zero_stage": 0, "clip_norm": 0.0, "bf16": True}, "no fp32 weights"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Engine(lambda: None, [], dataclasses.replace(SETTINGS, **change), None)


def test_ranks_come_from_any_launcher():
    assert ranks_from_environment({}) == Ranks(0, 1, 0, 1)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert ranks_from_environment(torchrun) == Ranks(3, 4, 1, 2)
    deepspeed = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert ranks_from_environment(deepspeed) == Ranks(3, 4, 1, 2)
    srun = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }
    assert ranks_from_environment(srun) == Ranks(3, 4, 1, 2)


def test_the_group_must_divide_the_world():
    with pytest.raises(ValueError, match="ep_size=2 does not divide the 3 ranks"):
        start(Ranks(0, 3, 0, 3), ep_size=2, timeout_s=5)
