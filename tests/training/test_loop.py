"""The loop's own arithmetic: schedule, router losses, expert metrics, the rule for bad steps."""

import itertools
import json
import math
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import AlertConfig, StageConfig, TrackingConfig
from moe_ext.data import Loader, SampleBuilder, ShardStream, TooManyBadSamples, write_shards
from moe_ext.model.multimodal import Output
from moe_ext.model.routing import LayerRecord, RoutingContext
from moe_ext.training import loop
from moe_ext.training.signals import StopFlag
from moe_ext.training.topology import Ranks, Topology
from moe_ext.training.tracking import Tracker
from tests.data.inputs import make_tokenizer, pair, to_pixels
from tests.ranks import run_ranks


def test_the_rate_warms_up_and_falls_along_a_cosine():
    stage = StageConfig(
        steps=100, learning_rate=2.0, warmup_share=0.1, final_learning_rate_share=0.1
    )
    rates = [loop.learning_rate_at(step, stage) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[9] == max(rates)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.2, abs=0.01)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 46 / 91))
    assert rates[55] == pytest.approx(2.0 * middle)


def test_one_step_has_a_rate():
    assert loop.learning_rate_at(0, StageConfig(steps=1, learning_rate=0.5)) == 0.5


class _Loader:
    wait_s, num_new_skips, num_truncated = 0.0, 0, 3

    def over_budget(self, num_new_skips):
        return False

    def __iter__(self):
        ids = torch.zeros(2, 3, dtype=torch.int64)
        labels = ids.clone()
        labels[0, 0] = IGNORED_LABEL
        while True:
            yield Batch(ids, labels, ids, ids + 1, ids)


class _Engine:
    """An engine whose steps at the numbers in `bad` are skipped."""

    def __init__(self, bad=()):
        self.topology = Topology(Ranks(0, 1, 0, 1), torch.device("cpu"), 1, 0, None, 5.0)
        self.bad, self.losses, self.steps, self.parts = bad, [], 0, ["connector"]

    def __call__(self, batch, mask, with_losses):
        context = RoutingContext(batch.modality_ids, batch.segment_ids)
        context.records[1] = LayerRecord(torch.tensor([[0, 1]] * 6), 2)
        nll_Z = torch.full((batch.num_targets,), 3.0, requires_grad=True)
        return Output(nll_Z, torch.arange(batch.num_targets), context)

    def backward(self, loss):
        self.losses.append(loss.item())

    def part_squares(self):
        return torch.ones(1, dtype=torch.float64)

    def step(self, learning_rate, drop=False):
        self.steps += 1
        return self.steps not in self.bad, 1.0


def _train(engine, tmp_path, loader=None, alerts=None, **settings):
    stage = StageConfig(learning_rate=1.0, sequences_per_rank=2, **settings)
    saved, position = [], loop.Position()
    views = TrackingConfig(wandb=False, progress=False, alerts=alerts or AlertConfig())
    tracker = Tracker(tmp_path, {}, views)
    tracker.enter("tune")
    finished = loop.train(
        "tune",
        stage,
        engine,
        loader or _Loader(),
        tracker,
        position,
        lambda at: saved.append(at.step),
        StopFlag(),
        new_experts={1: range(2, 2)},
    )
    tracker.close()
    return finished, position, saved


@pytest.fixture
def one_rank():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_loss_is_a_mean_over_the_steps_targets(one_rank, tmp_path):
    engine = _Engine()
    finished, position, saved = _train(
        engine, tmp_path, steps=3, accumulation=2, checkpoint_every=2
    )
    assert finished
    assert engine.losses == pytest.approx([1.5] * 6)  # two micro-batches of half the targets
    assert saved == [2]
    assert (position.step, position.tokens) == (3, 3 * 2 * 6)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    step = [r for r in records if r["event"] == "step"][-1]
    assert (step["real_token_share"], step["truncated_samples"]) == (1.0, 3)


class _Hanging(_Loader):
    """Waits before its second batch."""

    def __iter__(self):
        batches = super().__iter__()
        yield next(batches)
        time.sleep(1.0)
        yield from batches


def test_a_loader_that_hangs_is_told_of_while_it_does(one_rank, tmp_path, capsys):
    finished, _, _ = _train(
        _Engine(), tmp_path, steps=3, loader=_Hanging(), alerts=AlertConfig(stalled_s=0.3)
    )
    assert finished
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = [r["rule"] if r["event"] == "alert" else r["event"] for r in records]
    assert kinds == ["step", "stalled", "step", "step"], records
    text = records[1]["text"]
    assert text.startswith("[tune] no step for ") and "tracking.alerts.stalled_s=0.3" in text
    assert f"ALERT {text}" in capsys.readouterr().out


def test_bad_steps_are_counted(one_rank, tmp_path):
    finished, position, _ = _train(_Engine(bad=(2, 3, 5)), tmp_path, steps=6, max_bad_steps=2)
    assert finished
    assert position.bad_steps == 3


def test_too_many_bad_steps_in_a_row_end_the_run(one_rank, tmp_path):
    with pytest.raises(loop.TooManyBadSteps, match="stages.tune.max_bad_steps=2"):
        _train(_Engine(bad=(2, 3, 4)), tmp_path, steps=6, max_bad_steps=2)


