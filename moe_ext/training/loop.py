"""The training loop: one function, top to bottom.

The loss of a step is the sum of its targets' negative log-likelihoods divided by their number over
all ranks and micro-batches, so it means the same for any number of both.
"""

import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.batch import Batch
from moe_ext.config import StageConfig
from moe_ext.data import Loader, Skip, TooManyBadSamples
from moe_ext.model.losses import balance_loss, router_kl, selection_counts, z_loss
from moe_ext.model.multimodal import Output
from moe_ext.training.audit import Audit
from moe_ext.training.bad_steps import why_bad
from moe_ext.training.engine import Engine
from moe_ext.training.publishing import Publisher
from moe_ext.training.signals import StopFlag
from moe_ext.training.tracking import Tracker

LOSSES = ("nll", "balance", "z", "router_kl")
"""Names of the parts of the loss, in the order of the loop."""
MODALITIES = ("text", "image")
"""Kinds of tokens that the counts tell apart: of text, and of any other modality."""


class TooManyBadSteps(RuntimeError):
    """Too many steps in a row were skipped: loss or gradient not finite, or a spike of either."""


@dataclass
class Position:
    """Where a stage stands; all of it is in its checkpoints."""

    step: int = 0
    """Finished steps."""
    bad_steps: int = 0
    """Skipped steps so far."""
    bad_in_a_row: int = 0
    tokens: int = 0
    """Tokens of all ranks so far, padding not counted."""
    elapsed_s: float = 0.0
    """Training time so far, over all starts."""
    recent: list[list[float]] = field(default_factory=list)
    """[loss, gradient norm] of the last `spike_window` steps that were taken, the newest last."""


