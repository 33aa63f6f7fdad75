"""The audit bites: known errors of training code, planted one by one into a real stage on two ranks.

Each plant changes code that the stage runs, the whole rest is real: base, data, engine, loop. It has to
be named by the audit on both ranks; a loss that differs is not looked at. Stages without a plant (HEALTHY)
show that nothing is named without a reason. docs/audit.md has the same table for readers.
"""

import contextlib
import dataclasses
import gc
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_ext.compose import CONF_DIR, load
from moe_ext.config import TrackingConfig
from moe_ext.model import load as loading
from moe_ext.model.context import RoutingContext
from moe_ext.model.lora import LoraBank
from moe_ext.model.moe import ExtendedMoE, extended_layers
from moe_ext.model.routing import Router
from moe_ext.model.rows import NewRows
from moe_ext.training import build, engine, loop, resume, stages
from moe_ext.training import topology as topologies
from moe_ext.training.build import prepare
from moe_ext.training.engine import Engine
from moe_ext.training.ownership import Claim, claim
from moe_ext.training.run import Run
from moe_ext.training.signals import StopFlag
from moe_ext.training.topology import Ranks
from moe_ext.training.tracking import Tracker
from tests.ranks import run_ranks
from tests.training.tiny import make_inputs, overrides

SHARDED = ("extension.placement=shard",)
LORA = ("extension.expert_type=lora", "extension.lora_rank=2")
RECOMPUTED = ("parallel.activation_checkpointing=true",)
HOT = ("+parallel.hot_lists={0:[1,2],2:[1,2]}",)


@dataclass
class Plant:
    """One error: what it does to the code while a stage runs, and what the audit must say."""

    apply: Any
    says: str
    """Regular expression of the message."""
    settings: tuple[str, ...] = ()
    stage: str = "tune"


def _around(owner: Any, name: str, wrapper: Any) -> Any:
    """`owner.name(...)` becomes `wrapper(original, ...)`."""
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return patch.object(owner, name, replacement)


def _after_engine(act: Any) -> Any:
    """`act(engine, model)` right after the engine was built."""

    def built(original, self, forward, *args):
        original(self, forward, *args)
        act(self, forward.__self__)

    return _around(Engine, "__init__", built)


def _zero_optimizer() -> type:
    # not above: it looks for its accelerator when it is imported
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return DeepSpeedZeroOptimizer


def _banks(model) -> list:
    return [bank for block in extended_layers(model.lm).values() for bank in block.new.values()]


# ---- the plants ------------------------------------------------------------------------------


def experts_missing_from_the_optimizer():
    def built(original, self, forward, trainable, *args):
        last = [item for item in trainable if item.part == "new_experts"][-1]
        original(self, forward, [item for item in trainable if item is not last], *args)

    return _around(Engine, "__init__", built)


def every_expert_frozen():
    def chosen(original, model, *args):
        parts = original(model, *args)
        for bank in _banks(model):
            bank.requires_grad_(False)
        return [part for part in parts if part.trainable.name != "new_experts"]

    return _around(stages, "choose", chosen)


def optimizer_holds_the_tensors_of_before_the_surgery():
    def act(self, model):
        for bank in _banks(model):
            bank.gate_up = nn.Parameter(bank.gate_up.detach().clone())

    return _after_engine(act)


def sharded_experts_are_averaged_over_the_world():
    def chosen(original, *args):
        return [dataclasses.replace(part, sharded=False) for part in original(*args)]

    return _around(stages, "choose", chosen)


def replicated_rows_are_reduced_like_sharded_experts():
    def act(self, model):
        for item in self.trainable:
            if item.part == "new_rows":
                engine._tag(item.parameter, self.topology.ep_group_name)

    return _after_engine(act)


def gradients_are_not_reduced():
    return patch.object(_zero_optimizer(), "average_tensor", lambda *_: None)


def loss_is_not_scaled_by_the_world():
    def backward(original, self, loss):
        original(self, loss / self.topology.world_size)

    return _around(Engine, "backward", backward)


