"""A reference that needs no language model: what would the nearest training pictures be called?

Each candidate caption is scored by how much its words resemble the captions of the training
pictures that are nearest to the image in the frozen encoder's pooled, standardised features.

Shape letters: N training pairs, I held-out images, C candidate captions, F feature width.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_ext.analysis.heldout import Item
from moe_ext.analysis.reduce import Ranks
from moe_ext.analysis.retrieval import ranks_of_right, recall
from moe_ext.data.samples import SampleBuilder
from moe_ext.model.encoders import Encoder
from moe_ext.model.multimodal import MultimodalMoE

NEIGHBOURS = (1, 8)
"""Numbers of neighbours that are tried; the better one is reported, in the reference's favour."""


@torch.no_grad()
def pooled_features(
    model: MultimodalMoE, build: SampleBuilder, items: list[Item], ranks: Ranks, together: int = 16
) -> Tensor:
    """(I, F) fp32 features averaged over an image's tokens; ranks divide the images."""
    encoder = cast(Encoder, model.encoders[build.modality_id])
    device = next(encoder.parameters()).device
    pooled = torch.zeros(len(items), encoder.feature_dim)
    for rows, own in ranks.rows(len(items), together):
        pixels = torch.stack([build.image(items[row].raw) for row in rows[:own]]) if own else None
        if pixels is not None:
            features = model.features(build.modality_id, pixels.to(device))
            pooled[rows[:own]] = features.float().mean(1).cpu()
    return ranks.add(pooled)


def load_lookup(path: Path, decode: Callable[[list[int]], str]) -> tuple[Tensor, list[str]]:
    """Training features (N, F) and their captions, from the file that the connector's start left.

    The file holds `features` and `captions`: token ids, filled up with -1.
    """
    tensors = load_file(path)
    features, rows = tensors["features"].float(), tensors["captions"].tolist()
    captions = [decode([token for token in row if token >= 0]).strip() for row in rows]
    # the start may have read the stream for more than one epoch: each pair counts once
    pairs = zip(captions, (row.numpy().tobytes() for row in features), strict=True)
    kept = sorted({pair: i for i, pair in reversed(list(enumerate(pairs)))}.values())
    return features[kept], [captions[i] for i in kept]


def lookup_result(
    train_NF: Tensor, train_captions: list[str], image_IF: Tensor, captions: list[str]
) -> dict[str, Any]:
    """Retrieval image -> caption of the look-up, as JSON."""
    similarity_CN = caption_similarity(captions, train_captions)
    mean, std = train_NF.mean(0), train_NF.std(0).clamp_min(1e-6)
    train = torch.nn.functional.normalize((train_NF - mean) / std, dim=1)
    image = torch.nn.functional.normalize((image_IF - mean) / std, dim=1)
    near = (image @ train.t()).topk(min(max(NEIGHBOURS), len(train_captions)), dim=1)
    results = []
    for k in NEIGHBOURS:
        index_IK, weight_IK = near.indices[:, :k], near.values[:, :k].clamp(min=0).double()
        score_IC = (similarity_CN.t()[index_IK] * weight_IK.unsqueeze(2)).sum(1)
        results.append({"neighbours": k, **recall(ranks_of_right(score_IC))})
    best = max(results, key=lambda result: (result["at_1"], result["at_5"]))
    return {**best, "train_images": len(train_captions)}


def caption_similarity(captions: list[str], others: list[str]) -> Tensor:
    """(C, N) float64: cosine of words weighted by rarity, plus a tenth of that of letter triples.

    Rarity is measured on `others`. The triples tell captions apart that share no word.
    """
    words = _cosine([_words(c) for c in captions], [_words(c) for c in others])
    triples = _cosine([_triples(c) for c in captions], [_triples(c) for c in others])
    return words + 0.1 * triples


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _triples(text: str) -> list[str]:
    padded = f" {text.lower()} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


def _cosine(bags: list[list[str]], others: list[list[str]]) -> Tensor:
    seen = Counter(term for bag in others for term in set(bag))
    column = {term: i for i, term in enumerate(sorted(seen | Counter(t for b in bags for t in b)))}
    rarity = {t: math.log((1 + len(others)) / (1 + seen.get(t, 0))) + 1e-3 for t in column}

    def matrix(rows: list[list[str]]) -> Tensor:
        out = torch.zeros(len(rows), len(column), dtype=torch.float64)
        for r, bag in enumerate(rows):
            for term, count in Counter(bag).items():
                out[r, column[term]] = count * rarity[term]
        return torch.nn.functional.normalize(out, dim=1)

    return matrix(bags) @ matrix(others).t()
