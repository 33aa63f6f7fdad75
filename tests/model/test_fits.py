"""What a base has no layer, expert or width for is refused from its configuration alone."""

import pytest

from moe_ext.model.fits import check_fits
from tests.model.tiny import TINY, tiny_config
from tests.test_config import compose

NARROW = ["base=folder", "base.path=/base"]


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_defaults_fit_every_family(family):
    check_fits(compose(*NARROW), tiny_config(family))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["extension.layers=[0,1]"],
            r"extension.layers names \[1\], .* sparse layers are \[0, 2\]",
        ),
        (["+extension.sources={1:[0]}"], r"extension.sources names \[1\]"),
        (["+extension.sources={0:[0,6]}"], "extension.sources=6 is no expert of layer 0"),
        (["extension.source_expert=6"], "extension.source_expert=6 is no expert of layer 0"),
        (["extension.num_new_experts=7"], "num_new_experts=7 exceeds the 6 experts"),
        (["parallel.ep_size=2", "+parallel.hot_lists={1:[0]}"], r"hot_lists names layers \[1\]"),
        (["parallel.ep_size=2", "+parallel.hot_lists={0:[6]}"], "must be different experts"),
        (["extension.name=train"], "extension.name: 'train' is a word that torch's modules use"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_fits(compose(*NARROW, *overrides), tiny_config("qwen2_moe"))  # sparse: 0 and 2
    assert "\n" not in str(caught.value)


def test_widths_and_recurrent_layers():
    odd = tiny_config("qwen2_moe", moe_intermediate_size=15)
    with pytest.raises(ValueError, match="15 wide; use base.frozen_bits=8"):
        check_fits(compose(*NARROW, "base.frozen_bits=4"), odd)
    check_fits(compose(*NARROW, "base.frozen_bits=8"), odd)
    with pytest.raises(ValueError, match="is 32 wide; use base.frozen_format=plain"):
        check_fits(compose(*NARROW, "base.frozen_bits=4", "base.frozen_format=nf4"), odd)
    with pytest.raises(ValueError, match="recurrent layers, .* use data.pack=false"):
        check_fits(compose(*NARROW, "data.pack=true"), tiny_config("qwen3_next"))
    with pytest.raises(ValueError, match="without a sparse layer"):
        check_fits(compose(*NARROW), tiny_config("qwen3_moe", decoder_sparse_step=5))