def gradients_are_counted_twice():
    def average(original, self, tensor, *args):
        return original(self, tensor.mul_(2), *args)

    return _around(_zero_optimizer(), "average_tensor", average)


def norm_counts_the_ranks_twice():
    def norm(original, self, *args, **kwargs):
        return original(self, *args, **kwargs) * math.sqrt(2)

    return _around(_zero_optimizer(), "scaled_global_norm", norm)


def low_rank_difference_on_a_third_of_the_expert():
    def expert(original, self, slot, x, weight, gate_up_a, gate_up_b, down_a, down_b):
        only_gate = torch.tensor([1.0, 0.0]).view(2, 1, 1)
        return original(
            self, slot, x, weight, gate_up_a, gate_up_b * only_gate, down_a, 0.0 * down_b
        )

    return _around(LoraBank, "_expert", expert)


def calibration_is_never_used():
    return _around(Router, "_calibrate", lambda original, self, prob_TX, context: prob_TX)


def weight_decay_on_frozen_rows():
    def step(original, self, learning_rate, **options):
        outcome = original(self, learning_rate, **options)
        for module in self.deepspeed.module._forward_model.__self__.modules():
            if isinstance(module, Router):
                module.frozen_weight.mul_(1 - 0.1 * learning_rate)
        return outcome

    return _around(Engine, "step", step)


def a_norm_of_the_base_trains_too():
    def chosen(original, model, *args):
        parts = original(model, *args)
        model.lm.model.norm.weight.requires_grad_(True)
        return parts

    return _around(stages, "choose", chosen)


def tokens_change_experts_in_recomputation():
    def forward(original, self, x_TD, context, layer_index):
        earlier = context.records.get(layer_index)
        if earlier is None:
            return original(self, x_TD, context, layer_index)

        def mirrored(ids):  # among the frozen experts of a rank, so that no shape tells
            if ids is None:
                return None
            half = self.num_frozen // 2
            other = torch.where(ids < half, half - 1 - ids, 3 * half - 1 - ids)
            return torch.where((ids >= 0) & (ids < self.num_frozen), other, ids)

        context.records[layer_index] = dataclasses.replace(
            earlier,
            expert_TS=mirrored(earlier.expert_TS),
            base_expert_TK=mirrored(earlier.base_expert_TK),
        )
        routing = original(self, x_TD, context, layer_index)
        context.records[layer_index] = earlier
        return routing

    return _around(Router, "forward", forward)


def balance_loss_counts_padding():
    def record(original, self, record, prob_TX, logits_TX, base_TE, counted_T, context):
        everything = torch.ones_like(counted_T)
        original(self, record, prob_TX, logits_TX, base_TE, everything, context)

    return _around(Router, "_record_losses", record)


def padding_is_routed():
    def valid(self):
        return torch.ones_like(self.segment_BS.reshape(-1), dtype=torch.bool)

    return patch.object(RoutingContext, "valid_T", property(valid))


def text_reaches_new_experts_that_are_closed_to_it():
    stack = contextlib.ExitStack()
    stack.enter_context(
        patch.object(RoutingContext, "_compute_allowed", lambda self, *_: self.segment_BS != 0)
    )
    stack.enter_context(_around(NewRows, "logits", lambda original, self, x: original(self, x) + 9))
    return stack


def new_rows_are_not_synced():
    def restored(original, engine, *args, **kwargs):
        original(engine, *args, **kwargs)
        if dist.get_rank() == 1:
            for name, piece in engine.fragments().items():
                if name.endswith("rows.weight"):
                    piece.weight += 0.01
                    (parameter,) = (i.parameter for i in engine.trainable if i.name == name)
                    whole = parameter.data.view(-1)
                    whole[piece.start : piece.start + len(piece.weight)] = piece.weight

    return _around(resume, "restore_masters", restored)


