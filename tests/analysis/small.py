"""A tiny multimodal model with a tiny encoder, a real tokenizer, and numbered image-caption pairs."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from moe_ext.analysis.heldout import Item, load_items
from moe_ext.config import ExtensionConfig, Scope
from moe_ext.data import write_shards
from moe_ext.data.manifest import Manifest
from moe_ext.data.samples import SampleBuilder
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import LayerPlan, add_extension, load_base
from moe_ext.model.multimodal import MultimodalMoE
from tests.data.inputs import make_tokenizer, pair, to_pixels
from tests.model.tiny import save_tiny

DIM, PATCHES, FEATURES = 32, 4, 6


class Patches(nn.Module):
    """(M, 3, 4, 4) -> (M, 4, 6): the four quarters of an image, mixed at random."""

    feature_dim, tokens_per_item = FEATURES, PATCHES

    def __init__(self):
        super().__init__()
        mix = torch.randn(12, FEATURES, generator=torch.Generator().manual_seed(5))
        self.mix = nn.Parameter(3 * mix, requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        quarters = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
        return quarters.reshape(len(pixels), PATCHES, 12) @ self.mix


def save_base(folder: Path, model_type: str = "qwen2_moe") -> Path:
    save_tiny(folder, model_type, vocab_size=272, num_hidden_layers=5)
    return folder


def make_model(base: Path, **load) -> MultimodalMoE:
    lm = load_base(base, dtype=torch.float32, **load)
    connector = Connector(FEATURES, 16, DIM, seed=1)
    return MultimodalMoE(lm, {1: Patches()}, nn.ModuleDict({"vision": connector}))


def extend(model: MultimodalMoE, base: Path, scope: Scope = Scope.preserve, **changes) -> None:
    """Two layers get an expert; its weights are moved, as training would, so that it matters."""
    plans = [LayerPlan(0, 1, [2], [1.0]), LayerPlan(3, 1, [1], [1.0])]
    add_extension(model.lm, str(base), "vision", plans, ExtensionConfig(scope=scope, **changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if parameter.requires_grad and ".new." in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def make_build() -> SampleBuilder:
    return SampleBuilder(
        make_tokenizer(), to_pixels, PATCHES, 1, prompt="A picture of", max_length=64
    )


def noise_png(i: int) -> bytes:
    """Tokens of a plain image would be equal, and their routing would tie."""
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(i))
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def make_manifest(folder: Path, num: int = 9) -> Manifest:
    """Splits train, heldout and heldout_concept of `num` pairs each."""
    splits = ("train", "heldout", "heldout_concept")
    names = ("cat", "owl", "a rather long name", "sun")
    samples = []
    for i in range(3 * num):
        caption = f"{names[i % 4]} number {i}"
        sample = {**pair(i, caption=caption), "png": noise_png(i)}
        samples.append((splits[i % 3], sample))
    return Manifest.load(write_shards(iter(samples), folder, samples_per_shard=7))


def make_items(folder: Path, num: int = 9) -> list[Item]:
    return load_items(make_manifest(folder, num), "heldout", num)
