"""Retrieval among held-out captions and images, from the matrix of a caption's nats given an image.

Shape letters: I images, C captions (caption c belongs to image c), S positions of a tree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ext.analysis.heldout import Item, captioned, require_prompt
from moe_ext.analysis.reduce import Ranks
from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.data.samples import SampleBuilder
from moe_ext.model.multimodal import MultimodalMoE

SCORE = "nats minus the caption's mean over images"
"""How image -> caption is made fair to captions of different length and frequency."""


@dataclass
class Tree:
    """One image's prompt with many captions as branches that do not see each other.

    Every branch starts with its own copy of the prompt's last token, since that position predicts
    the caption's first token; its positions restart there. So each caption is scored exactly as in
    a sequence of its own, and the image is computed once.
    """

    input_ids: Tensor
    """(S,)"""
    labels: Tensor
    """(S,)"""
    modality_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    """(S,) int64: which caption, -1 on what they share."""
    mask: Tensor
    """(S, S) bool: who sees whom."""


def caption_tree(build: SampleBuilder, captions: list[str]) -> Tree:
    """The tree of some captions; the image's tokens are placeholders.

    Raises:
        ValueError: data.prompt is empty.
    """
    blank = [(build.modality_id, torch.empty(0))]
    samples = [captioned(build, caption, blank) for caption in captions]
    shared = require_prompt(samples[0]) - 1
    parts = [
        (
            samples[0].input_ids[:shared],
            samples[0].labels[:shared],
            samples[0].modality_ids[:shared],
        )
    ]
    position, branch = [torch.arange(shared)], [torch.full((shared,), -1)]
    for c, sample in enumerate(samples):
        assert torch.equal(sample.input_ids[:shared], samples[0].input_ids[:shared])
        end = len(sample) - 1  # the end token is a target, never an input
        parts.append(
            (
                sample.input_ids[shared:end],
                sample.labels[shared:end],
                sample.modality_ids[shared:end],
            )
        )
        position.append(torch.arange(shared, end))
        branch.append(torch.full((end - shared,), c))
    ids, labels, modality = (torch.cat(column) for column in zip(*parts, strict=True))
    branch_S = torch.cat(branch)
    sees = (branch_S.unsqueeze(0) == -1) | (branch_S.unsqueeze(0) == branch_S.unsqueeze(1))
    return Tree(ids, labels, modality, torch.cat(position), branch_S, sees.tril())


def tree_batch(tree: Tree, modality: int, media: list[Tensor]) -> tuple[Batch, Tensor]:
    """The same tree under several images, one a row, and its attention mask (B, 1, S, S)."""
    num = len(media)

    def rows(column: Tensor) -> Tensor:
        return column.expand(num, -1).contiguous()

    batch = Batch(
        input_ids=rows(tree.input_ids),
        labels=rows(tree.labels),
        modality_ids=rows(tree.modality_ids),
        segment_ids=torch.ones(num, len(tree.input_ids), dtype=torch.int64),
        position_ids=rows(tree.position_ids),
        media={modality: torch.stack(media)},
    )
    return batch, tree.mask.expand(num, 1, -1, -1)


@torch.no_grad()
def nll_matrix(
    model: MultimodalMoE,
    build: SampleBuilder,
    items: list[Item],
    *,
    ranks: Ranks | None = None,
    images_per_pass: int = 4,
    captions_per_tree: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(I, C) float64: nats of caption c and its end token, given image i.

    A collective: ranks divide the images and make equally many passes.
    """
    ranks, device = ranks or Ranks(), next(model.parameters()).device
    captions = [item.caption for item in items]
    trees = [
        (first, caption_tree(build, captions[first : first + captions_per_tree]))
        for first in range(0, len(captions), captions_per_tree)
    ]
    nll_IC = torch.zeros(len(items), len(captions), dtype=torch.float64)
    was_training = model.training
    model.eval()
    groups = ranks.rows(len(items), images_per_pass)
    for done, (rows, own) in enumerate(groups):
        media = [build.image(items[row].raw) for row in rows]
        for first, tree in trees:
            batch, mask = tree_batch(tree, build.modality_id, media)
            output = model(batch.to(device), mask.to(device))
            target_Z = output.target_Z.cpu()
            image_Z = target_Z // len(tree.branch)
            caption_Z = first + tree.branch[target_Z % len(tree.branch)]
            kept_Z = image_Z < own
            at_Z = torch.tensor(rows)[image_Z[kept_Z]], caption_Z[kept_Z]
            nll_IC.index_put_(at_Z, output.nll_Z.double().cpu()[kept_Z], accumulate=True)
        if progress:
            progress(done + 1, len(groups))
    model.train(was_training)
    return ranks.add(nll_IC)


def target_counts(build: SampleBuilder, items: list[Item]) -> Tensor:
    """(C,) int64: target tokens of every caption, its end token included."""
    blank = [(build.modality_id, torch.empty(0))]
    counts = [(captioned(build, i.caption, blank).labels != IGNORED_LABEL).sum() for i in items]
    return torch.stack(counts)


def ranks_of_right(score_QA: Tensor) -> Tensor:
    """(Q,) int64: rank of answer q for query q, 1 the best; an equal score counts as better.

    A higher score is better. Ties against the right answer, so that a constant model gets nothing.
    """
    right_Q1 = score_QA.diagonal().unsqueeze(1)
    return (score_QA >= right_Q1).sum(1)


def recall(rank_Q: Tensor) -> dict[str, float]:
    """Share of queries whose right answer is among the first 1 and 5, with standard errors."""
    result = {}
    for k in (1, 5):
        share = float((rank_Q <= k).double().mean())
        result[f"at_{k}"] = share
        result[f"at_{k}_error"] = (share * (1 - share) / len(rank_Q)) ** 0.5
    return result


def fair_scores(nll_IC: Tensor) -> Tensor:
    """(I, C): how much likelier image i makes caption c than the average image does, in nats.

    The caption's own length and frequency cancel: what is left is what the image says about it.
    """
    return nll_IC.mean(0, keepdim=True) - nll_IC


def retrieval_result(nll_IC: Tensor, tokens_C: Tensor) -> dict[str, Any]:
    """The result of one split as JSON; `image_to_caption` is the length-fair headline.

    `caption_to_image` compares one caption's nats under all images and needs no correction.
    `per_token` and `raw` are image -> caption by nats a token and by plain nats.
    """
    num = nll_IC.shape[0]
    score_IC = fair_scores(nll_IC)
    off = ~torch.eye(num, dtype=torch.bool)
    right_C = nll_IC.diagonal()
    wrong = nll_IC[off].view(num, -1).mean(1) if num > 1 else right_C
    gap_I = wrong - right_C
    return {
        "candidates": num,
        "score": SCORE,
        "image_to_caption": recall(ranks_of_right(score_IC)),
        "caption_to_image": recall(ranks_of_right(-nll_IC.t())),
        "per_token": recall(ranks_of_right(-nll_IC / tokens_C)),
        "raw": recall(ranks_of_right(-nll_IC)),
        "nll_right": float(right_C.mean()),
        "nll_right_error": float(right_C.std() / num**0.5),
        "nll_wrong": float(wrong.mean()),
        "gap_error": float(gap_I.std() / num**0.5),
        "tokens_a_caption": float(tokens_C.double().mean()),
        "score_IC": [[round(v, 2) for v in row] for row in score_IC.tolist()],
    }
