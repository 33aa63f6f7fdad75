"""What each stage does, and the chain align -> probe -> extend -> tune.

Every stage builds the model fresh from the base and the previous stage's published result, trains
its list with an engine of its own, and publishes a result: every tensor of the extension so far. A
stage whose result is published is not done again; one that was interrupted goes on from its last
checkpoint.

    run_dir/stages/<name>/checkpoints/step-000020/     to resume from
    run_dir/stages/<name>/result/                      to build upon
    run_dir/probe.json                                 the probe's manifest: where to add what
"""

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_ext.analysis.probe import load_plans, most_selected
from moe_ext.config import StageConfig, StageKind, Trainable
from moe_ext.data.configured import open_loader
from moe_ext.model.extend import (
    announce,
    attach_extension,
    extended_layers,
    parameter_counts,
)
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training import resume
from moe_ext.training.audit import Audit, check_result
from moe_ext.training.build import build_model
from moe_ext.training.checkpoint import Published, Snapshot
from moe_ext.training.closed_form import start_connectors
from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.held import formula_bytes, held_bytes
from moe_ext.training.loop import Position, train
from moe_ext.training.parts import FrozenWatch, Part, choose, parts_of, statics_of
from moe_ext.training.run import Run, check_identity, peak_memory, status
from moe_ext.training.saving import Saver, newest_checkpoint
from moe_ext.training.surgery import PROBE_FILE, extend, measure_probe, write_probe


def run_chain(run: Run, at_step0: Callable[[Run, MultimodalMoE], None] | None = None) -> bool:
    """Run every stage of the chain that is not done; False when asked to stop in between.

    Args:
        at_step0: called with the freshly extended model.
    """
    previous: str | None = None
    for index, name in enumerate(run.config.chain):
        done = run.result(name)
        if done is not None:
            check_identity(run, name, Published(done))
            run.tracker.say(f"[{name}] done before, result in {done}")
            remove_checkpoints(run, name)  # a start killed behind its result left them
            previous = name
            continue
        run.leave_if_asked()
        if not run_stage(run, index, name, previous, at_step0):
            return False
        gc.collect()  # engine and model hold each other: the next stage would double the memory
        previous = name
    return True


def run_stage(
    run: Run,
    index: int,
    name: str,
    previous: str | None,
    at_step0: Callable[[Run, MultimodalMoE], None] | None = None,
) -> bool:
    """One stage from the previous one's result to its own; False when stopped before its end."""
    began = time.perf_counter()
    stage = run.config.stages[name]
    torch.manual_seed(run.config.seed * 7919 + index * 101 + run.topology.rank)
    status(run, "running", name, 0)
    source = None if previous is None else Published(run.result(previous) or Path())
    hot = hot_of(run) if stage.kind is StageKind.train else {}
    if hot:
        run.tracker.say(f"[{name}] hot experts by layer, on every rank: {hot}")
    model = stage_model(run, source, hot)
    if stage.kind is StageKind.extend:
        extend(run, model)
        if at_step0 is not None:
            at_step0(run, model)
        return finish(run, name, model, None, Position(), began, None, count(model, []))
    before = None
    if stage.kind is StageKind.probe:
        run.tracker.say(f"[{name}] counting selections before")
        before = measure_probe(run, stage, model, modality=run.modality)
        for layer in extended_layers(model.lm).values():
            layer.router.add_delta()
    interrupted = newest_checkpoint(run, name)
    if interrupted is None and source is None and Trainable.connector in stage.train:
        start_connectors(
            run.config,
            run.prepared,
            model,
            run.topology,
            run.tracker,
            run.folder,
            between=run.leave_if_asked,
        )
    if interrupted is not None:  # before the watch looks: what no optimizer has is frozen from here
        resume.load_weights([], statics_of(model, run.others), interrupted)
    chosen = choose(model, stage.train, run.config.extension.name)
    model.set_liveness()
    run.tracker.say(f"[{name}] {announce(model)}")
    numbers = count(model, chosen)
    watch = FrozenWatch(model, chosen, run.config.extension.name)
    engine = make_engine(run, stage, model, chosen)
    held: dict[str, int] = {}
    engine.at_first_step = lambda: held.update(held_bytes(model, engine))
    if source is not None and stage.kind is not StageKind.probe:
        resume.restore_masters(engine, chosen, source, moments=False)
    finished, position = train_stage(
        run, index, name, stage, model, chosen, engine, watch, source, interrupted
    )
    if not finished:
        status(run, "stopped", name, position.step)
        return False
    if stage.kind is StageKind.probe:
        assert before is not None
        run.tracker.say(f"[{name}] counting selections after")
        after = measure_probe(run, stage, model)
        write_probe(run, before, after, stage.statistics_samples)
        for layer in extended_layers(model.lm).values():
            layer.router.drop_delta()
    return finish(run, name, model, engine, position, began, chosen, numbers, held)