def masters_are_restored_and_the_model_is_not():
    def restored(original, engine, *args, **kwargs):
        original(engine, *args, **kwargs)
        for piece in engine.fragments().values():
            piece.weight *= 1.01

    return _around(resume, "restore_masters", restored)


def a_resharded_checkpoint_gives_experts_to_the_wrong_rank():
    def restored(original, engine, *args, **kwargs):
        original(engine, *args, **kwargs)
        for name, piece in engine.fragments().items():
            if name.endswith("experts.down"):  # equal on all ranks that hold it, and to its master
                piece.weight.copy_(piece.weight.flip(0))
        engine.publish_masters()

    return _around(resume, "restore_masters", restored)


def optimizer_steps_over_everything():
    return patch.object(torch.optim.AdamW, "step", lambda *_, **__: None)


def probe_leaves_its_difference_behind():
    return patch.object(Router, "drop_delta", lambda self: None)


def both_ranks_load_the_first_experts():
    def load(original, *args, **kwargs):
        return original(*args, **{**kwargs, "ep_rank": 0})

    return _around(build, "load_base", load)


def experts_are_loaded_in_another_order():
    def fill(original, bank, slot, *args):
        original(bank, len(bank.expert_ids) - 1 - slot, *args)

    return _around(loading, "fill_expert", fill)


def rank_0_s_experts_are_broadcast():
    def act(self, model):
        for block in extended_layers(model.lm).values():
            dist.broadcast(block.frozen.down, 0)

    return _after_engine(act)


def router_rows_are_another_layer_s():
    def act(self, model):
        rows = [block.router.frozen_weight for block in extended_layers(model.lm).values()]
        rows[0].copy_(rows[-1])

    return _after_engine(act)


def hot_experts_change_places():
    def act(self, model):
        for block in extended_layers(model.lm).values():
            block.hot.down.copy_(block.hot.down.flip(0))

    return _after_engine(act)


def low_rank_experts_stand_on_each_other_s_sources():
    def act(self, model):
        for bank in _banks(model):
            bank.gate_up.copy_(bank.gate_up.flip(0))

    return _after_engine(act)


def tokens_go_to_the_wrong_owner():
    def place(original, self):
        original(self)
        if dist.get_rank() == 1 and len(self.banks) > 1:
            self.banks[-1].expert_ids[:] = self.banks[-1].expert_ids[::-1]

    return _around(ExtendedMoE, "_place", place)


def places_of_the_group_are_exchanged():
    def load(original, *args, **kwargs):
        return original(*args, **{**kwargs, "ep_rank": 1 - kwargs["ep_rank"]})

    return _around(build, "load_base", load)


def targets_are_counted_by_rank():
    return _around(loop, "sum_over_ranks", lambda original, values, device: values)


def both_ranks_read_the_same_samples():
    def opened(original, *args, **kwargs):
        return original(*args, **{**kwargs, "rank": 0})

    return _around(stages, "open_loader", opened)


