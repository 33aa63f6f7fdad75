"""The trained map from a frozen encoder's features to token embeddings.

Shape letters: M media items, P tokens an item, F feature width, D the language model's width,
N training samples of the closed-form start.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Connector(nn.Module):
    """Two-layer GELU MLP beside a linear path, on standardised features.

    The MLP alone is the published connector. The linear path and the standardisation exist for
    `closed_form_start`; without it they are zero and the identity.
    """

    def __init__(
        self, feature_dim: int, hidden_dim: int, llm_dim: int, *, seed: int = 0, dtype=torch.float32
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(out: int, into: int) -> nn.Parameter:
            weight = torch.randn(out, into, generator=generator) * into**-0.5
            return nn.Parameter(weight.to(dtype))

        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("scale", torch.ones(feature_dim))
        self.hidden_weight = normal(hidden_dim, feature_dim)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_dim, dtype=dtype))
        self.out_weight = normal(llm_dim, hidden_dim)
        self.out_bias = nn.Parameter(torch.zeros(llm_dim, dtype=dtype))
        self.linear_weight = nn.Parameter(torch.zeros(llm_dim, feature_dim, dtype=dtype))

    def forward(self, feature_MPF: Tensor) -> Tensor:
        """(M, P, D) token embeddings in the connector's own dtype."""
        standard = ((feature_MPF.float() - self.mean.float()) * self.scale.float()).to(
            self.hidden_weight.dtype
        )
        hidden = F.gelu(F.linear(standard, self.hidden_weight, self.hidden_bias))
        return F.linear(hidden, self.out_weight, self.out_bias) + F.linear(
            standard, self.linear_weight
        )

    @torch.no_grad()
    def closed_form_start(
        self, feature_NF: Tensor, target_ND: Tensor, embedding_std: float, ridge: float
    ) -> float:
        """Start the linear path by ridge regression and the MLP at zero; returns the fit's R².

        Args:
            feature_NF: features of every sample, averaged over its tokens.
            target_ND: mean input embedding of the tokens of the sample's caption.
            embedding_std: spread of real token embeddings; the prediction, which a ridge shrinks,
                is scaled to it.
            ridge: penalty relative to the (unit) variance of a standardised feature.
        """
        feature_NF, target_ND = feature_NF.double(), target_ND.double()
        mean, spread = feature_NF.mean(0), feature_NF.std(0)
        scale = 1.0 / spread.clamp_min(1e-3 * float(spread.mean()) + 1e-12)
        x_NF = (feature_NF - mean) * scale
        center_D = target_ND.mean(0)
        y_ND = target_ND - center_D
        gram_FF = x_NF.t() @ x_NF
        gram_FF.diagonal().add_(ridge * x_NF.shape[0])
        solution_FD = torch.linalg.solve(gram_FF, x_NF.t() @ y_ND)
        predicted_ND = x_NF @ solution_FD
        explained = 1.0 - float((y_ND - predicted_ND).square().sum() / y_ND.square().sum())
        gain = embedding_std / max(float(predicted_ND.std()), 1e-12)
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.linear_weight.copy_(solution_FD.t() * gain)
        self.out_weight.zero_()
        self.out_bias.copy_(center_D)
        return explained