def learning_rate_at(step: int, stage: StageConfig) -> float:
    """Linear warm-up over `warmup_share` of the steps, then a cosine; steps count from 0."""
    warmup = max(1, round(stage.warmup_share * stage.steps))
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    share = (step - warmup + 1) / (stage.steps - warmup + 1)  # the last step still moves
    floor = stage.final_learning_rate_share
    return stage.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def train(
    name: str,
    stage: StageConfig,
    engine: Engine,
    loader: Loader,
    tracker: Tracker,
    position: Position,
    save: Callable[[Position], None],
    stop: StopFlag,
    *,
    new_experts: dict[int, range],
    publisher: Publisher | None = None,
    audit: Audit | None = None,
    balance_choice: Callable[[dict[int, Tensor]], None] | None = None,
    log_every: int = 1,
    global_step: int = 0,
) -> bool:
    """Train from `position` to the stage's last step; False when asked to stop before.

    Every rank calls it with the same arguments but for the loader's share.

    Args:
        save: begins to publish a checkpoint; called every `stage.checkpoint_every` steps and when
            stopping.
        publisher: what `save` gives checkpoints to, which are written while training goes on.
        new_experts: layer -> ids of the experts that the run adds there.
        audit: looks at the first steps of this start.
        balance_choice: called after every step with layer -> how often each expert was chosen.
        global_step: steps of the stages before, so that W&B's steps never run backwards.

    Raises:
        TooManyBadSteps: more than `stage.max_bad_steps` in a row.
        TooManyBadSamples: more than `data.bad_sample_budget`, on all ranks in the same step.
        CheckpointError: some rank could not write, on all ranks at the same step.
    """
    device = engine.topology.device
    with_losses = balance_choice is not None or any(_coefficients(stage))
    batches = iter(loader)
    with tracker.progress(name, stage.steps, position.step) as show, tracker.watching():
        while position.step < stage.steps:
            began = time.perf_counter()
            # The step's micro-batches first: its targets must be counted before the first backward.
            micro_batches, wait_s = [], 0.0
            for _ in range(stage.accumulation):
                micro_batches.append(next(batches).to(device))
                wait_s += loader.wait_s
            sums = count_step(micro_batches, loader, wait_s, publisher, device)
            num_targets, num_tokens = sums.targets, sums.tokens
            check_bad_samples(loader, int(sums.new_skips))
            if publisher is not None:
                publisher.advance(sums.written)

            # Shares of the loss: over ranks and micro-batches they sum to the step's loss.
            choices: dict[int, Tensor] = {}
            shown = torch.zeros(4, dtype=torch.float64, device=device)
            logs = (position.step + 1) % log_every == 0 or position.step + 1 == stage.steps
            selections: dict[int, Tensor] = {}
            for batch in micro_batches:
                output: Output = engine(batch, None, with_losses)
                nll = output.nll_sum / max(num_targets, 1.0)
                routing = _router_losses(output, with_losses, stage.accumulation, choices)
                loss = _total(nll, routing, _coefficients(stage))
                if audit is not None:
                    audit.forward(batch, output, nll, loss)
                engine.backward(loss)
                shown += torch.stack([part.detach() for part in (nll, *routing)])
                if logs:
                    _add_selections(selections, output)

            if audit is not None:
                audit.backward()
            losses, part_norms, stops = step_numbers(shown, engine, stop.requested)
            nll_mean, norm = losses["nll"], math.hypot(*part_norms.values())
            bad = why_bad(nll_mean, norm, position.recent, stage.spike_sigmas, stage.spike_window)
            learning_rate = learning_rate_at(position.step, stage)
            taken, engine_norm = engine.step(learning_rate, drop=bool(bad))
            if audit is not None:
                audit.step(taken, engine_norm)
            if taken and balance_choice is not None:
                balance_choice(choices)

            tracker.alive()
            position.step += 1
            position.tokens += int(num_tokens)
            bad = bad or ("" if taken else "gradient not finite")
            count_bad_steps(bad, nll_mean, norm, name, stage, position, tracker)
            if logs:
                experts = _expert_metrics(selections, new_experts)
                took_s = time.perf_counter() - began
                record: dict[str, Any] = {
                    "stage": name,
                    "step": position.step,
                    "time_s": position.elapsed_s + took_s,
                    "step_s": took_s,
                    "loss": losses if with_losses else {"nll": losses["nll"]},
                    "grad_norm": norm,
                    "grad_norm_by_part": part_norms,
                    "learning_rate": learning_rate,
                    "tokens_per_s": num_tokens / took_s,
                    "data_wait_s": sums.wait_s / engine.topology.world_size,
                    "real_token_share": num_tokens / sums.positions,
                    "truncated_samples": int(sums.truncated),
                    "skipped": position.bad_steps,
                    **experts,
                }
                tracker.step(record, global_step + position.step)
                show(position.step, f"loss {nll_mean:.3f}  {num_tokens / took_s:,.0f} tokens/s")
            position.elapsed_s += time.perf_counter() - began

            last = position.step == stage.steps
            due = stage.checkpoint_every and position.step % stage.checkpoint_every == 0
            if (due or stops) and not last:
                save(position)
            if stops and not last:
                if publisher is not None:
                    publisher.wait()
                tracker.say(f"[{name}] stopped on request after step {position.step}, published")
                return False
    return True


@dataclass
class StepCounts:
    """What a step's micro-batches hold and what their loading brought, summed over ranks."""

    targets: float
    tokens: float
    positions: float
    """Tokens and padding."""
    new_skips: float
    """Bad samples since this start."""
    truncated: float
    """Samples cut to the length limit since this start."""
    wait_s: float
    written: float
    """Ranks that have done their share of the checkpoint under way."""


def count_step(
    micro_batches: list[Batch],
    loader: Loader,
    wait_s: float,
    publisher: Publisher | None,
    device: torch.device,
) -> StepCounts:
    """A step's counts over all ranks. A collective."""
    own = StepCounts(
        targets=sum(batch.num_targets for batch in micro_batches),
        tokens=sum(batch.num_tokens for batch in micro_batches),
        positions=sum(batch.input_ids.numel() for batch in micro_batches),
        new_skips=loader.num_new_skips,
        truncated=loader.num_truncated,
        wait_s=wait_s,
        written=publisher.vote if publisher is not None else 0.0,
    )
    return StepCounts(*sum_over_ranks([float(n) for n in astuple(own)], device))


