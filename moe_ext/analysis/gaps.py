"""One pass over the probe's samples: selections, and how near each expert's clone is to being chosen.

A clone of expert e's router row with a bias b of its own has the logit l_e + b. It enters a token's
top-k when that beats the lowest chosen score, so its gap, the bias it needs, is a number a token that
can be measured before any clone exists.

Shape letters: E frozen experts, T tokens, U tokens of the modality, K top_k, D hidden width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.analysis.reduce import Ranks
from moe_ext.analysis.selections import Selections, count_selections
from moe_ext.batch import Batch
from moe_ext.model.moe import extended_layers
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.model.routing import Router

TIE_MARGIN = 0.05
"""Logits: a clone's distance to a tie with its source, more than bf16 products differ by."""


@dataclass
class Gaps:
    """How far each expert's clone is from being chosen, on this rank's tokens of one modality."""

    gap_TE: Tensor
    """fp32: the smallest bias, in logits, with which a clone of expert e's row would be chosen."""
    last_T: Tensor
    """int64: the chosen expert that it would displace, the one with the lowest score."""


@dataclass
class Measured:
    """What one pass over the probe's samples gives: counts over all ranks, gaps of this rank."""

    selections: Selections
    gaps: dict[int, Gaps] = field(default_factory=dict)
    mean_input: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> (D,) fp32: mean router input of the modality's tokens, over all ranks
    (`extension.row_init=domain`)."""


@dataclass
class _Seen:
    """What the hook of one layer has gathered on this rank."""

    gaps: list[Gaps] = field(default_factory=list)
    tokens: int = 0
    input_sum_D: Tensor | None = None


def measure(
    model: MultimodalMoE,
    batches: Iterable[Batch],
    *,
    modality: int | None = None,
    ranks: Ranks | None = None,
    max_tokens: int = 8192,
) -> Measured:
    """Selections, and gaps on the tokens of `modality` when it is given (at most `max_tokens` a rank).

    A collective: equally many batches on every rank. Measure gaps on the aligned model, without a
    router delta: its rows are what will be cloned.
    """
    ranks = ranks or Ranks()
    with _router_watched(model, modality, max_tokens) as seen:
        selections = count_selections(model, batches, ranks)
    gaps = {layer: _joined(of.gaps) for layer, of in seen.items() if of.gaps}
    return Measured(selections, gaps, _mean_inputs(model, seen, ranks))


def bias_for(gap_T: Tensor, affected_share: float) -> float:
    """A bias with which as many tokens choose the clone as `affected_share` allows, and no more.

    A clone is chosen where its bias is above the gap, so the bias lies midway between two neighbours
    of the sorted gaps. Tokens whose last choice is the source itself have a gap of exactly zero: where
    not all of them may choose the clone, none does, by a margin that survives rounding.
    """
    ordered = gap_T.double().sort().values
    count = int(affected_share * len(ordered) + 1e-9)
    if count >= len(ordered):
        return float(ordered[-1]) + 1.0
    above = float(ordered[count])
    below = ordered[ordered < above]
    bias = (float(below[-1]) + above) / 2 if len(below) else above - 1.0
    tied = above == 0.0 and count > len(below)
    return min(bias, -TIE_MARGIN) if tied else bias


def logit_gaps(router: Router, logits_TE: Tensor, chosen_TK: Tensor) -> Gaps:
    """Gaps of every expert's clone: it enters when its choice score beats the lowest chosen one.

    Scores are logits in softmax families. With a correction, a clone has its source's: the score it
    needs is turned back into a logit. Softmax with a correction uses the normaliser without the
    clone, an approximation that the measured shares show.
    """
    rule, correction = router.rule, router.correction_bias
    if rule.score == "sigmoid":
        score_TE = logits_TE.sigmoid()
    elif correction is None:
        score_TE = logits_TE
    else:
        score_TE = logits_TE.softmax(-1)
    correction_E = torch.zeros_like(logits_TE[0]) if correction is None else correction.float()
    lowest_T1, slot_T1 = (score_TE + correction_E).gather(1, chosen_TK).min(1, keepdim=True)
    needed_TE = lowest_T1 - correction_E
    if rule.score == "sigmoid":
        needed_TE = needed_TE.clamp(0.0, 1.0).logit()  # 0 and 1 become -inf and inf
    elif correction is not None:
        needed_TE = needed_TE.clamp(min=0.0).log() + logits_TE.logsumexp(-1, keepdim=True)
    last_T1 = chosen_TK.gather(1, slot_T1)
    # the clone of the last chosen expert ties with it: exactly zero, whatever the turning back rounds
    gap_TE = (needed_TE - logits_TE).scatter(1, last_T1, 0.0)
    return Gaps(gap_TE, last_T1.squeeze(1))


def gather_gaps(
    gaps: dict[int, Gaps], sources: dict[int, list[int]], ranks: Ranks
) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> (gaps of its sources (T, N), displaced expert (T,)) of all ranks' tokens.

    Ranks lay their own into a block of zeros and add up, so that one reduction does.
    """
    if not gaps and ranks.size == 1:
        return {}
    width = 1 + max(len(experts) for experts in sources.values())
    length = torch.zeros(ranks.size, dtype=torch.int64)
    length[ranks.rank] = max((len(g.last_T) for g in gaps.values()), default=0)
    length = ranks.add(length)
    if int(length.sum()) == 0:
        return {}
    block = torch.zeros(ranks.size, len(sources), int(length.max()), width, dtype=torch.float64)
    for i, (layer, experts) in enumerate(sources.items()):
        if layer in gaps:
            own = gaps[layer]
            columns = torch.cat([own.gap_TE[:, experts], own.last_T.unsqueeze(1)], 1).double()
            block[ranks.rank, i, : len(columns), : columns.shape[1]] = columns
    # infinite gaps (a clone that cannot enter) survive a sum with zeros
    block = ranks.add(block)
    found = {}
    for i, (layer, experts) in enumerate(sources.items()):
        rows = torch.cat([block[r, i, : int(length[r])] for r in range(ranks.size)])
        found[layer] = (rows[:, : len(experts)], rows[:, len(experts)].long())
    return found