def hot_of(run: Run) -> dict[int, list[int]]:
    """Layer -> hot experts: those that the configuration names, or the probe's most selected once it
    is done. Only stages that train have any: evaluation adds up in one order, before and after."""
    parallel, path = run.config.parallel, run.folder / PROBE_FILE
    if parallel.hot_lists or not parallel.hot_experts or not path.is_file():
        return {layer: list(ids) for layer, ids in parallel.hot_lists.items()}
    return most_selected(path, parallel.hot_experts)


def stage_model(
    run: Run, source: Published | None, hot: dict[int, list[int]] | None = None
) -> MultimodalMoE:
    """The model a stage starts from; the extension is attached once a result holds it."""
    config = run.config
    model = build_model(config, run.prepared, run.topology, hot)
    if source is None:
        return model
    if any(name.startswith("layers.") for name in source.tensors):
        attach_extension(
            model.lm,
            config.extension.name,
            load_plans(run.folder / PROBE_FILE),
            config.extension,
            modalities=run.prepared.own_modalities,
            seed=config.seed,
        )
    missing = resume.load_weights(
        parts_of(model, run.others), statics_of(model, run.others), source
    )
    if missing:
        raise RuntimeError(f"{source.folder} lacks {len(missing)} tensors, first {missing[0]}")
    return model


def make_engine(run: Run, stage: StageConfig, model: MultimodalMoE, chosen: list[Part]) -> Engine:
    optim, parallel = run.config.optim, run.config.parallel
    settings = EngineSettings(
        zero_stage=parallel.zero_stage,
        clip_norm=optim.clip_norm,
        accumulation=stage.accumulation,
        sequences_per_rank=stage.sequences_per_rank,
        bf16=run.prepared.bf16,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in chosen
    ]
    return Engine(model.forward, trainable, settings, run.topology)


def train_stage(
    run: Run,
    index: int,
    name: str,
    stage: StageConfig,
    model: MultimodalMoE,
    chosen: list[Part],
    engine: Engine,
    watch: FrozenWatch,
    source: Published | None,
    interrupted: Published | None,
) -> tuple[bool, Position]:
    """The loop, with what it resumes from and what it publishes. (finished?, where it stands)"""
    config, topology = run.config, run.topology
    loader = open_loader(
        run.prepared.data,
        stage.data,
        run.prepared.build,
        sequences_per_rank=stage.sequences_per_rank,
        rank=topology.rank,
        world_size=topology.world_size,
        seed=config.seed * 1000 + index,
        cache_dir=config.cache_dir,
        stop_alone=False,
    )
    saver = Saver(run, name, model, chosen, engine, loader)
    position = saver.resume(interrupted) if interrupted is not None else Position()
    extension, origin = config.extension.name, interrupted or source
    audit = Audit(name, stage.train, extension, model, chosen, engine, watch, origin)
    saver.check = audit.checkpoint
    run.tracker.say(f"[{name}] {audit.summary}")
    run.tracker.enter(name)
    finished = train(
        name,
        stage,
        engine,
        loader,
        run.tracker,
        position,
        saver,
        run.stop,
        new_experts={
            i: layer.experts_of(config.extension.name)
            for i, layer in extended_layers(model.lm).items()
        },
        publisher=run.publisher,
        audit=audit,
        balance_choice=choice_balancer(
            model, config.extension.loss_free_rate, config.extension.name
        ),
        log_every=config.tracking.log_every,
        global_step=sum(config.stages[n].steps for n in config.chain[:index]),
    )
    if finished:
        audit.end()
    if audit.unmoved:
        run.tracker.say(
            f"[{name}] {len(audit.unmoved)} trainable tensors had no gradient in the first steps, "
            f"first {audit.unmoved[0]}"
        )
        run.tracker.event("no_gradient", stage=name, tensors=audit.unmoved)
    if finished and stage.kind is StageKind.probe and position.step:
        saver(position)  # counting selections comes before the result, and may be stopped
    return finished, position