def check_bad_samples(loader: Loader, num_new_skips: int) -> None:
    """Stops all ranks alike once they have left out too many samples together. A collective.

    Args:
        num_new_skips: `loader.num_new_skips` summed over ranks, so that all decide the same.

    Raises:
        TooManyBadSamples: the same on every rank.
    """
    if not loader.over_budget(num_new_skips):
        return
    logs: list[list[Skip]] = [[]] * dist.get_world_size()
    dist.all_gather_object(logs, loader.skips)
    last = max((skip for log in logs for skip in log), key=lambda skip: skip.position)
    count = loader.num_restored + num_new_skips
    raise TooManyBadSamples(count, loader.bad_sample_budget, last)


def step_numbers(
    shares: Tensor, engine: Engine, stop_requested: bool = False
) -> tuple[dict[str, float], dict[str, float], bool]:
    """A step's losses by name, its gradient's norms by part, and whether the run is to stop after it.

    A collective between backward and step: what decides whether the step is taken and whether it is the
    last, equal on all ranks. A request that comes before it ends the run with this step.

    Args:
        shares: (4,) fp64, this rank's shares of LOSSES.
        stop_requested: whether this rank was asked to stop.
    """
    asked = shares.new_tensor([float(stop_requested)])
    together = torch.cat([shares, engine.part_squares(), asked])
    dist.all_reduce(together)
    numbers = together.tolist()  # the device is waited for once
    squares, votes = numbers[len(LOSSES) : -1], numbers[-1]
    of_part = dict.fromkeys(engine.parts, 0.0)  # a part may have a group a precision
    for part, square in zip(engine.parts, squares, strict=True):
        of_part[part] += square
    return (
        dict(zip(LOSSES, numbers[: len(LOSSES)], strict=True)),
        {part: math.sqrt(square) for part, square in of_part.items()},
        votes > 0,
    )


def count_bad_steps(
    reason: str,
    loss: float,
    norm: float,
    name: str,
    stage: StageConfig,
    position: Position,
    tracker: Tracker,
) -> None:
    """Note that a step was taken, or with a `reason` that it was not; the same on all ranks.

    Raises:
        TooManyBadSteps: more than `stage.max_bad_steps` in a row were not.
    """
    if not reason:
        position.bad_in_a_row = 0
        position.recent = [*position.recent, [loss, norm]][-stage.spike_window :]
        return
    position.bad_in_a_row += 1
    position.bad_steps += 1
    tracker.event(
        "skipped_step", stage=name, step=position.step, reason=reason, nll=loss, grad_norm=norm
    )
    tracker.say(f"[{name}] step {position.step}: {reason}; step skipped")
    if position.bad_in_a_row > stage.max_bad_steps:
        raise TooManyBadSteps(
            f"stage {name}: {position.bad_in_a_row} steps in a row were skipped, more than "
            f"stages.{name}.max_bad_steps={stage.max_bad_steps}; the last because: {reason}. Lower "
            f"stages.{name}.learning_rate={stage.learning_rate}, look at the data around step "
            f"{position.step}, or, where the run is healthy, raise "
            f"stages.{name}.spike_sigmas={stage.spike_sigmas:g} (0: only what is not finite is skipped)"
        )


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def _coefficients(stage: StageConfig) -> tuple[float, float, float]:
    """Weights of the parts of the loss after the first, in the order of LOSSES."""
    return stage.balance_coefficient, stage.z_coefficient, stage.router_kl_coefficient


def _total(nll: Tensor, routing: tuple[Tensor, ...], coefficients: tuple[float, ...]) -> Tensor:
    """The weighted sum, added up from left to right."""
    for coefficient, part in zip(coefficients, routing, strict=True):
        nll = nll + coefficient * part
    return nll