@contextmanager
def _router_watched(
    model: MultimodalMoE, modality: int | None, max_tokens: int
) -> Iterator[dict[int, _Seen]]:
    """Inside, every pass adds each layer's gaps and inputs of the tokens of the modality."""
    seen: dict[int, _Seen] = {}
    handles = []

    def watch(router: Router, args: tuple[Any, ...], _: Any) -> None:
        x_TD, context, layer = args
        of, of_T = seen[layer], (context.modality_BS.reshape(-1) == modality) & context.valid_T
        token_U = of_T.nonzero().squeeze(1)[: max(max_tokens - of.tokens, 0)]
        if len(token_U) == 0:
            return
        x_UD = x_TD[token_U].float()
        bias = None if router.frozen_bias is None else router.frozen_bias.float()
        logits = F.linear(x_UD, router.frozen_weight.float(), bias)
        # beside a finished extension: what a clone competes with at most, the frozen rows' own choice
        chosen_UK = context.records[layer].base_expert_TK[token_U]
        part = logit_gaps(router, logits, chosen_UK)
        of.gaps.append(Gaps(part.gap_TE.cpu(), part.last_T.cpu()))
        of.tokens += len(token_U)
        total = x_UD.double().sum(0).cpu()
        of.input_sum_D = total if of.input_sum_D is None else of.input_sum_D + total

    if modality is not None:
        for index, layer in extended_layers(model.lm).items():
            seen[index] = _Seen()
            handles.append(layer.router.register_forward_hook(watch))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _mean_inputs(model: MultimodalMoE, seen: dict[int, _Seen], ranks: Ranks) -> dict[int, Tensor]:
    """Layer -> (D,) mean over all ranks' tokens. A collective of one reduction."""
    if not seen:
        return {}
    dim = next(iter(extended_layers(model.lm).values())).router.frozen_weight.shape[1]
    total_LD = torch.zeros(len(seen), dim + 1, dtype=torch.float64)
    for i, of in enumerate(seen.values()):
        if of.input_sum_D is not None:
            total_LD[i, :dim], total_LD[i, dim] = of.input_sum_D, of.tokens
    total_LD = ranks.add(total_LD)
    return {
        layer: (total_LD[i, :dim] / total_LD[i, dim]).float()
        for i, layer in enumerate(seen)
        if total_LD[i, dim]
    }


def _joined(parts: list[Gaps]) -> Gaps:
    return Gaps(torch.cat([p.gap_TE for p in parts]), torch.cat([p.last_T for p in parts]))
