"""Makes the copies of an upcycled base differ, in closed form: no gradient, one pass over some
text.

Copies compute the dense function whatever the router says. Here each sparse layer gets experts that
are narrower than the dense layer and good at their own tokens, and a router that knows which those
are:

1. **Route.** The layer's inputs are clustered by balanced spherical k-means. A token goes to the
   centroids with the largest inner products, which is what a linear router computes; the constant
   that balances the load is written along the direction that all inputs share, since the router has
   no bias. One temperature sets the mean weight of a token's first expert. 2. **Prune.** An expert
   keeps those neurons of the dense layer that matter most to its tokens: the largest mean squares
   of routing weight * activation * norm of the output column. 3. **Refit.** All output columns of
   all experts of the layer are corrected together by ridge least squares towards the dense layer's
   output, given the routing weights. The correction starts at zero, so a neuron that the text never
   wakes keeps its dense column. 4. **Carry on.** The next layers read the fitted layer's output, so
   errors are met where they arise instead of piling up.

Measured on SmolLM2-135M-Instruct: 10 of 30 layers, 4 experts of 1024 of the 1536 neurons, top-2,
fitted to 8192 tokens of Python's documentation and library. Held-out loss beside the dense model's:
topics of the documentation +2.1 % (2.412 -> 2.463 nats), docstrings +3.2 %, code +6.5 %; choosing
experts at random costs 0.076 nats a token more. The whole command took 84 s of processor time on a
busy machine, some 16 of them the forward pass.

What moves these numbers, as (loss on topics, cost of a random choice): 16384 tokens (+1.3 %,
0.085), 129 s for the fit; RIDGE 0.3 instead of 0.01 (+1.3 %, 0.040), too little of a choice. A
small ridge separates the experts and fits them to the text; a large one is kinder to text of
another kind: on eight sentences of everyday prose the dense model loses 3.30 nats a token, the base
3.70, and the one with RIDGE 0.3 3.62. Fit to text of the kind that you will use (`moe-ext upcycle
--text`).

Branch-Train-MiX trains whole copies on separate text for many steps; a closed form has the same aim
(experts that differ, tokens that find them) within the cost of a few forward passes.

Shape letters: T tokens, D hidden width, F dense neurons, I neurons of an expert, E experts, K
chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2MoeConfig

from moe_ext.config import SpecialiseConfig

FIRST_WEIGHT = 0.7
"""Mean weight of a token's first expert: low enough that the second matters, high enough to
tell."""

RIDGE = 0.01
"""Penalty on a corrected column, relative to the activations' mean square."""

SEQUENCES_PER_BATCH = 8
CLUSTER_TOKENS = 8192


@dataclass
class SpecialisedLayer:
    """Router and experts of one sparse layer."""

    router_ED: Tensor
    gate_EID: Tensor
    up_EID: Tensor
    down_EDI: Tensor


@dataclass
class FitReport:
    """How well one layer was fitted, on the text it was fitted to."""

    layer: int
    pruned_error: float
    """Norm of the output's error over the output's norm, before the columns were corrected."""
    error: float
    load_E: list[float]
    """Share of the chosen places that each expert got; they sum to one."""
    first_weight: float