def choice_balancer(
    model: MultimodalMoE, rate: float, extension: str
) -> Callable[[dict[int, torch.Tensor]], None] | None:
    """What moves the extension's choice after every step; None where nothing is to be moved."""
    layers = extended_layers(model.lm)
    if rate <= 0 or not any(extension in layer.new for layer in layers.values()):
        return None

    def balance(choices: dict[int, torch.Tensor]) -> None:
        for index, count_X in choices.items():
            layers[index].router.balance_corrections(count_X, rate, extension)

    return balance


def remove_checkpoints(run: Run, name: str) -> None:
    """Of a stage whose result is published."""
    run.check_owner()
    if run.topology.rank == 0:
        shutil.rmtree(run.stage_folder(name) / "checkpoints", ignore_errors=True)


def finish(
    run: Run,
    name: str,
    model: MultimodalMoE,
    engine: Engine | None,
    position: Position,
    began: float,
    chosen: list[Part] | None,
    numbers: tuple[int, int],
    held: dict[str, int] | None = None,
) -> bool:
    """Publish the stage's result and record the stage; True.

    Args:
        numbers: trainable and all parameters, encoders apart.
        held: bytes of this rank's tensors by kind before the first step; empty when there was none.
    """
    topology = run.topology
    check_result(model)
    trained: list[Part] = chosen or []
    pieces, own = [], {part.name for part in trained}
    if engine is not None and run.config.stages[name].kind is not StageKind.probe:
        pieces, _ = resume.pieces_of(engine, trained)
        for piece in pieces:
            piece.tensors = {"weight": piece.tensors["weight"]}
    elif engine is not None:
        own = set()
    rest = [part for part in parts_of(model, run.others) if part.name not in own]
    pieces += resume.pieces_at_rest(rest, topology.rank, topology.ep_size)
    state = {"stage": name, "identity": run.identity(name), "position": asdict(position)}
    statics = statics_of(model, run.others)
    run.publish(run.stage_folder(name), "result", Snapshot(pieces, state, shared=statics))
    remove_checkpoints(run, name)
    minutes = max(time.perf_counter() - began, position.elapsed_s) / 60
    encoders = sum(p.numel() for e in model.encoders.values() for p in e.parameters())
    run.tracker.stage(
        {
            "stage": name,
            "kind": run.config.stages[name].kind.name,
            "steps": position.step,
            "minutes": minutes,
            "tokens_per_s": position.tokens / position.elapsed_s if position.elapsed_s else None,
            "trainable_parameters": numbers[0],
            "total_parameters": numbers[1] + encoders,
            "peak_memory_bytes": peak_memory(topology),
            **({} if engine is None else tensor_bytes(model, engine, held or {})),
        }
    )
    run.tracker.say(f"[{name}] finished in {minutes:.1f} minutes")
    if engine is not None:
        engine.destroy()
    return True


def tensor_bytes(model: MultimodalMoE, engine: Engine, held: dict[str, int]) -> dict[str, Any]:
    """Bytes of tensors by kind, measured, and what the formula says; one entry a rank. A collective."""
    own = (held, formula_bytes(model, engine))
    all_: list[Any] = [own] * engine.topology.world_size
    if engine.topology.world_size > 1:
        dist.all_gather_object(all_, own)
    if not all(measured for measured, _ in all_):
        return {}
    return {
        "tensor_bytes": [measured for measured, _ in all_],
        "tensor_bytes_formula": [formula for _, formula in all_],
    }


def count(model: MultimodalMoE, chosen: list[Part]) -> tuple[int, int]:
    """(trainable, all) parameters of the whole model."""
    counts, trains = parameter_counts(model)
    return sum(trains.values()) if chosen else 0, sum(counts.values())
