"""The bytes of the tensors that a rank holds, by kind, read off the tensors themselves.

What is counted is storage, each once: DeepSpeed's flat buffers with their padding, and not the views
into them. Activations are not in it: they come and go.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from moe_ext.model.experts import FrozenBank
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training.engine import Engine

KINDS = ("frozen_experts", "rest", "encoder", "trained", "gradients", "optimizer")
"""`rest`: the base apart from its experts, frozen connectors and fixed buffers. `trained`: weights."""


class _Ledger:
    """Bytes by kind; a storage belongs to the first kind that claims it."""

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(KINDS, 0)
        self._seen: set[int] = set()

    def claim(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is None or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.bytes[kind] += storage.nbytes()


def held_bytes(model: MultimodalMoE, engine: Engine | None = None) -> dict[str, int]:
    """Kind -> bytes of this rank now; gradients are there between backward and step."""
    ledger = _Ledger()
    if engine is not None:
        ledger.claim("optimizer", optimizer_tensors(engine))
        ledger.claim("trained", (item.parameter for item in engine.trainable))
        ledger.claim("trained", [engine.anchor])
        ledger.claim("gradients", gradient_tensors(engine))
    banks = [module for module in model.modules() if isinstance(module, FrozenBank)]
    ledger.claim("frozen_experts", (t for bank in banks for t in bank.buffers()))
    for encoder in model.encoders.values():
        ledger.claim("encoder", (*encoder.parameters(), *encoder.buffers()))
    ledger.claim("rest", (*model.parameters(), *model.buffers()))
    return ledger.bytes


def formula_bytes(model: MultimodalMoE, engine: Engine) -> int:
    """The rule of thumb, from element counts: e * frozen held + (2 e + 12/dp) * trained, e bytes an
    element of the run's precision; (4 + 12/dp) in bf16.

    It counts a whole gradient. DeepSpeed 0.19.8 has that while backward runs (its reduction bucket);
    between backward and step only this rank's partition is left, e/dp, so that what is measured there
    on dp ranks lies e * (1 - 1/dp) * trained below.
    """
    e = 2 if engine.settings.bf16 else 4
    own = {id(parameter) for parameter in engine.parameters()}
    frozen, seen = 0, set(own)
    tensors = [*model.parameters(), *model.buffers()]
    for encoder in model.encoders.values():
        tensors += [*encoder.parameters(), *encoder.buffers()]
    for tensor in tensors:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        plain = tensor.is_floating_point() and tensor.element_size() >= e
        frozen += tensor.numel() * (e if plain else tensor.element_size())
    world = engine.topology.world_size
    replicas = world // engine.topology.ep_size
    trained = sum(item.parameter.nbytes for item in engine.trainable)
    owned = sum(
        item.parameter.numel() / (replicas if item.sharded else world) for item in engine.trainable
    )
    return round(frozen + 2 * trained + 12 * owned)


def optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Master weights and moments."""
    if engine.settings.zero_stage > 0:
        yield from engine.deepspeed.optimizer.single_partition_of_fp32_groups
    for state in engine.adam.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def gradient_tensors(engine: Engine) -> Iterator[Tensor]:
    """Gradients, wherever DeepSpeed keeps them at this moment, and its reduction buckets."""
    for parameter in engine.parameters():
        yield from _tensors(parameter.grad)
        yield from _tensors(getattr(parameter, "grad_accum", None))
    if engine.settings.zero_stage > 0:
        zero = engine.deepspeed.optimizer
        yield from _tensors(zero.averaged_gradients)
        yield from _tensors(zero.all_grad_tensors)
        for bucket in zero.ipg_buckets.values():
            yield from _tensors(bucket.buffer)
        yield from (
            flat.grad for flat in zero.single_partition_of_fp32_groups if flat.grad is not None
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
