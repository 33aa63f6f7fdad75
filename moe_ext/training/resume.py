"""Between a running engine and a checkpoint: what goes in, and back."""

import random
from typing import Any

import torch
from torch import Tensor

from moe_ext.training.checkpoint import CheckpointError, Piece, Published
from moe_ext.training.engine import Engine
from moe_ext.training.parts import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


def pieces_of(engine: Engine, parts: list[Part]) -> tuple[list[Piece], int]:
    """This rank's share of the optimizer's state by logical tensor, and Adam's number of steps."""
    fragments, pieces, adam_step = engine.fragments(), [], 0
    for part in parts:
        fragment = fragments.get(part.name)
        if fragment is None:
            continue
        adam_step = int(fragment.step.item())
        end = fragment.start + fragment.weight.numel()
        for logical in part.logical():
            first = max(logical.offset, fragment.start)
            last = min(logical.offset + logical.numel, end)
            if first < last:
                own = slice(first - fragment.start, last - fragment.start)
                tensors = {
                    "weight": fragment.weight[own],
                    "exp_avg": fragment.exp_avg[own],
                    "exp_avg_sq": fragment.exp_avg_sq[own],
                }
                pieces.append(Piece(logical.name, logical.shape, first - logical.offset, tensors))
    return pieces, adam_step


def pieces_at_rest(parts: list[Part], rank: int, ep_size: int) -> list[Piece]:
    """The weights of a model without an engine; replicated ones are rank 0's, experts their holders'."""
    pieces = []
    for part in parts:
        if rank >= (ep_size if part.sharded else 1):
            continue
        flat = part.parameter.detach().float().reshape(-1)
        for logical in part.logical():
            own = flat[logical.offset : logical.offset + logical.numel]
            pieces.append(Piece(logical.name, logical.shape, 0, {"weight": own}))
    return pieces


@torch.no_grad()
def restore_masters(engine: Engine, parts: list[Part], source: Published, moments: bool) -> None:
    """Write a checkpoint's fp32 weights, and with `moments` Adam's state, into the engine's own.

    The checkpoint may come from any number of ranks. Afterwards the model's weights equal the
    masters, rounded. A collective.
    """
    fragments = engine.fragments(replicas=True)  # without ZeRO each has moments of its own
    for part in parts:
        fragment = fragments.get(part.name)
        if fragment is None:
            continue
        end = fragment.start + fragment.weight.numel()
        for logical in part.logical():
            first = max(logical.offset, fragment.start)
            last = min(logical.offset + logical.numel, end)
            if first >= last:
                continue
            own = slice(first - fragment.start, last - fragment.start)
            source.fill(logical.name, first - logical.offset, fragment.weight[own])
            for kind in MOMENTS if moments else ():
                target = getattr(fragment, kind)[own]
                source.fill(logical.name, first - logical.offset, target, kind)
        if moments:
            fragment.step.fill_(source.state["adam_step"])
    engine.publish_masters()


@torch.no_grad()
def load_weights(parts: list[Part], statics: dict[str, Tensor], source: Published) -> list[str]:
    """Copy every tensor that `source` has into the model; names of the model that it lacks."""
    shared, missing = source.shared(), []
    for name, buffer in statics.items():
        if name in shared:
            buffer.copy_(shared[name])
        else:
            missing.append(name)
    for part in parts:
        flat = part.parameter.data.view(-1)
        for logical in part.logical():
            if logical.name not in source.tensors:
                missing.append(logical.name)
                continue
            stored = tuple(source.tensors[logical.name]["shape"])
            if stored != logical.shape:
                raise CheckpointError(
                    f"{source.folder}: {logical.name} has shape {stored}, the model's is "
                    f"{logical.shape}; connector, extension and encoder must be as when it was trained"
                )
            value = source.tensor(logical.name).view(-1)
            flat[logical.offset : logical.offset + logical.numel].copy_(value)
    return missing


def generator_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of torch's and Python's random generators: tensors, and JSON."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    return tensors, {"python": [version, list(words), gauss]}


def restore_generators(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Set the generators to a checkpoint's states; a rank that the checkpoint lacks keeps its own."""
    if "torch_cpu" in tensors:
        torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["torch_cuda"])
    if "python" in state:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
