"""Held-out text: loss a token, and a hash of every logit.

Shape letters: R rows of text, S tokens of a row, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.analysis.passes import hidden_states
from moe_ext.analysis.reduce import Ranks
from moe_ext.batch import IGNORED_LABEL, TEXT, Batch
from moe_ext.config import Scope
from moe_ext.model.moe import extended_layers
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.model.rows import NewRows


def text_rows(
    texts: list[str], encode: Callable[[str], list[int]], tokens: int, length: int = 256
) -> Tensor:
    """(R, S) int64: texts end to end, cut into rows of `length`, about `tokens` tokens in all.

    Raises:
        ValueError: the texts hold less than one row.
    """
    wanted = max(tokens // length, 1) * length
    ids: list[int] = []
    for text in texts:
        ids += encode(text + "\n\n")
        if len(ids) >= wanted:
            break
    rows = min(len(ids) // length, wanted // length)
    if rows == 0:
        raise ValueError(
            f"held-out text has {len(ids)} tokens, one row needs {length}; "
            "give more text or a lower evaluation.text_tokens"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


def text_batch(ids_RS: Tensor) -> Batch:
    """Rows of plain text: every position but the last of a row has a target."""
    labels = torch.full_like(ids_RS, IGNORED_LABEL)
    labels[:, :-1] = ids_RS[:, 1:]
    return Batch(
        input_ids=ids_RS,
        labels=labels,
        modality_ids=torch.full_like(ids_RS, TEXT),
        segment_ids=torch.ones_like(ids_RS),
        position_ids=torch.arange(ids_RS.shape[1]).expand_as(ids_RS).contiguous(),
    )


@torch.no_grad()
def text_loss(
    model: MultimodalMoE,
    ids_RS: Tensor,
    ranks: Ranks | None = None,
    rows_per_pass: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """{"nll": nats a token, "tokens", "logits_sha256"} of the rows, equal on all ranks.

    The hash is over the SHA-256 of each row's logits (S x V, in the model's dtype), in order of
    rows. Passes have the same shape whatever the model holds, so two models that compute the same
    have the same hash when ranks, threads and placement are the same. A collective.
    """
    ranks, device = ranks or Ranks(), next(model.parameters()).device
    num, length = ids_RS.shape
    digest_RB = torch.zeros(num, 32, dtype=torch.int64)
    nll_R = torch.zeros(num, dtype=torch.float64)
    was_training = model.training
    model.eval()
    groups = ranks.rows(num, rows_per_pass)
    for done, (rows, own) in enumerate(groups):
        batch = text_batch(ids_RS[rows]).to(device)
        logits_RSV = _logits(model, batch)
        for slot, row in enumerate(rows[:own]):
            digest_RB[row] = torch.tensor(list(_sha256(logits_RSV[slot])))
            nll = F.cross_entropy(
                logits_RSV[slot, :-1].float(), batch.input_ids[slot, 1:], reduction="sum"
            )
            nll_R[row] = nll.double().cpu()
        if progress:
            progress(done + 1, len(groups))
    model.train(was_training)
    nll_R, digest_RB = ranks.add(nll_R), ranks.add(digest_RB)
    tokens = num * (length - 1)
    whole = hashlib.sha256(bytes(digest_RB.flatten().tolist()))
    return {
        "nll": float(nll_R.sum()) / tokens,
        "tokens": tokens,
        "logits_sha256": whole.hexdigest(),
    }


@contextmanager
def open_to_text(model: MultimodalMoE, extension: str | None = None) -> Iterator[None]:
    """Inside, every token may choose new experts (`extension.scope=joint`), of one extension or of all."""
    rows = [
        cast(NewRows, rows)
        for layer in extended_layers(model.lm).values()
        for name, rows in layer.router.rows.items()
        if extension in (None, name)
    ]
    scopes = [r.scope for r in rows]
    for r in rows:
        r.scope = Scope.joint
    try:
        yield
    finally:
        for r, scope in zip(rows, scopes, strict=True):
            r.scope = scope


def _logits(model: MultimodalMoE, batch: Batch) -> Tensor:
    """(R, S, V) in the model's dtype."""
    hidden = hidden_states(model, batch)
    return model.logits(hidden.reshape(-1, hidden.shape[-1])).view(*batch.input_ids.shape, -1)


def _sha256(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().flatten().view(torch.uint8).cpu()
    return hashlib.sha256(flat.numpy().data).digest()
