"""What a model can do on held-out data: retrieval, written captions, text, and who does the work.

Every function here is a collective: under expert parallelism all ranks call it with the same items
and make the same number of passes; ranks divide the rows and add up once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_ext.analysis.heldout import Item, load_items, pair_batch, prompt_batch, thumbnail
from moe_ext.analysis.lookup import lookup_result, pooled_features
from moe_ext.analysis.reduce import Ranks
from moe_ext.analysis.retrieval import (
    fair_scores,
    nll_matrix,
    ranks_of_right,
    retrieval_result,
    target_counts,
)
from moe_ext.analysis.selections import count_selections
from moe_ext.analysis.text import open_to_text, text_batch, text_loss
from moe_ext.data.manifest import Manifest
from moe_ext.data.samples import SampleBuilder
from moe_ext.model.multimodal import MultimodalMoE

HELDOUT_SPLITS = ("heldout", "heldout_concept")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, passes done and passes in all."""


def evaluate(
    model: MultimodalMoE,
    build: SampleBuilder,
    manifest: Manifest,
    text_ids_RS: torch.Tensor,
    *,
    candidates: int = 60,
    captions: int = 12,
    splits: Sequence[str] = HELDOUT_SPLITS,
    lookup: tuple[torch.Tensor, list[str]] | None = None,
    extension: str | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Parts of evaluation.json for a trained model (`run_folder.py` has their schema).

    Args:
        candidates: pairs of a split that retrieval tells apart.
        captions: pictures of each split in the gallery; a caption is written for every candidate.
        splits: names in the manifest; those it lacks are left out.
        lookup: pooled features (N, F) of training images and their captions, for the reference.
        extension: the one that is opened to text for `text_joint`; None: all there are.
    """
    ranks = ranks or Ranks()
    items_of = {
        split: load_items(manifest, split, candidates)
        for split in splits
        if split in manifest.split_names
    }
    parts: dict[str, Any] = {"gallery": []}
    for split, items in items_of.items():
        result, shots = evaluate_split(
            model, build, items, split, ranks=ranks, captions=captions, progress=progress
        )
        if lookup is not None:
            features = pooled_features(model, build, items, ranks)
            result["nearest_neighbour"] = lookup_result(
                *lookup, features, [i.caption for i in items]
            )
        parts[split] = result
        parts["gallery"] += shots
    parts["text_after"] = text_loss(model, text_ids_RS, ranks, progress=_named(progress, "text"))
    with open_to_text(model, extension):
        parts["text_joint"] = text_loss(
            model, text_ids_RS, ranks, progress=_named(progress, "text, opened")
        )
    items = next(iter(items_of.values()), [])
    use = expert_use(
        model, build, items, text_ids_RS[:4], ranks, progress=_named(progress, "use of experts")
    )
    parts["experts"] = {"trained": use}
    return parts


def evaluate_split(
    model: MultimodalMoE,
    build: SampleBuilder,
    items: list[Item],
    split: str,
    *,
    ranks: Ranks | None = None,
    captions: int = 12,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Retrieval and written captions of one split, and its pictures for the gallery."""
    ranks = ranks or Ranks()
    nll_IC = nll_matrix(
        model, build, items, ranks=ranks, progress=_named(progress, f"{split}, retrieval")
    )
    tokens_C = target_counts(build, items)
    result = retrieval_result(nll_IC, tokens_C)
    longest = int(tokens_C.max())
    written = write_captions(
        model,
        build,
        items,
        ranks=ranks,
        max_new_tokens=longest + 2,
        progress=_named(progress, f"{split}, captions"),
    )
    exact = [w == item.caption for w, item in zip(written, items, strict=True)]
    result |= {"exact_captions": sum(exact), "captions_written": len(items)}
    rank_I = ranks_of_right(fair_scores(nll_IC)).tolist()
    result["written"] = [
        {"key": item.key, "truth": item.caption, "written": w, "rank": r}
        for item, w, r in zip(items, written, rank_I, strict=True)
    ]
    shots = [
        {**result["written"][i], "split": split, "exact": exact[i], "image": thumbnail(items[i])}
        for i in range(min(captions, len(items)))
    ]
    return result, shots


def write_captions(
    model: MultimodalMoE,
    build: SampleBuilder,
    items: list[Item],
    *,
    ranks: Ranks | None = None,
    max_new_tokens: int = 16,
    together: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's greedy caption of every item's image, equal on all ranks."""
    ranks, device = ranks or Ranks(), next(model.parameters()).device
    # token ids shifted by one, so that zero says "nothing": ranks add up their rows
    ids = torch.zeros(len(items), max_new_tokens, dtype=torch.int64)
    was_training = model.training
    model.eval()
    groups = ranks.rows(len(items), together)
    for done, (rows, own) in enumerate(groups):
        batch = prompt_batch(build, [items[row] for row in rows]).to(device)
        continued = model.generate(batch, max_new_tokens, {build.eos_id})
        for row, tokens in list(zip(rows, continued, strict=True))[:own]:
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64) + 1
        if progress:
            progress(done + 1, len(groups))
    model.train(was_training)
    captions = []
    for row in ranks.add(ids).tolist():
        text = build.tokenizer.decode([token - 1 for token in row if token])
        captions.append(" ".join(text.split()))
    return captions


def expert_use(
    model: MultimodalMoE,
    build: SampleBuilder,
    items: list[Item],
    text_ids_RS: torch.Tensor,
    ranks: Ranks | None = None,
    together: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Selections by layer, kind of token and expert, on held-out pairs and on text alone."""
    ranks, device = ranks or Ranks(), next(model.parameters()).device
    pairs, texts = ranks.rows(len(items), together), ranks.rows(len(text_ids_RS), 2)

    def batches():
        for done, (rows, own) in enumerate(pairs + texts):
            if done < len(pairs):
                batch = pair_batch(build, [items[row] for row in rows])
            else:
                batch = text_batch(text_ids_RS[rows])
            batch.segment_ids[own:] = 0  # repeated rows are not counted twice
            yield batch.to(device)
            if progress:
                progress(done + 1, len(pairs) + len(texts))

    return count_selections(model, batches(), ranks).to_json()


def _named(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)
