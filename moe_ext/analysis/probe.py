"""The probe's verdict: which layers get new experts, cloned from which expert, with which row bias.

MoExtend, eq. 4-6: d_j = std over experts i of r_ij(before) - r_ij(after), where r_ij is expert i's
share of layer j's selections on image tokens before and after the routers alone were trained. The top
floor(p * L) of the L sparse layers are extended.

The manifest, probe.json:

    {"format": "moe_ext.probe/1", "extension", "base_sha256", "modality", "samples", "layer_share",
     "affected_share", "row_init",
     "layers": [{"layer", "num_experts", "shift", "chosen", "source_before", "source_after",
                 "count_before": {kind: [one an expert]}, "count_after": {...}}],
     "plans":  [{"layer", "num_new", "sources", "bias",
                 "step0": {"affected_share", "evicted_share", "new_share"}}]}

Shape letters: L sparse layers, E frozen experts, T tokens, K top_k.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ext.analysis.gaps import Gaps, Measured, bias_for, gather_gaps
from moe_ext.analysis.reduce import Ranks
from moe_ext.analysis.run_folder import write_json
from moe_ext.analysis.selections import IMAGE, KINDS, Selections
from moe_ext.config import RowInit
from moe_ext.model.extend import LayerPlan
from moe_ext.model.fits import check_named

FORMAT = "moe_ext.probe/1"


def selection_shift(before: Selections, after: Selections, kind: int = IMAGE) -> list[float]:
    """d_j of every layer: population std over experts of the change in selection share."""
    pairs = zip(before.share(kind), after.share(kind), strict=True)
    return [float((b - a).std(correction=0)) for b, a in pairs]


def choose_layers(layers: list[int], shift: list[float], layer_share: float) -> list[int]:
    """The floor(p * L) layers of the largest shift, at least one, in ascending order; ties go low."""
    count = max(1, int(layer_share * len(layers) + 1e-9))
    ranked = sorted(zip(layers, shift, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return sorted(layer for layer, _ in ranked[:count])


def make_manifest(
    before: Measured,
    after: Measured,
    *,
    extension: str,
    base_sha256: str,
    modality: int,
    samples: int,
    layer_share: float,
    num_new: int,
    affected_share: float,
    row_init: RowInit = RowInit.clone,
    layers: list[int] | None = None,
    source_expert: int = -1,
    named: dict[int, list[int]] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The manifest, equal on all ranks. A collective of one small reduction.

    Args:
        layers: layers to extend in place of the probe's own choice.
        num_new: new experts a chosen layer; their sources are the experts most selected after.
        source_expert: the source of all new experts instead, where it is not -1.
        named: layer -> the source of each of its new experts, -1 for the most selected that is not
            named, in place of `layers`, `num_new` and `source_expert`.

    Raises:
        ValueError: more new experts than there are experts to clone, an unknown layer or source.
    """
    known = before.selections.layers
    shift = selection_shift(before.selections, after.selections)
    by_layer = bool(named)
    if not named:
        chosen = sorted(layers) if layers else choose_layers(known, shift, layer_share)
        named = {layer: [source_expert] * num_new for layer in chosen}
    check_named(named, dict(zip(known, before.selections.num_frozen, strict=True)), by_layer)
    rank_before, rank_after = (_most_selected(m.selections) for m in (before, after))
    rows = []
    for i, layer in enumerate(known):
        rows.append(
            {
                "layer": layer,
                "num_experts": before.selections.num_frozen[i],
                "shift": shift[i],
                "chosen": layer in named,
                "source_before": rank_before[i][0],
                "source_after": rank_after[i][0],
                "count_before": _counts(before.selections, i),
                "count_after": _counts(after.selections, i),
            }
        )
    sources = {
        layer: _resolved(experts, rank_after[known.index(layer)])
        for layer, experts in sorted(named.items())
    }
    return {
        "format": FORMAT,
        "extension": extension,
        "base_sha256": base_sha256,
        "modality": modality,
        "samples": samples,
        "layer_share": layer_share,
        "affected_share": affected_share,
        "row_init": row_init.name,
        "layers": rows,
        "plans": _plans(
            before.gaps,
            sources,
            affected_share,
            row_init,
            before.selections.top_k,
            ranks or Ranks(),
        ),
    }


