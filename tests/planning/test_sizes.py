"""Sizes from configurations: published parameter counts, and every family's own model."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from moe_ext.config import CalibrationKind, EncoderConfig, ExpertType, ExtensionConfig
from moe_ext.model import efficientnet
from moe_ext.model.connectors import Connector
from moe_ext.planning.sizes import base_sizes, encoder_sizes, extension_sizes
from tests.model.tiny import TINY, tiny_config
from tests.planning.known import DEEPSEEK_V3, MIXTRAL_8X7B, QWEN3_30B

PUBLISHED = {
    # model_type: (dimensions, all parameters, billions that a token meets, rounded to)
    "mixtral": (MIXTRAL_8X7B, 46_702_792_704, 12.9, 0.1),
    "qwen3_moe": (QWEN3_30B, 30_532_122_624, 3.3, 0.2),
    "deepseek_v3": (DEEPSEEK_V3, 671_026_419_200, 37.0, 1.0),
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_sums_are_the_published_counts(model_type):
    dimensions, total, active, rounded_to = PUBLISHED[model_type]
    sizes = base_sizes(AutoConfig.for_model(model_type, **dimensions))
    assert sizes.total == total
    # DeepSeek leaves the embedding out of what a token meets
    left_out = sizes.vocabulary * sizes.hidden_dim if model_type == "deepseek_v3" else 0
    assert abs((sizes.active - left_out) / 1e9 - active) <= rounded_to / 2


@pytest.mark.parametrize("model_type", TINY)
def test_every_family_is_counted_whole(model_type):
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config)
    fixed = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    stored = sum(p.numel() for p in model.parameters())
    stored += sum(model.state_dict()[name].numel() for name in fixed)
    sizes = base_sizes(config)
    assert sizes.total == stored
    assert 0 < sizes.active < sizes.total
    assert 0 < sizes.linear < sizes.dense


def test_connectors_and_extensions_are_counted_as_they_are_built():
    sizes = encoder_sizes(EncoderConfig(name="efficientnet_lite0"), 24, 32)
    network = efficientnet.EfficientNetLite0()
    assert sizes.elements == sum(p.numel() for p in network.parameters())
    assert 0.7e9 < sizes.flops_per_item < 0.9e9  # published: 407 M multiply-adds
    connector = Connector(efficientnet.FEATURE_DIM, 24, 32)
    assert sizes.connector == tuple(p.numel() for p in connector.parameters())
    assert sizes.connector_buffer_bytes == sum(b.nbytes for b in connector.buffers())
    base = base_sizes(tiny_config("mixtral"))
    one = extension_sizes(base, ExtensionConfig(layers=[1], calibration=CalibrationKind.none))
    assert (one.new_of, sum(one.trained_expert)) == ({1: 1}, base.expert_elements)
    own = extension_sizes(base, ExtensionConfig(sources={2: [0, -1, 3], 0: [1]}))
    assert own.new_of == {0: 1, 2: 3}
    assert [layer.rows for layer in own.layers] == [(32, 1), (96, 3)]
    assert [layer.calibration for layer in own.layers] == [(6 * 10,) * 2, (8 * 14,) * 2]
    low = ExtensionConfig(layers=[1], expert_type=ExpertType.lora, lora_rank=2)
    assert sum(extension_sizes(base, low).trained_expert) == 3 * 2 * (32 + 24)
    assert extension_sizes(base, low).fixed_expert == base.expert_elements
    chosen = extension_sizes(base, ExtensionConfig(layer_share=0.7))
    assert chosen.new_of == {1: 1, 2: 1}, "the probe chooses: two of three layers, the last ones"