def _router_losses(
    output: Output, wanted: bool, accumulation: int, choices: dict[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of balance loss, z-loss and router KL, means over layers and micro-batches.

    Every layer is normalised by its own number of experts, the KL is a mean over the layers with new
    experts. One reduction of all layers' counts, which are added to `choices` by layer.
    """
    zero = output.nll_sum.detach().new_zeros(())
    if not wanted:
        return zero, zero, zero
    records = output.context.records
    counts = [selection_counts(record) for record in records.values()]
    together = torch.cat(counts)
    dist.all_reduce(together)
    balance, z, kl = zero, zero, []
    lengths = [len(count) for count in counts]
    for (layer, record), counted in zip(records.items(), together.split(lengths), strict=True):
        assert record.prob_sum_X is not None
        assert record.z_sum is not None
        balance = balance + balance_loss(record.prob_sum_X, counted)
        z = z + z_loss(record.z_sum, counted[-1])
        if (divergence := router_kl(record, counted[-1])) is not None:
            kl.append(divergence)
        choices[layer] = choices.get(layer, 0) + counted[:-1]
    share = 1.0 / (len(records) * accumulation)
    mean_kl = torch.stack(kl).mean() / accumulation if kl else zero
    return balance * share, z * share, mean_kl


def _add_selections(selections: dict[int, Tensor], output: Output) -> None:
    """Add a micro-batch's choices to (text or not, expert) counts by layer."""
    is_new_T = (output.context.modality_BS.reshape(-1) != 0).long()
    for layer, record in output.context.records.items():
        selections[layer] = selections.get(layer, 0) + record.counts_by_kind(is_new_T, 2)


def _expert_metrics(selections: dict[int, Tensor], new_experts: dict[int, range]) -> dict[str, Any]:
    """Load, entropy and new experts' shares, over all ranks' tokens. One reduction.

    `expert_load` is the busiest expert's share times the number of experts (1.0 is even);
    `expert_entropy` is relative to the even distribution's; both by layer, and by layer in `text` and
    `image`, over these tokens alone. `new_share` is the share of the choices of text tokens and of
    image tokens, in extended layers, that went to new experts: for text it says how far the base's own
    routing was displaced. `new_expert_share` holds each new expert's share of its layer's choices.
    """
    layers = sorted(selections)
    together = torch.cat([selections[layer].reshape(-1) for layer in layers])
    dist.all_reduce(together)
    split = together.split([selections[layer].numel() for layer in layers])
    kinds = {name: {"load": {}, "entropy": {}} for name in ("all", *MODALITIES)}
    new_by_layer: dict[str, dict[int, float]] = {name: {} for name in MODALITIES}
    new_expert_share: dict[int, list[float]] = {}
    new, all_ = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for layer, flat in zip(layers, split, strict=True):
        count_MX = flat.view(2, -1).double().cpu()
        count_KX = torch.cat([count_MX.sum(0, keepdim=True), count_MX])  # K: all, then modalities
        share_KX = count_KX / count_KX.sum(1, keepdim=True).clamp(min=1)
        num_experts = share_KX.shape[1]
        loads = (share_KX.amax(1) * num_experts).tolist()
        entropy_K = torch.special.entr(share_KX).sum(1) / max(math.log(num_experts), 1e-9)
        for kind, load, entropy in zip(kinds.values(), loads, entropy_K.tolist(), strict=True):
            kind["load"][layer], kind["entropy"][layer] = load, entropy
        if own := new_experts[layer]:
            new_KX = share_KX[:, own.start : own.stop]
            new_expert_share[layer] = new_KX[0].tolist()
            for name, share in zip(MODALITIES, new_KX[1:].sum(1).tolist(), strict=True):
                new_by_layer[name][layer] = share
            new += count_MX[:, own.start : own.stop].sum(1)
            all_ += count_MX.sum(1)
    whole = kinds.pop("all")
    metrics: dict[str, Any] = {"expert_load": whole["load"], "expert_entropy": whole["entropy"]}
    for name in MODALITIES:
        metrics[name] = kinds[name] | (
            {"new_share": new_by_layer[name]} if new_expert_share else {}
        )
    if new_expert_share:
        shares = (new / all_.clamp(min=1)).tolist()
        metrics["new_share"] = dict(zip(MODALITIES, shares, strict=True))
        metrics["new_expert_share"] = new_expert_share
    return metrics
