"""Retrieval among held-out captions and images, from the matrix of a caption's nats given an image.

Shape letters: I images, C captions (caption c belongs to image c), S positions of a
tree, Z its edges, U positions with an edge.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ext.analysis.heldout import Item, captioned, prompt_length
from moe_ext.analysis.passes import hidden_states
from moe_ext.analysis.reduce import Ranks
from moe_ext.batch import IGNORED_LABEL, TEXT, Batch
from moe_ext.data.batches import collate
from moe_ext.data.samples import SampleBuilder
from moe_ext.model.masks import takes_masks
from moe_ext.model.multimodal import MultimodalMoE

SCORE = "log p(caption | image) - log p(caption), p(caption) averaged over the candidate images"
"""How image -> caption is made fair to captions of different length and frequency: Bayes' rule."""


@dataclass
class Tree:
    """One image and prompt with many captions as branches, which share what they have in common.

    A position sees its ancestors alone and counts its own depth, so each caption is scored exactly
    as in a sequence of its own, and what captions share is computed once.
    """

    input_ids: Tensor
    """(S,)"""
    modality_ids: Tensor
    position_ids: Tensor
    """(S,) int64: depth."""
    mask: Tensor
    """(S, S) bool: who sees whom."""
    edges: Tensor
    """(Z, 3) int64: position, token that shall follow it, caption that says so."""


def caption_tree(build: SampleBuilder, captions: list[str]) -> Tree:
    """The tree of some captions; the image's tokens are placeholders."""
    blank = [(build.modality_id, torch.empty(0))]
    samples = [captioned(build, caption, blank) for caption in captions]
    shared = prompt_length(samples[0])
    ids, modality = (
        samples[0].input_ids[:shared].tolist(),
        samples[0].modality_ids[:shared].tolist(),
    )
    parent, edges = list(range(-1, shared - 1)), []
    child: dict[tuple[int, int], int] = {}
    for c, sample in enumerate(samples):
        assert sample.input_ids[:shared].tolist() == ids[:shared]
        at = shared - 1
        tokens = sample.labels[at:-1].tolist()  # the caption and the end token
        for token in tokens:
            edges.append((at, token, c))
            if (at, token) not in child and token != build.eos_id:
                child[at, token] = len(ids)
                ids.append(token)
                modality.append(TEXT)
                parent.append(at)
            at = child.get((at, token), -1)
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for position, above in enumerate(parent):
        if above >= 0:
            mask[position] = mask[above]
        mask[position, position] = True
    depth = mask.sum(1) - 1
    return Tree(torch.tensor(ids), torch.tensor(modality), depth, mask, torch.tensor(edges))