def _stopped(folder, restored):
    """Error, finished steps and own skips of this rank, on data whose rows 0 and 2 of 4 are bad."""
    rank, world = dist.get_rank(), dist.get_world_size()
    build = SampleBuilder(make_tokenizer(), to_pixels, 4, prompt="A", max_length=64)
    loader = Loader(
        ShardStream(folder / "shard.json", shuffle=False),
        build,
        sequences_per_rank=2,
        rank=rank,
        world_size=world,
        bad_sample_budget=5,
        stop_alone=False,
    )
    loader.load_state_dict(
        {**loader.state_dict(), "skips": [[-i, "old", "reason"] for i in range(restored)]}
    )
    stage, position = StageConfig(steps=50, sequences_per_rank=2), loop.Position()
    tracker = Tracker(
        folder / f"run-{restored}-{rank}", {}, TrackingConfig(wandb=False, progress=False)
    )
    try:
        loop.train(
            "tune", stage, _Engine(), loader, tracker, position, lambda at: None, StopFlag(),
            new_experts={1: range(2, 2)}, log_every=1000,
        )  # fmt: skip
    except TooManyBadSamples as error:
        return str(error), position.step, loader.num_new_skips
    return "", position.step, loader.num_new_skips


def _both_stopped(folder):
    return [_stopped(folder, restored) for restored in (0, 5)]


def test_the_budget_of_bad_samples_is_all_ranks_together(tmp_path):
    """Three bad samples on each rank are six: both stop, in the same step, with the same words."""

    def samples():
        for i in range(40):
            yield "train", {**pair(i), **({"png": b"broken"} if i % 4 in (0, 2) else {})}

    write_shards(samples(), tmp_path)
    by_rank = run_ranks(_both_stopped, 2, tmp_path)
    for error, steps, own in (results[0] for results in by_rank):
        assert error.startswith("6 samples could not be used, above data.bad_sample_budget=5")
        assert "position 10: " in error and "cannot be decoded" in error
        assert (steps, own) == (2, 3)
    # a restored log is of all ranks already, and counts once
    for error, steps, own in (results[1] for results in by_rank):
        assert error.startswith("7 samples") and (steps, own) == (0, 1)
    assert by_rank[0] == by_rank[1]


def _tokens(rank):
    g = torch.Generator().manual_seed(rank)
    logits = torch.randn(7 + rank, 4, generator=g)
    counted = torch.rand(7 + rank, generator=g) > 0.3
    modality = (torch.rand(7 + rank, generator=g) > 0.5).long()
    return logits, counted, modality


def _output(rank):
    logits, counted, modality = _tokens(rank)
    record = LayerRecord(logits.topk(2, dim=-1).indices, 4)
    record.counted_T = counted
    record.prob_sum_X = logits.softmax(-1)[counted].sum(0)
    record.z_sum = logits[counted].logsumexp(-1).square().sum()
    record.kl_sum = logits[counted].sum()
    context = RoutingContext(modality.unsqueeze(0), torch.ones_like(modality).unsqueeze(0))
    base_only = replace(record, kl_sum=None)  # a layer without new experts
    context.records = {3: record, 5: base_only}
    return Output(torch.zeros(1, requires_grad=True), torch.zeros(1, dtype=torch.int64), context)


def _shares():
    output = _output(dist.get_rank())
    choices = {3: torch.tensor([1, 0, 0, 0])}
    balance, z, kl = loop._router_losses(output, True, 2, choices)
    selections = {}
    loop._add_selections(selections, output)
    metrics = loop._expert_metrics(selections, {3: range(3, 4), 5: range(4, 4)})
    return balance.item(), z.item(), metrics, kl.item(), choices


def test_router_losses_of_two_ranks_add_up_to_the_whole():
    shares = run_ranks(_shares, 2)
    logits, counted, modality = (torch.cat(t) for t in zip(_tokens(0), _tokens(1), strict=True))
    prob = logits.softmax(-1)[counted]
    chosen = logits.topk(2, dim=-1).indices
    share = torch.bincount(chosen[counted].flatten(), minlength=4) / (2 * counted.sum())
    balance = 4 * (share * prob.mean(0)).sum()
    z = logits[counted].logsumexp(-1).square().mean()
    # two layers with the same record and one of two micro-batches: half of each
    assert sum(s[0] for s in shares) == pytest.approx(balance.item() / 2, rel=1e-5)
    assert sum(s[1] for s in shares) == pytest.approx(z.item() / 2, rel=1e-5)
    kl = logits[counted].sum() / counted.sum() / 2  # of one layer: the other has no new experts
    assert sum(s[3] for s in shares) == pytest.approx(kl.item(), rel=1e-5)
    chosen_of_all = torch.bincount(chosen[counted].flatten(), minlength=4)
    for *_, choices in shares:
        assert torch.equal(choices[3], chosen_of_all + torch.tensor([1, 0, 0, 0]))
        assert torch.equal(choices[5], chosen_of_all)
    metrics = shares[0][2]
    assert metrics == shares[1][2]
    load = torch.bincount(chosen.flatten(), minlength=4).double()
    load = load / load.sum()
    assert metrics["expert_load"][3] == pytest.approx(float(load.max() * 4))
    entropy = float(-(load * load.log()).sum() / math.log(4))
    assert metrics["expert_entropy"][5] == pytest.approx(entropy)
    new = (chosen == 3).float().mean(1)  # only layer 3 has a new expert, its last
    assert metrics["new_share"]["image"] == pytest.approx(float(new[modality == 1].mean()))
    assert metrics["new_share"]["text"] == pytest.approx(float(new[modality == 0].mean()))
    assert metrics["new_expert_share"] == {3: [pytest.approx(float(load[3]))]}
    for kind, name in enumerate(("text", "image")):
        of_kind = torch.bincount(chosen[modality == kind].flatten(), minlength=4).double()
        of_kind = of_kind / of_kind.sum()
        assert metrics[name]["load"][5] == pytest.approx(float(of_kind.max() * 4))
        entropy = float(torch.special.entr(of_kind).sum() / math.log(4))
        assert metrics[name]["entropy"][3] == pytest.approx(entropy)
        assert metrics[name]["new_share"] == {3: pytest.approx(float(of_kind[3]))}
