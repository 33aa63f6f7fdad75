"""The connector and its closed-form start."""

import torch

from moe_ext.model.connectors import Connector


def test_closed_form_start_predicts_the_targets():
    """Features that are a noisy linear image of the targets: the start finds the map at once."""
    generator = torch.Generator().manual_seed(0)
    target = 0.1 * torch.randn(400, 6, generator=generator) + 0.5
    mixing = torch.randn(6, 20, generator=generator)
    features = target @ mixing + 0.01 * torch.randn(400, 20, generator=generator)
    features = features * torch.logspace(-2, 2, 20)  # widths of very different scale
    connector = Connector(20, 16, 6)
    before = connector(features[:, None]).squeeze(1)
    explained = connector.closed_form_start(features, target, float(target.std(0).mean()), 1e-3)
    after = connector(features[:, None]).squeeze(1)
    assert explained > 0.95
    centered = target - target.mean(0)

    def agreement(predicted: torch.Tensor) -> float:
        predicted = predicted - predicted.mean(0)
        return float(torch.cosine_similarity(predicted.flatten(), centered.flatten(), dim=0))

    assert agreement(after) > 0.95 > 0.5 > abs(agreement(before))
    assert abs(float(after.std(0).mean() / target.std(0).mean()) - 1) < 0.3


def test_no_items_keep_the_graph():
    connector = Connector(8, 4, 6)
    out = connector(torch.zeros(0, 9, 8))
    assert out.shape == (0, 9, 6)
    out.sum().backward()
    assert all(p.grad is not None for p in connector.parameters())
