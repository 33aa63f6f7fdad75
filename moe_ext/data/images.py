"""The images of a raw sample: which members they are, and how they are decoded or refused."""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .shards import BadSample, RawSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_PIXELS = 64_000_000
"""A larger image is refused before it is decoded: a small file can unpack to gigabytes."""


def image_members(raw: RawSample) -> list[str]:
    """Names of a sample's images: `png`, or `0.png`, `1.png`, ... in numerical order.

    Cached features stand for the images they were made from: `features.npy`, `0.features.npy`, ...
    """
    names = [
        name
        for name in raw
        if not name.startswith("__")
        and (name.rsplit(".", 1)[-1] in IMAGE_SUFFIXES or f".{name}".endswith(".features.npy"))
    ]

    def number(name: str) -> tuple[int, str]:
        stem = name.split(".", 1)[0]
        return (int(stem) if stem.isdigit() else -1, name)

    return sorted(names, key=number)


def decode_image(data: bytes, key: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB image, transparency laid on white.

    Raises:
        BadSample: empty, damaged, or of more than `max_pixels` (checked before decoding).
    """
    if not data:
        raise BadSample(key, "image has zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data))  # reads the header only
        if image.width * image.height > max_pixels:
            raise BadSample(
                key, f"image of {image.width}x{image.height} is above {max_pixels} pixels"
            )
        if image.mode == "RGB":
            image.load()
            return image
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return image.convert("RGB")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        return white
    except BadSample:
        raise
    except Exception as error:  # PIL raises many kinds (OSError, SyntaxError, struct.error, ...)
        reason = str(error).split(" <")[0]  # no memory addresses: a skip log compares
        raise BadSample(key, f"image cannot be decoded: {reason}") from None


def decode_features(data: bytes, key: str, tokens_per_item: int) -> Tensor:
    """(P, F) float32 features that an encoder gave for an image.

    Raises:
        BadSample: damaged, or of another number of tokens.
    """
    try:
        features = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False)).float()
    except (ValueError, OSError, TypeError) as error:
        raise BadSample(key, f"features cannot be read: {error}") from None
    if features.ndim != 2 or features.shape[0] != tokens_per_item:
        raise BadSample(
            key, f"features of shape {tuple(features.shape)}, not of {tokens_per_item} tokens"
        )
    return features
