"""The DeepSpeed engine around what trains: parameter groups, ZeRO-1/2, clipping.

DeepSpeed is shown a module that registers the *trainable* parameters and nothing else. What is
frozen is therefore neither broadcast from rank 0 (which would overwrite another rank's experts) nor
cast, moved, reduced or saved by it; placing and casting the base is `load_base`'s work.

New experts that are sharded over an expert-parallel group carry DeepSpeed's tags
(`allreduce=False`, `group_name`), their gradients are summed over the ranks that hold the same
experts. The engine looks for experts in modules of its own classes only, so a parameterless marker
of such a class stands beside them, and every rank registers a tagged anchor of one element: a rank
that holds no new expert would otherwise have no expert group, and the collectives would mispair.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext.config_check import check_zero
from moe_ext.training.shown import Shown, TrainableParameter, expert_marker
from moe_ext.training.topology import Topology, limit_waiting

__all__ = ["Engine", "EngineSettings", "Fragment", "TrainableParameter"]

ANCHOR = "expert_anchor"


@dataclass(frozen=True)
class EngineSettings:
    """Numbers of the optimizer and of ZeRO."""

    zero_stage: int
    clip_norm: float
    accumulation: int
    sequences_per_rank: int
    bf16: bool
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0


class Engine:
    """A DeepSpeed engine for one stage.

    Args:
        forward: the model's forward; called by `__call__`.
        trainable: what trains on this rank. Every rank names the same replicated parameters, in the
            same order. Parameters without elements are left out.

    Raises:
        ValueError: nothing trains, or an impossible combination of settings.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        trainable: list[TrainableParameter],
        settings: EngineSettings,
        topology: Topology,
    ):
        import deepspeed

        check_zero(settings.zero_stage, settings.clip_norm, settings.bf16)
        if not trainable:
            raise ValueError(
                "nothing to train: the stage's `train` list names no parameter of this model"
            )
        self.trainable = [item for item in trainable if item.parameter.numel()]
        if all(item.is_fp32 for item in self.trainable):
            settings = replace(settings, bf16=False)  # whatever the frozen part is in
        self.settings, self.topology = settings, topology
        self.has_sharded = any(item.sharded for item in trainable)
        self.anchor: nn.Parameter | None = None
        module = Shown(forward, self.trainable, settings.bf16)
        if self.has_sharded:
            self.anchor = nn.Parameter(torch.zeros(1, device=topology.device))
            module.register_parameter(ANCHOR, self.anchor)
            module.marker = expert_marker(topology)
            for item in self.trainable:
                if item.sharded:
                    _tag(item.parameter, topology.ep_group_name)
            _tag(self.anchor, topology.ep_group_name)
        self.parts, groups = self._groups()
        optimizer = torch.optim.AdamW(
            groups,
            lr=0.0,  # the loop sets it, as a function of the step
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,  # one pass over the partition: a quarter of the time of the plain loop
        )
        self.at_first_step: Callable[[], None] | None = None
        """Called once, between the first step's last backward and the step."""
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(settings, self.num_elements()),
        )
        limit_waiting(topology.timeout_s)  # the engine made groups of its own
        if settings.zero_stage == 0:
            self._create_plain_state()
        else:
            self._create_partitioned_state()
        self._check_state()

    def _check_state(self) -> None:
        """The optimizer holds state for what trains and for nothing else. A collective.

        Raises:
            RuntimeError: its elements over all ranks are not the trainable ones, padding apart.
        """
        held = sum(
            state["exp_avg"].numel() / self._copies(tensor)
            for tensor, state in self.adam.state.items()
        )
        own = [item.parameter.numel() for item in self.trainable if item.sharded]
        groups_of_replicas = self.topology.world_size // self.topology.ep_size
        counts = torch.tensor([held, sum(own) / groups_of_replicas], dtype=torch.float64).to(
            self.topology.device
        )
        dist.all_reduce(counts)
        held_by_all, sharded = counts.tolist()
        replicated = sum(i.parameter.numel() for i in self.trainable if not i.sharded)
        # DeepSpeed pads every parameter and every partition to a few elements; anchors come on top
        slack = 64 * self.topology.world_size * (len(self.parts) + len(self.trainable) + 1)
        surplus = held_by_all - sharded - replicated
        if not 0 <= surplus <= slack:
            raise RuntimeError(
                f"the optimizer holds moments of {held_by_all:.0f} elements, but {sharded + replicated:.0f} "
                "train: a parameter is missing from its groups, or something frozen is in them"
            )

    def _copies(self, tensor: Tensor) -> int:
        """Ranks that hold the same piece of the optimizer's state: without ZeRO all that hold the weight."""
        if self.settings.zero_stage > 0:
            return 1
        return len(self.topology.replicas(not getattr(tensor, "allreduce", True)))

    def num_elements(self) -> int:
        """Trainable elements that this rank holds, anchor included."""
        return sum(p.numel() for p in self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        parameters = [item.parameter for item in self.trainable]
        return parameters + ([self.anchor] if self.anchor is not None else [])

    def _groups(self) -> tuple[list[str], list[dict[str, Any]]]:
        """One optimizer group a part and precision, the same number and order on every rank."""
        by_kind: dict[tuple[bool, str], list[nn.Parameter]] = {}
        for item in self.trainable:
            if not item.sharded:
                by_kind.setdefault((item.is_fp32, item.part), []).append(item.parameter)
        groups: list[dict[str, Any]] = [
            {"name": part, "params": params} for (_, part), params in by_kind.items()
        ]
        parts, kinds = [part for _, part in by_kind], [wide for wide, _ in by_kind]
        if self.anchor is not None:
            experts = [item.parameter for item in self.trainable if item.sharded]
            name = self.topology.ep_group_name
            groups.append({"name": name, "moe": True, "params": [self.anchor, *experts]})
            parts.append("new_experts")
            kinds.append(not self.settings.bf16)
        # fp32 ones last: ZeRO takes the first group's precision for the run's
        order = sorted(range(len(parts)), key=lambda index: kinds[index])
        return [parts[index] for index in order], [groups[index] for index in order]

    # ---- the optimizer's state -------------------------------------------------------------

    @property
    def adam(self) -> torch.optim.AdamW:
        optimizer = self.deepspeed.optimizer
        return optimizer if self.settings.zero_stage == 0 else optimizer.optimizer

    def _create_plain_state(self) -> None:
        for group in self.adam.param_groups:
            for parameter in group["params"]:
                self._create_state(parameter)

    def _create_partitioned_state(self) -> None:
        # By hand and now: a resume needs it before the first step, and DeepSpeed's own linking
        # misses every group but the first (stage_1_and_2.py:852).
        for flat in self.deepspeed.optimizer.single_partition_of_fp32_groups:
            self._create_state(flat)

    def _create_state(self, tensor: Tensor) -> None:
        self.adam.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
        }

    def fragments(self, replicas: bool = False) -> dict[str, "Fragment"]:
        """Parameter name -> the piece of its master weights and moments that this rank owns.

        Under ZeRO the pieces of all ranks tile every parameter exactly once; without it the first
        rank of each group of replicas owns everything, or with `replicas` every one its own copy.
        """
        result: dict[str, Fragment] = {}
        if self.settings.zero_stage == 0:
            for item in self.trainable:
                first = self.topology.ep_size if item.sharded else 1
                if replicas or self.topology.rank < first:
                    master = item.parameter.detach().view(-1)
                    state = self.adam.state[item.parameter]
                    moments = [state[key].view(-1) for key in ("exp_avg", "exp_avg_sq")]
                    result[item.name] = Fragment(0, master, *moments, step=state["step"])
            return result
        names = {item.parameter: item.name for item in self.trainable}
        zero = self.deepspeed.optimizer
        for flat, parameters in zip(
            zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True
        ):
            state = self.adam.state[flat]
            for parameter in parameters:
                if parameter not in names or parameter._hp_mapping is None:
                    continue
                held, low = (
                    parameter._hp_mapping.hp_fragment_address,
                    parameter._hp_mapping.lp_fragment_address,
                )
                pieces = [
                    t.detach().narrow(0, held.start, held.numel)
                    for t in (flat, state["exp_avg"], state["exp_avg_sq"])
                ]
                result[names[parameter]] = Fragment(low.start, *pieces, step=state["step"])
        return result

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Bring the model's weights up to the masters after these were written to. A collective."""
        if self.settings.zero_stage > 0:
            self.deepspeed.optimizer.update_lp_params()
        elif self.topology.world_size > 1:
            for item in self.trainable:
                if not item.sharded:
                    dist.broadcast(item.parameter.data, 0)

    # ---- stepping --------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        return self.deepspeed(*args)

    def backward(self, loss: Tensor) -> None:
        """Gradient of one micro-batch; the last one of a step reduces over the ranks.

        `loss` is this rank's share of the step's loss: the shares of all ranks and micro-batches
        sum to the loss whose gradient the optimizer takes.
        """
        # DeepSpeed divides by the accumulation steps here and by the world size when it reduces.
        loss = loss * (self.topology.world_size * self.settings.accumulation)
        if self.anchor is not None:
            loss = loss + 0.0 * self.anchor.sum()  # a gradient of zero, on every rank
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only counts the micro-batch

    def part_squares(self) -> Tensor:
        """(parts,) fp64: this rank's share of every part's squared gradient norm, before clipping.

        Over all ranks the shares sum to the squares. Between backward and step.
        """
        if self.settings.zero_stage == 0:  # replicas hold the same gradient: a share of it each
            shares = [
                [_square(p.grad) / self._copies(p) for p in group["params"] if p.grad is not None]
                for group in self.adam.param_groups
            ]
        else:
            gradients = self.deepspeed.optimizer.averaged_gradients
            shares = [[_square(g) for g in gradients[i] or []] for i in range(len(self.parts))]
        zero = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        return torch.stack([sum(of_part, zero) for of_part in shares])

    def step(self, learning_rate: float, *, drop: bool = False) -> tuple[bool, float]:
        """One optimizer step: whether it was taken, and DeepSpeed's norm of the gradient before clipping.

        DeepSpeed drops a gradient that is not finite under ZeRO-1 and 2, and has no norm under ZeRO-0.

        Args:
            drop: do not take the step; equal on all ranks.
        """
        if self.at_first_step is not None:
            self.at_first_step()
            self.at_first_step = None
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        skipped = self.deepspeed.skipped_steps
        if drop:
            self._drop_step()
        else:
            self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        taken = not drop and self.deepspeed.skipped_steps == skipped
        return taken, float("nan") if norm is None else float(norm)

    def _drop_step(self) -> None:
        """Leave this step out, by DeepSpeed's own way for gradients that are not finite."""
        from deepspeed.utils import logger

        if self.settings.zero_stage == 0:
            for parameter in self.parameters():
                parameter.grad = None  # Adam passes over it: neither weight nor moments move
        else:
            for gradients in self.deepspeed.optimizer.averaged_gradients.values():
                for gradient in gradients or []:
                    gradient.fill_(math.inf)
        level = logger.level
        logger.setLevel("ERROR")  # it would give a wrong reason; the loop knows the right one
        self.deepspeed.step()
        logger.setLevel(level)

    def destroy(self) -> None:
        """Let go of the engine's memory; the parameters stay with the model."""
        self.deepspeed.destroy()


@dataclass
class Fragment:
    """A contiguous piece of one parameter's optimizer state, as flat fp32 views."""

    start: int
    """First element, counted in the flattened parameter."""
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """() fp32: steps that Adam has taken."""


def deepspeed_config(settings: EngineSettings, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration; `num_elements` bounds the buckets, which it allocates in full."""
    bucket = max(2, min(50_000_000, num_elements + num_elements % 2))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.sequences_per_rank,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clip_norm,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            "overlap_comm": False,
        },
    }
    if settings.bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def _square(gradient: Tensor) -> Tensor:
    """() fp64: the sum of squares."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()


def _tag(parameter: nn.Parameter, group_name: str) -> None:
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = group_name  # type: ignore[attr-defined]