def _resolved(experts: list[int], ranked: list[int]) -> list[int]:
    """The named experts, and for every -1 the most selected one that is neither named nor taken."""
    others = iter([expert for expert in ranked if expert not in experts])
    return [next(others) if expert < 0 else expert for expert in experts]


def save_manifest(manifest: dict[str, Any], path: Path) -> None:
    write_json(path, manifest)


def load_plans(path: Path | str, base_sha256: str | None = None) -> list[LayerPlan]:
    """What the manifest says to add where.

    Raises:
        ValueError: another format, or the manifest was made from another base.
    """
    manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r}, not {FORMAT!r}; run the probe again"
        )
    if base_sha256 is not None and manifest["base_sha256"] != base_sha256:
        raise ValueError(
            f"{path} was made from base {manifest['base_sha256'][:12]}, this base is "
            f"{base_sha256[:12]}; run the probe stage on this base, or set base.path to the other one"
        )
    return [
        LayerPlan(layer=p["layer"], num_new=p["num_new"], sources=p["sources"], bias=p["bias"])
        for p in manifest["plans"]
    ]


def most_selected(path: Path | str, number: int) -> dict[int, list[int]]:
    """Layer -> its `number` frozen experts that the base's routing selected most, over all kinds of
    token, in ascending order; fewer than all of a layer's, ties to the lower id."""
    manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    hot = {}
    for row in manifest["layers"]:
        counts = [sum(kinds) for kinds in zip(*row["count_before"].values(), strict=True)]
        ranked = sorted(range(len(counts)), key=lambda e: (-counts[e], e))
        hot[row["layer"]] = sorted(ranked[: min(number, len(counts) - 1)])
    return hot


def _plans(
    gaps: dict[int, Gaps],
    sources: dict[int, list[int]],
    affected_share: float,
    row_init: RowInit,
    top_k: int,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    cloned = row_init is RowInit.clone
    gathered = gather_gaps(gaps, sources, ranks) if cloned else {}
    plans = []
    for layer, experts in sources.items():
        plan: dict[str, Any] = {
            "layer": layer, "num_new": len(experts), "sources": experts, "bias": [0.0] * len(experts),
        }  # fmt: skip
        if layer in gathered:
            gap_TN, last_T = gathered[layer]
            # several clones share the tokens that may be affected (an upper bound: they may overlap)
            plan["bias"] = [
                bias_for(gap_T, affected_share / len(experts)) for gap_T in gap_TN.unbind(1)
            ]
            plan["step0"] = _step0(gap_TN, last_T, torch.tensor(plan["bias"]), experts, top_k)
        plans.append(plan)
    return plans


def _step0(
    gap_TN: Tensor, last_T: Tensor, bias_N: Tensor, sources: list[int], top_k: int
) -> dict[str, float]:
    """Predicted shares before the first step of training, on tokens of the new modality.

    affected: of tokens, some clone is chosen. evicted: of tokens, a clone displaces an expert that is
    not its source, so the output changes. new: of selections, those of new experts (exact for one
    clone a layer; several that enter at the same token displace each other less than counted).
    """
    enters_TN = gap_TN < bias_N
    evicts_TN = enters_TN & (last_T.unsqueeze(1) != torch.tensor(sources))
    return {
        "affected_share": float(enters_TN.any(1).double().mean()),
        "evicted_share": float(evicts_TN.any(1).double().mean()),
        "new_share": float(enters_TN.double().sum(1).mean()) / top_k,
    }


def _most_selected(selections: Selections) -> list[list[int]]:
    """A layer: its frozen experts by image tokens' selections, most first, ties to the lower id."""
    ranked = []
    for i, num in enumerate(selections.num_frozen):
        count = selections.count_LGX[i, IMAGE, :num].tolist()
        ranked.append(sorted(range(num), key=lambda e: (-count[e], e)))
    return ranked


def _counts(selections: Selections, i: int) -> dict[str, list[int]]:
    num = selections.num_frozen[i]
    return {kind: selections.count_LGX[i, g, :num].tolist() for g, kind in enumerate(KINDS)}