PLANTS = {
    plant.apply.__name__: plant
    for plant in (
        Plant(
            experts_missing_from_the_optimizer,
            r"new\.vision\.down trains, but is in 0 optimizer groups",
        ),
        Plant(
            every_expert_frozen, r"gate_up is new_experts, which the stage trains, but it is frozen"
        ),
        Plant(
            optimizer_holds_the_tensors_of_before_the_surgery,
            r"the optimizer holds a tensor of shape .* not in the model, or not any more",
        ),
        Plant(
            sharded_experts_are_averaged_over_the_world,
            r"gradient of .*\.new\.vision\.gate_up is averaged over ranks \[0, 1\], but \[[01]\] hold",
            SHARDED,
        ),
        Plant(
            replicated_rows_are_reduced_like_sharded_experts,
            r"gradient of .*rows\.vision\.weight is averaged over ranks \[[01]\], but \[0, 1\] hold it",
        ),
        Plant(gradients_are_not_reduced, r"gradient of connectors\.\S+ is \S+ times the sum"),
        Plant(loss_is_not_scaled_by_the_world, r"gradient of \S+ is 0\.5 times the sum"),
        Plant(gradients_are_counted_twice, r"gradient of \S+ is 2 times the sum"),
        Plant(
            norm_counts_the_ranks_twice, r"the engine says the gradient's norm is .* counted twice"
        ),
        Plant(
            low_rank_difference_on_a_third_of_the_expert,
            r"experts\.\d\.down_[ab] had no gradient in 3 steps, but what it belongs to .* learns",
            LORA,
        ),
        Plant(calibration_is_never_used, r"calibration\.w\d had no gradient in 3 steps"),
        Plant(
            weight_decay_on_frozen_rows,
            r"at (a checkpoint|its end).* frozen tensor \S+router\.frozen_weight changed",
        ),
        Plant(
            a_norm_of_the_base_trains_too,
            r"lm\.model\.norm\.weight trains, but the stage trains \[",
        ),
        Plant(
            tokens_change_experts_in_recomputation,
            r"layer \d routed \d+ tokens to other experts when its activations were computed again",
            RECOMPUTED,
        ),
        Plant(
            balance_loss_counts_padding, r"layer \d: \d+ padding tokens count in the router's loss"
        ),
        Plant(padding_is_routed, r"layer \d: \d+ padding tokens go to experts"),
        Plant(
            text_reaches_new_experts_that_are_closed_to_it,
            r"layer \d: \d+ tokens chose vision's experts though scope=modality closes",
            ("extension.scope=modality",),
        ),
        Plant(new_rows_are_not_synced, r"rows\.weight is not the same on ranks \[0\] and \[1\]"),
        Plant(masters_are_restored_and_the_model_is_not, r"is not what the optimizer has for it"),
        Plant(
            a_resharded_checkpoint_gives_experts_to_the_wrong_rank,
            r"experts\.\d\.down is not what the checkpoint \S+ has for it",
            SHARDED,
        ),
        Plant(optimizer_steps_over_everything, r"\S+ received a gradient and did not move"),
        Plant(
            probe_leaves_its_difference_behind,
            r"layer \d's router still has the probe's difference",
            stage="probe",
        ),
        Plant(
            both_ranks_load_the_first_experts,
            r"layer \d's frozen expert 3 is held by nobody of \[0, 1\], instead of by one rank or by all",
        ),
        Plant(
            experts_are_loaded_in_another_order,
            r"layer \d's frozen expert \d has a gate that is not the one of expert \d in",
        ),
        Plant(rank_0_s_experts_are_broadcast, r"frozen expert \d has a down that is not the one"),
        Plant(router_rows_are_another_layer_s, r"layer 0's router has not the \S+gate\.weight of "),
        Plant(hot_experts_change_places, r"frozen expert [12] has a down that is not the one", HOT),
        Plant(
            low_rank_experts_stand_on_each_other_s_sources,
            r"low-rank expert \d has a gate that is not the one of expert \d in",
            LORA,
        ),
        Plant(
            tokens_go_to_the_wrong_owner,
            r"layer \d's vision experts here are \[1, 0\], out of order",
        ),
        Plant(
            places_of_the_group_are_exchanged,
            r"sends the tokens of its frozen experts \[[0-5, ]+\] to place \{[01]\} of the group",
        ),
        Plant(targets_are_counted_by_rank, r"the step's token loss is .* divided by a wrong count"),
        Plant(both_ranks_read_the_same_samples, r"ranks \[0, 1\] read the same samples, first \S+"),
    )
}
HEALTHY = {"healthy": (), "healthy, sharded": SHARDED, "healthy, low-rank": LORA,
           "healthy, recomputed, bf16": (*RECOMPUTED, "parallel.precision=bf16"), "healthy, hot": HOT,
           "healthy, ZeRO-0": (*SHARDED, "parallel.zero_stage=0", "optim.clip_norm=0"),
           "healthy, ZeRO-2": (*SHARDED, "parallel.zero_stage=2")}  # fmt: skip