def tree_batch(tree: Tree, modality: int, media: list[Tensor]) -> tuple[Batch, Tensor]:
    """The same tree under several images, one a row, and its attention mask (B, 1, S, S)."""
    num = len(media)

    def rows(column: Tensor) -> Tensor:
        return column.expand(num, -1).contiguous()

    batch = Batch(
        input_ids=rows(tree.input_ids),
        labels=torch.full((num, len(tree.input_ids)), IGNORED_LABEL),
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
    images_per_pass: int = 2,
    captions_per_pass: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(I, C) float64: nats of caption c and its end token, given image i.

    A collective: ranks divide the images and make equally many passes.
    """
    ranks, device = ranks or Ranks(), next(model.parameters()).device
    captions = [item.caption for item in items]
    chunks = [
        (first, captions[first : first + captions_per_pass])
        for first in range(0, len(captions), captions_per_pass)
    ]
    if takes_masks(model.lm.config):
        trees = {first: caption_tree(build, chunk) for first, chunk in chunks}
    else:
        trees = {}  # a recurrent layer would carry one branch's state into the next
    nll_IC = torch.zeros(len(items), len(captions), dtype=torch.float64)
    was_training = model.training
    model.eval()
    groups = ranks.rows(len(items), images_per_pass)
    for done, (rows, own) in enumerate(groups):
        media = [build.image(items[row].raw) for row in rows]
        for first, chunk in chunks:
            if first in trees:
                nll_BC = _tree_nll(model, trees[first], build.modality_id, media, device)
            else:
                nll_BC = torch.stack(
                    [_plain_nll(model, build, one, chunk, device) for one in media]
                )
            nll_IC[rows[:own], first : first + len(chunk)] = nll_BC[:own]
        if progress:
            progress(done + 1, len(groups))
    model.train(was_training)
    return ranks.add(nll_IC)


def _tree_nll(
    model: MultimodalMoE, tree: Tree, modality: int, media: list[Tensor], device: torch.device
) -> Tensor:
    """(B, C) float64 of some images and the tree's captions, in one pass."""
    batch, mask = tree_batch(tree, modality, media)
    hidden_BSD = hidden_states(model, batch.to(device), mask.to(device))
    edges = tree.edges.to(device)
    nll_BC = torch.zeros(len(media), int(tree.edges[:, 2].max()) + 1, dtype=torch.float64)
    for hidden_SD, nll_C in zip(hidden_BSD, nll_BC, strict=True):
        nll_C.index_add_(0, tree.edges[:, 2], _edge_nll(model, hidden_SD, edges).double().cpu())
    return nll_BC


def _plain_nll(
    model: MultimodalMoE,
    build: SampleBuilder,
    media: Tensor,
    captions: list[str],
    device: torch.device,
) -> Tensor:
    """(C,) float64 of one image and some captions, each a sequence of its own, in one pass."""
    samples = [captioned(build, caption, [(build.modality_id, media)]) for caption in captions]
    batch = collate([[sample] for sample in samples], pad_id=build.pad_id)
    output = model(batch.to(device))
    row_Z = output.target_Z.cpu() // batch.input_ids.shape[1]
    nll_C = torch.zeros(len(captions), dtype=torch.float64)
    return nll_C.index_add_(0, row_Z, output.nll_Z.double().cpu())


def _edge_nll(model: MultimodalMoE, hidden_SD: Tensor, edges: Tensor) -> Tensor:
    """(Z,) fp32 nats of every edge; a position's distribution is computed once."""
    position_U, place_Z = edges[:, 0].unique(return_inverse=True)
    logits_UV = model.logits(hidden_SD[position_U]).float()
    return logits_UV.logsumexp(1)[place_Z] - logits_UV[place_Z, edges[:, 1]]


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
    """(I, C): log p(c | i) - log p(c), where p(c) is the mean of p(c | i) over the candidate images.

    Up to a constant the posterior of image i given caption c, each image being equally likely before.
    A caption's own length and frequency cancel: what is left is what the image says about it.
    """
    log_marginal_C = (-nll_IC).logsumexp(0) - math.log(nll_IC.shape[0])
    return -nll_IC - log_marginal_C


def retrieval_result(nll_IC: Tensor, tokens_C: Tensor) -> dict[str, Any]:
    """The result of one split as JSON; `image_to_caption` is the length-fair headline.

    `caption_to_image` compares one caption's nats under all images and needs no correction.
    Image -> caption by other scores: `centred` (nats minus the caption's mean over images),
    `per_token` (nats a token) and `raw` (plain nats, which prefer short captions).
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
        "centred": recall(ranks_of_right(nll_IC.mean(0) - nll_IC)),
        "per_token": recall(ranks_of_right(-nll_IC / tokens_C)),
        "raw": recall(ranks_of_right(-nll_IC)),
        "nll_right": float(right_C.mean()),
        "nll_right_error": float(right_C.std() / num**0.5),
        "nll_wrong": float(wrong.mean()),
        "gap_error": float(gap_I.std() / num**0.5),
        "tokens_a_caption": float(tokens_C.double().mean()),
        "score_IC": [[round(v, 2) for v in row] for row in score_IC.tolist()],
    }