def calibration_tokens(tokenizer, texts: list[str], settings: SpecialiseConfig) -> Tensor:
    """(sequences, sequence_length) int64: texts joined, cut, and drawn at random by
    `settings.seed`.

    Raises:
        ValueError: fewer than `settings.tokens` tokens of text.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    length = settings.sequence_length
    wanted, there = settings.tokens // length, len(ids) // length
    if wanted < 1 or there < wanted:
        raise ValueError(
            f"base.specialise.tokens={settings.tokens} in sequences of {length}: the calibration "
            "texts "
            f"have {len(ids)} tokens; give more text, or lower base.specialise.tokens (at least "
            "one "
            "sequence)"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randperm(there, generator=generator)[:wanted]
    return torch.tensor(ids[: there * length]).view(there, length)[drawn]


def _balanced(score_TE: Tensor, steps: int, top_k: int = 1) -> Tensor:
    """(E,) constants to add to scores so that the top-k choice loads all experts about evenly."""
    num_experts = score_TE.shape[1]
    constant_E = torch.zeros(num_experts)
    rate = 2.0 * score_TE.std()
    for step in range(steps):
        chosen = (score_TE + constant_E).topk(top_k, dim=1).indices.flatten()
        load_E = torch.bincount(chosen, minlength=num_experts) / len(chosen)
        constant_E -= rate * 0.97**step * (load_E - 1 / num_experts)
    return constant_E


def cluster_directions(x_TD: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """(E, D) unit centroids of the inputs' directions from their mean, in clusters of about one
    size."""
    z_TD = F.normalize(x_TD - x_TD.mean(0), dim=1)
    first = torch.randint(len(z_TD), (1,), generator=generator)
    centroid_ED = z_TD[first]
    while len(centroid_ED) < num_experts:  # k-means++: far from what is there already
        distance_T = (1 - (z_TD @ centroid_ED.T).amax(1)).clamp_min(0)
        drawn = torch.multinomial(distance_T.square(), 1, generator=generator)
        centroid_ED = torch.cat([centroid_ED, z_TD[drawn]])
    for _ in range(10):
        score_TE = z_TD @ centroid_ED.T
        nearest_T = (score_TE + _balanced(score_TE, steps=40)).argmax(1)
        centroid_ED = torch.stack([z_TD[nearest_T == e].mean(0) for e in range(num_experts)])
        centroid_ED = F.normalize(centroid_ED, dim=1)
    return centroid_ED


def router_rows(x_TD: Tensor, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """(E, D) rows of a bias-free router: balanced load, mean first weight of FIRST_WEIGHT."""
    drawn = torch.randperm(len(x_TD), generator=generator)[:CLUSTER_TOKENS]
    x_TD = x_TD[drawn]
    row_ED = cluster_directions(x_TD, num_experts, generator)
    # The direction whose inner product with every input is as close to 1 as it goes.
    gram_DD = x_TD.T @ x_TD / len(x_TD)
    gram_DD.diagonal().add_(1e-2 * gram_DD.diagonal().mean())
    one_D = torch.linalg.solve(gram_DD, x_TD.mean(0))
    row_ED = row_ED - (row_ED @ x_TD.mean(0))[:, None] * one_D
    for kind in (1, top_k):  # first the first choices, then all of them, from there
        row_ED = row_ED + _balanced(x_TD @ row_ED.T, 60, kind)[:, None] * one_D
    logit_TE = x_TD @ row_ED.T
    if top_k == 1:
        return row_ED / logit_TE.std()
    low, high = 0.0, 1e3 / float(logit_TE.std())
    for _ in range(40):  # the mean first weight grows with the scale: bisect
        middle = (low + high) / 2
        weight_TK = (middle * logit_TE).topk(top_k, dim=1).values.softmax(1)
        low, high = (middle, high) if weight_TK[:, 0].mean() < FIRST_WEIGHT else (low, middle)
    return row_ED * low


def _refit(
    a_TF: Tensor, weight_TE: Tensor, kept_EI: Tensor, residual_TD: Tensor, ridge: float
) -> Tensor:
    """(E, D, I) corrections of the experts' columns, ridge least squares towards the residual.

    The unknowns of all experts form one system, since a token's experts answer together. Its Gram
    matrix is summed over the pairs of experts that tokens choose, which is E / K times less work
    than multiplying the wide matrix that is mostly zeros.
    """
    num_experts, width = kept_EI.shape
    size = num_experts * width
    gram = a_TF.new_zeros(size, size)
    target = a_TF.new_zeros(size, residual_TD.shape[1])
    chosen_TE = weight_TE > 0
    pattern_T = (chosen_TE.long() << torch.arange(num_experts)).sum(1)
    for pattern in pattern_T.unique().tolist():
        tokens = torch.where(pattern_T == pattern)[0]
        experts = [e for e in range(num_experts) if pattern >> e & 1]
        a_tF = a_TF[tokens]
        parts = [a_tF[:, kept_EI[e]] * weight_TE[tokens, e, None] for e in experts]
        rows = torch.cat(parts, dim=1)
        block, right = rows.T @ rows, rows.T @ residual_TD[tokens]
        for i, e in enumerate(experts):
            at, of = slice(e * width, (e + 1) * width), slice(i * width, (i + 1) * width)
            target[at] += right[of]
            for j, f in enumerate(experts):
                gram[at, f * width : (f + 1) * width] += block[of, j * width : (j + 1) * width]
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    correction = torch.cholesky_solve(target, torch.linalg.cholesky(gram))
    return correction.view(num_experts, width, -1).transpose(1, 2)


def fit_layer(
    x_TD: Tensor,
    mlp: nn.Module,
    num_experts: int,
    top_k: int,
    width: int,
    generator: torch.Generator,
    layer: int = 0,
) -> tuple[SpecialisedLayer, Tensor, FitReport]:
    """Experts for one layer's inputs (float32), and the fitted layer's output (T, D) for them.

    Args:
        mlp: the dense layer: `gate_proj`, `up_proj`, `down_proj`, `act_fn`.
        width: neurons I that an expert keeps.
    """
    gate_FD, up_FD, down_DF = (
        proj.weight.float() for proj in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    router_ED = router_rows(x_TD, num_experts, top_k, generator)
    chosen_TK = (x_TD @ router_ED.T).topk(top_k, dim=1)
    weight_TE = torch.zeros(len(x_TD), num_experts)
    weight_TE.scatter_(1, chosen_TK.indices, chosen_TK.values.softmax(1))

    a_TF = mlp.act_fn(x_TD @ gate_FD.T).mul_(x_TD @ up_FD.T)
    importance_EF = (weight_TE.square().T @ a_TF.square()) * down_DF.square().sum(0)
    kept_EI = importance_EF.topk(width, dim=1).indices.sort(dim=1).values
    keeps_EF = torch.zeros(num_experts, len(gate_FD)).scatter_(1, kept_EI, 1.0)
    output_TD = a_TF @ down_DF.T
    residual_TD = a_TF.mul(1 - weight_TE @ keeps_EF) @ down_DF.T
    down_EDI = down_DF[:, kept_EI].transpose(0, 1)
    pruned_error = residual_TD.norm() / output_TD.norm()
    if width < len(gate_FD):
        down_EDI = down_EDI + _refit(a_TF, weight_TE, kept_EI, residual_TD, RIDGE)

    fitted_TD = torch.zeros_like(output_TD)
    for e in range(num_experts):
        tokens = torch.where(weight_TE[:, e] > 0)[0]
        rows = a_TF[tokens][:, kept_EI[e]] * weight_TE[tokens, e, None]
        fitted_TD.index_add_(0, tokens, rows @ down_EDI[e].T)
    report = FitReport(
        layer,
        pruned_error=float(pruned_error),
        error=float((fitted_TD - output_TD).norm() / output_TD.norm()),
        load_E=((weight_TE > 0).float().mean(0) / top_k).tolist(),
        first_weight=float(weight_TE.amax(1).mean()),
    )
    experts = SpecialisedLayer(router_ED, gate_FD[kept_EI], up_FD[kept_EI], down_EDI)
    return experts, fitted_TD, report


def specialise_model(
    lm: PreTrainedModel,
    tokens: Tensor,
    layers: list[int],
    num_experts: int,
    top_k: int,
    width: int,
    seed: int = 0,
    progress: Callable[[FitReport], None] | None = None,
) -> dict[int, SpecialisedLayer]:
    """Experts of every layer in `layers`, fitted one after another to (sequences, S) tokens."""
    model = lm.model
    batches = list(tokens.split(SEQUENCES_PER_BATCH))
    hidden = [model.embed_tokens(batch) for batch in batches]
    rotary = model.rotary_emb(hidden[0], torch.arange(tokens.shape[1])[None])
    fitted = {}
    for index, block in enumerate(model.layers[: max(layers) + 1]):
        if index not in layers:
            hidden = [block(h, position_embeddings=rotary, attention_mask=None) for h in hidden]
            continue
        for number, h in enumerate(hidden):
            attended = block.self_attn(
                block.input_layernorm(h), position_embeddings=rotary, attention_mask=None
            )
            hidden[number] = h + attended[0]
        x_TD = torch.cat([block.post_attention_layernorm(h).flatten(0, 1) for h in hidden])
        generator = torch.Generator().manual_seed(1000 * seed + index)
        fitted[index], output_TD, report = fit_layer(
            x_TD.float(), block.mlp, num_experts, top_k, width, generator, index
        )
        outputs = output_TD.to(x_TD.dtype).split([h.shape[0] * h.shape[1] for h in hidden])
        hidden = [h + out.view_as(h) for h, out in zip(hidden, outputs, strict=True)]
        if progress:
            progress(report)
    return fitted


@torch.no_grad()
def specialise(
    dense_path: Path,
    config: Qwen2MoeConfig,
    layers: list[int],
    settings: SpecialiseConfig,
    texts: list[str],
    progress: Callable[[FitReport], None] | None = None,
) -> dict[int, SpecialisedLayer]:
    """Layer -> its specialised experts (float32), for the dense model in a folder.

    Args:
        config: of the upcycled model: number and width of the experts, and how many a token
        chooses.

    Raises:
        ValueError: too little text.
    """
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(dense_path), texts, settings)
    # sdpa without a mask is causal; eager would not be
    lm = AutoModelForCausalLM.from_pretrained(dense_path, dtype="auto", attn_implementation="sdpa")
    window = getattr(lm.config, "sliding_window", None)
    if window and settings.sequence_length > window:
        raise ValueError(
            f"base.specialise.sequence_length={settings.sequence_length} exceeds the dense model's "
            f"attention window; choose at most {window}"
        )
    return specialise_model(
        lm.eval(),
        tokens,
        layers,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        settings.seed,
        progress,
    )
