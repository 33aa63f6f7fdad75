"""What `bench layer` computes: shapes, loads and inputs that give exactly the wanted load.

The routing is chosen first and the input made to fit: the router's rows are unit vectors, and the
first X features of a token are its logits, 4 higher for the experts it shall choose. All peers, in
fp32 and bf16, then choose the same experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.benchmarks.peers import LayerWeights

NEW_SHARE = 0.06
"""Share of the slots that choose new experts."""


@dataclass(frozen=True)
class Shape:
    num_frozen: int
    num_new: int
    top_k: int
    hidden_dim: int
    intermediate_dim: int

    @property
    def num_experts(self) -> int:
        return self.num_frozen + self.num_new


SHAPES: dict[str, Shape] = {
    "8x2": Shape(8, 1, 2, 512, 1792),  # wide, as Mixtral: I = 3.5 D
    "32x4": Shape(32, 2, 4, 512, 256),  # I = D / 2, as OLMoE
    "128x8": Shape(128, 8, 8, 512, 192),  # I = 3 D / 8, as Qwen3-30B-A3B
}
"""`<pretrained experts>x<top-k>` -> sizes."""

LOADS: dict[str, float] = {"balanced": 1.0, "skew2": 2.0, "skew8": 8.0}
"""Rows of the busiest pretrained expert over the mean; at most E / k."""


@dataclass(frozen=True)
class Work:
    """One (shape, load, dtype) with everything that peers need."""

    weights: LayerWeights
    hidden_BSD: Tensor
    grad_BSD: Tensor
    rows_X: list[int]
    """Rows of every expert."""

    @property
    def new_share(self) -> float:
        """Measured f: rows of new experts over all rows."""
        return sum(self.rows_X[self.weights.num_frozen :]) / sum(self.rows_X)

    @property
    def skew(self) -> float:
        """Rows of the busiest expert over the mean."""
        return max(self.rows_X) * len(self.rows_X) / sum(self.rows_X)


def slot_shares(shape: Shape, load: str) -> Tensor:
    """(X,) float64: how many of a token's K slots an expert gets on average; they sum to K."""
    slots_new = NEW_SHARE * shape.top_k
    share = torch.full((shape.num_experts,), slots_new / shape.num_new, dtype=torch.float64)
    slots_frozen = shape.top_k - slots_new
    share[: shape.num_frozen] = slots_frozen / shape.num_frozen
    skew = min(LOADS[load], shape.num_frozen / shape.top_k)
    if skew > 1:
        share[0] = skew * shape.top_k / shape.num_experts
        share[1 : shape.num_frozen] = (slots_frozen - share[0]) / (shape.num_frozen - 1)
    return share


def choose_experts(share_X: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """(T, X) bool: K different experts a token, expert x in share_X[x] of the tokens, +-2 %.

    Systematic sampling: walk through the experts and take one whenever the sum of the shares passes
    a whole number. The starts of a block of tokens are evenly spread, so that the counts are exact
    but for rounding; every block walks in a random order of its own.
    """
    top_k = round(share_X.sum().item())
    blocks = []
    for tokens in torch.arange(num_tokens).chunk(8):
        order_X = torch.rand(len(share_X), generator=generator).argsort()
        end_X = share_X[order_X].cumsum(0)
        end_X = end_X / end_X[-1] * top_k
        place_t = torch.rand(len(tokens), generator=generator).argsort()
        start_t = (place_t + torch.rand(1, generator=generator)) / len(tokens)
        passed_tX = (end_X + start_t.double().unsqueeze(1)).floor()
        passed_tX[:, -1] = top_k  # rounding must not lose or add the last slot
        taken_tX = passed_tX.diff(dim=1, prepend=torch.zeros(len(tokens), 1).double()) > 0
        chosen_tX = torch.zeros_like(taken_tX)
        chosen_tX[:, order_X] = taken_tX
        blocks.append(chosen_tX)
    return torch.cat(blocks)


def make_work(shape: Shape, load: str, dtype: torch.dtype, num_tokens: int, seed: int = 0) -> Work:
    """Weights, input and gradient of one case, by seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, std: float) -> Tensor:
        return std * torch.randn(*size, generator=generator)

    total, dim, wide = shape.num_experts, shape.hidden_dim, shape.intermediate_dim
    gate_up = draw(total, 2 * wide, dim, std=dim**-0.5).to(dtype)
    down = draw(total, dim, wide, std=wide**-0.5).to(dtype)
    rows = torch.eye(total, dim, dtype=dtype)
    weights = LayerWeights(gate_up, down, rows, shape.num_new, shape.top_k)

    chosen_TX = choose_experts(slot_shares(shape, load), num_tokens, generator)
    x_TD = draw(num_tokens, dim, std=1.0)
    x_TD[:, :total] = 0.5 * x_TD[:, :total].clamp(-3, 3) + 4 * chosen_TX
    grad_TD = draw(num_tokens, dim, std=1.0)
    return Work(
        weights,
        x_TD.to(dtype).unsqueeze(0),
        grad_TD.to(dtype).unsqueeze(0),
        chosen_TX.sum(0).tolist(),
    )