# ---- the runs --------------------------------------------------------------------------------


@contextlib.contextmanager
def _run(folder: Path, name: str, settings: tuple[str, ...]) -> Iterator[Run]:
    """A run as `moe_ext.train` starts it, up to its first stage; two new experts, three tune steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    words = ("chain=[probe,extend,tune]", "stages.tune.steps=3", "extension.num_new_experts=2")
    words += ("parallel.ep_size=2", "stages.tune.checkpoint_every=1", "tracking.progress=false")
    known = {word.split("=")[0] for word in settings}
    words = tuple(word for word in words if word.split("=")[0] not in known)
    config = load(CONF_DIR, overrides(folder, name, *words, *settings))
    topology = topologies.start(
        Ranks(rank, world, rank, world), config.parallel.ep_size, config.parallel.timeout_s, 1
    )
    run_dir = Path(config.run_dir)
    run_dir.mkdir(exist_ok=True)
    token = topologies.from_rank_0(claim(run_dir).token if rank == 0 else "")
    prepared = prepare(config, topology, lambda: Path(config.base.path))
    tracker = Tracker(run_dir, {}, TrackingConfig(wandb=False, progress=False), rank=rank)
    with StopFlag() as stop:
        yield Run(config, topology, prepared, tracker, Claim(run_dir, token), stop)
    tracker.close()


def _outcome(run: Run, stage: str) -> str:
    """What the stage raised, or "finished"."""
    index = run.config.chain.index(stage)
    previous = run.config.chain[index - 1] if index else None
    if run.topology.rank == 0 and stage == "tune":
        shutil.rmtree(run.stage_folder("tune"), ignore_errors=True)
    dist.barrier()
    try:
        stages.run_stage(run, index, stage, previous)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()
    return "finished"


def _all(folder: Path) -> dict[str, str]:
    outcomes = {}
    for name, settings in (("full", ()), ("low-rank", LORA)):
        with _run(folder, name, settings) as run:
            for stage in ("probe", "extend"):
                assert _outcome(run, stage) == "finished"
    cases = [(name, settings, None) for name, settings in HEALTHY.items()]
    cases += [(name, plant.settings, plant) for name, plant in PLANTS.items()]
    for name, settings, plant in cases:
        planted = plant.apply() if plant else contextlib.nullcontext()
        source = "low-rank" if settings == LORA else "full"
        with _run(folder, source, settings) as run, planted:
            outcomes[name] = _outcome(run, plant.stage if plant else "tune")
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("audit")
    make_inputs(folder)
    return run_ranks(_all, 2, folder, timeout_s=400)


@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_a_healthy_stage_is_found_healthy(outcomes, name):
    assert [theirs[name] for theirs in outcomes] == ["finished"] * 2


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_a_planted_error_is_named_on_all_ranks(outcomes, name):
    first, second = (theirs[name] for theirs in outcomes)
    assert first == second
    assert first.startswith("AuditError: ")
    assert re.search(PLANTS[name].says, first), first


def _healthy(folder: Path) -> dict[str, str]:
    outcomes = {}
    with _run(folder, "full", ()) as run:
        for stage in ("probe", "extend"):
            assert _outcome(run, stage) == "finished"
    for ep_size in (1, 2, 4):
        for zero in (
            (),
            ("parallel.zero_stage=0", "optim.clip_norm=0"),
            ("parallel.zero_stage=2",),
        ):
            settings = (*(SHARDED if ep_size > 1 else ()), f"parallel.ep_size={ep_size}", *zero)
            with _run(folder, "full", settings) as run:
                outcomes[" ".join(settings)] = _outcome(run, "tune")
    return outcomes


@pytest.mark.slow
def test_four_ranks_are_found_healthy(tmp_path):
    """Two groups of two, where an expert has replicas, and some ranks' experts are idle."""
    make_inputs(tmp_path)
    for found in run_ranks(_healthy, 4, tmp_path, timeout_s=500):
        assert found == dict.fromkeys(found, "finished")
