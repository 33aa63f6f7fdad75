"""Packed samples under a mask against the samples one by one, in every family."""

import pytest
import torch

from moe_ext.model.context import RoutingContext
from moe_ext.model.load import load_base
from moe_ext.model.masks import decoder_mask, takes_masks
from tests.model.tiny import TINY, save_tiny

RECURRENT = {"qwen3_next"}
_WINDOWS = [
    *[(model_type, {}) for model_type in sorted(TINY.keys() - RECURRENT)],
    ("mixtral", {"sliding_window": 5}),
    (
        "dots1",
        {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2}
        | {"num_hidden_layers": 4},
    ),
]


def _packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mask, positions, segments) of samples packed into one row."""
    segment = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)]).view(1, -1)
    position = torch.cat([torch.arange(n) for n in lengths]).view(1, -1)
    mask = (segment.unsqueeze(1) == segment.unsqueeze(2)).tril().unsqueeze(1)
    return mask, position, segment


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize(
    ("model_type", "changes"), _WINDOWS, ids=[f"{m}{'-window' * bool(c)}" for m, c in _WINDOWS]
)
def test_packed_samples_see_what_they_see_alone(tmp_path, model_type, changes, implementation):
    save_tiny(tmp_path, model_type, **changes)
    lm = load_base(tmp_path, dtype=torch.float32, attn_implementation=implementation)
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(0))
    mask, position, segment = _packed([14, 10])
    lm.context_holder.context = RoutingContext(torch.zeros_like(ids), segment)
    packed = lm(
        ids,
        attention_mask=decoder_mask(lm.config, mask, position, torch.float32),
        position_ids=position,
        use_cache=False,
    ).logits
    lm.context_holder.context = None
    alone = torch.cat([lm(ids[:, :14]).logits, lm(ids[:, 14:]).logits], 1)
    assert (packed - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("model_type", sorted(RECURRENT))
def test_recurrent_layers_are_refused(tmp_path, model_type):
    save_tiny(tmp_path, model_type)
    config = load_base(tmp_path, dtype=torch.float32).config
    mask, position, _ = _packed([3, 2])
    assert not takes_masks(config)
    with pytest.raises(ValueError, match="carry state from one packed sample.*data.pack=false"):
        decoder_mask(config, mask, position, torch.float32)
    assert decoder_mask(config, None, position, torch.float32) is None
