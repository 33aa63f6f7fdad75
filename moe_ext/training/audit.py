"""Errors that would not crash, made loud: what a stage checks about itself, and names when it is wrong.

Most errors of training code are silent: an expert that no optimizer holds, a gradient averaged over
the wrong ranks, a norm counted twice; the loss falls all the same. Every check here compares two
independent accounts of one fact. `docs/audit.md` says which check finds which error, and
`tests/training/test_audit.py` plants the errors.

    at a stage's start       what trains, optimizer and reduction groups, placement, equal replicas
    in the first step        gradients, routing, loss, gradient norm, what moved (`first_step.py`)
    after the third          tensors of one expert share one fate
    at every checkpoint      a rolling sample of the frozen tensors, replicas, masters
    at the end               every frozen tensor, replicas, masters

All ranks learn of a finding and raise together: none is left in a collective.
"""

from collections import defaultdict
from typing import Any

import torch

from moe_ext.batch import Batch
from moe_ext.config import Trainable
from moe_ext.model.extend import extended_layers
from moe_ext.model.multimodal import MultimodalMoE, Output
from moe_ext.training.audit_checks import (
    STEPS_UNTIL_ALL_MOVE,
    base_errors,
    fate_errors,
    gather,
    optimizer_errors,
    placement_errors,
    reached_kinds,
    restored_errors,
    same_samples,
    sharded_tensors,
    stale_weights,
    unequal_replicas,
    what_trains,
)
from moe_ext.training.checkpoint import Published
from moe_ext.training.engine import Engine
from moe_ext.training.first_step import FirstStep
from moe_ext.training.parts import FrozenWatch, Part, bit_sum, statics_of


class AuditError(RuntimeError):
    """Training would have gone on, and been wrong; the message names the thing and the rule."""


class Audit:
    """The checks of one stage; construct it right before the first step. Every call is a collective.

    Args:
        train: what the stage trains, as its configuration lists it.
        extension: whose parts; other extensions in the model stay as they are.
        parts: the parameters that were chosen for it.
        watch: made before the engine, which must not have touched what is frozen.
        source: the checkpoint that the stage starts from or goes on from, if any.

    Raises:
        AuditError: on all ranks, whichever found something; any method may.
    """

    def __init__(
        self,
        stage: str,
        train: list[Trainable],
        extension: str,
        model: MultimodalMoE,
        parts: list[Part],
        engine: Engine,
        watch: FrozenWatch,
        source: Published | None = None,
    ):
        self.stage, self.train, self.model, self.parts = stage, train, model, parts
        self.extension = extension
        self.engine, self.watch, self.topology = engine, watch, engine.topology
        self.taken = 0
        """Steps taken since this start."""
        self.unmoved: list[str] = []
        """Trainable tensors that had no gradient in the first steps, as idle experts have none."""
        self.samples: list[str] = []
        """Keys of the samples that this rank read for the first steps."""
        self.reached: set[Trainable] = set()
        """Kinds of parts that tokens of the first steps reached."""
        frozen = {name: total for (name, _), total in zip(watch.tensors, watch.sums, strict=True)}
        # where things are comes first: a tensor in a wrong place has wrong numbers on other ranks, too
        self._agree(
            "at its start",
            [
                *what_trains(model, train, extension),
                *optimizer_errors(model, engine),
                *placement_errors(model, self.topology),
                *base_errors(model),
            ],
        )
        self._agree(
            "at its start",
            [
                *restored_errors(parts, source),
                *unequal_replicas(self._by_holder(frozen, dict(watch.tensors)), self.topology),
                *self._moving_errors(),
            ],
        )
        self.first: FirstStep | None = FirstStep(model, engine)

    @property
    def summary(self) -> str:
        groups, frozen = len(self.engine.parts), len(self.watch.tensors)
        return (
            f"audit: {len(self.parts)} trainable tensors, each in one of {groups} optimizer groups; "
            f"{frozen} frozen ones are watched; replicas and placement are as they should be"
        )

    def forward(self, batch: Batch, output: Output, nll: torch.Tensor, loss: torch.Tensor) -> None:
        """After every forward pass, before its backward; no collective.

        Args:
            nll, loss: this rank's share of the step's token loss, and of the whole loss.
        """
        if self.taken < STEPS_UNTIL_ALL_MOVE:
            self.samples += batch.sample_keys
            self.reached |= reached_kinds(self.model, output, self.extension)
        if self.first is not None:
            self.first.forward(output, nll, loss)

    def backward(self) -> None:
        """After the step's last backward pass, before the optimizer."""
        if self.first is not None:
            self._agree("in its first step", self.first.gradient_errors())

    def step(self, taken: bool, norm: float) -> None:
        """After the optimizer. A step that was dropped is no step."""
        if self.first is not None:
            if not taken:
                self.first.restart()
                return
            self._agree(
                "after its first step", [*self.first.step_errors(norm), *self._moving_errors()]
            )
            self.first.close()
            self.first = None
        self.taken += taken
        if taken and self.taken == STEPS_UNTIL_ALL_MOVE:
            found, self.unmoved = fate_errors(self.engine, self.parts, self.model, self.reached)
            self._agree(f"after {self.taken} steps", found + same_samples(self.samples))

    def checkpoint(self) -> None:
        """Before something is published."""
        self._agree("at a checkpoint", [*self.watch.changed(), *self._moving_errors()])

    def end(self) -> None:
        """When the last step is done."""
        self._agree("at its end", [*self.watch.changed(1.0), *self._moving_errors()])

    def _moving_errors(self) -> list[str]:
        """What may move, is it the same on all holders, and what the optimizer has?"""
        tensors = {part.name: part.parameter for part in self.parts}
        tensors |= {name: t for name, t in statics_of(self.model).items() if "rows" in name}
        sums = {name: bit_sum(tensor) for name, tensor in tensors.items()}
        return [
            *stale_weights(self.model, self.engine),
            *unequal_replicas(self._by_holder(sums, tensors), self.topology),
        ]

    def _by_holder(self, sums: dict[str, int], tensors: dict[str, Any]) -> dict[str, int]:
        """The same sums; the name of what only some ranks hold says which place of the group it is of."""
        sharded = sharded_tensors(self.model)
        place = f" of place {self.topology.ep_rank}"
        return {n + place * (id(tensors[n]) in sharded): total for n, total in sums.items()}

    def _agree(self, when: str, found: list[str]) -> None:
        by_line: dict[str, list[int]] = defaultdict(list)
        for rank, lines in enumerate(gather(found)):
            for line in lines:
                by_line[line].append(rank)
        if not by_line:
            return
        line, ranks = next(iter(by_line.items()))
        more = f" (and {len(by_line) - 1} findings more)" if len(by_line) > 1 else ""
        raise AuditError(f"stage {self.stage}, {when}, ranks {ranks}: {line}{more}")


def check_result(model: MultimodalMoE) -> None:
    """Refuse to publish what is no part of a result.

    Raises:
        AuditError: a router still has the probe's difference.
    """
    for index, block in extended_layers(model.lm).items():
        if block.router.delta is not None:
            raise AuditError(
                f"layer {index}'s router still has the probe's difference (router.delta): it must be "
                "dropped before the result is published"
            )
