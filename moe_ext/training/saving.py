"""What a stage puts into its checkpoints, and how it goes on from one."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_ext.data import Loader, merge_states
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training import resume
from moe_ext.training.checkpoint import Published, Snapshot, published
from moe_ext.training.engine import Engine
from moe_ext.training.loop import Position
from moe_ext.training.parts import Part, statics_of
from moe_ext.training.publishing import Report
from moe_ext.training.run import Run, check_identity, status


@dataclass
class Saver:
    """Begins to publish a checkpoint of a running stage; training goes on after a copy."""

    run: Run
    name: str
    model: MultimodalMoE
    chosen: list[Part]
    engine: Engine
    loader: Loader
    check: Callable[[], None] = lambda: None
    """Called before anything is copied: is what shall be published right?"""

    def __call__(self, at: Position) -> None:
        """A collective; raises CheckpointError on all ranks when the one before failed."""
        began, run, name, step = time.perf_counter(), self.run, self.name, at.step
        self.check()
        pieces, adam_step = resume.pieces_of(self.engine, self.chosen)
        loaders: list[Any] = [None] * run.topology.world_size
        dist.all_gather_object(loaders, self.loader.state_dict())
        tensors, generators = resume.generator_states()
        state = {
            "stage": name,
            "position": asdict(at),
            "adam_step": adam_step,
            "loader": merge_states(loaders),
            "identity": run.identity(name),
            "tracking": run.tracker.state(),
        }
        statics = statics_of(self.model, run.others)
        snapshot = Snapshot(pieces, state, {"generators": generators}, tensors, statics)
        stall_s = 0.0

        def done(report: Report) -> None:
            run.tracker.event(
                "checkpoint",
                stage=name,
                step=step,
                stall_s=stall_s,
                write_s=report.write_s,
                bytes=report.bytes,
            )

        run.publisher.start(
            run.stage_folder(name) / "checkpoints",
            f"step-{step:07d}",
            snapshot,
            keep=run.config.keep_checkpoints,
            done=done,
        )
        status(run, "running", name, step)
        stall_s = time.perf_counter() - began

    def resume(self, checkpoint: Published) -> Position:
        """Put a checkpoint into engine, loader and generators; where it stands."""
        run, name, topology = self.run, self.name, self.run.topology
        checkpoint.verify(topology.rank, topology.world_size)
        resume.restore_masters(self.engine, self.chosen, checkpoint, moments=True)
        self.loader.load_state_dict(checkpoint.state["loader"])
        states = checkpoint.manifest["rank_states"]
        if topology.rank < len(states):
            tensors = checkpoint.rank_tensors(topology.rank)
            resume.restore_generators(tensors, states[topology.rank]["generators"])
        position = Position(**checkpoint.state["position"])
        steps = run.config.stages[name].steps
        run.tracker.say(f"[{name}] resumed from step {position.step} of {steps}")
        run.tracker.enter(name, checkpoint.state.get("tracking"))
        run.tracker.event("resume", stage=name, step=position.step, ranks=topology.world_size)
        return position


def newest_checkpoint(run: Run, name: str) -> Published | None:
    """The checkpoint to resume a stage from, of the same settings: rank 0's choice, for all ranks."""
    found = published(run.stage_folder(name) / "checkpoints")
    choice = [str(found[-1]) if found else ""]
    if run.topology.world_size > 1:
        dist.broadcast_object_list(choice, 0)
    if not choice[0]:
        return None
    checkpoint = Published(Path(choice[0]))
    check_identity(run, name, checkpoint)
    return checkpoint
