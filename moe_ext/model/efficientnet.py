"""EfficientNet-Lite (Apache-2.0, ImageNet-1k) for inference: batch norms folded into the
convolutions.

The Lite variants have ReLU6 instead of swish and no squeeze-and-excite. A block expands its
channels by a 1x1 convolution, convolves each alone, and projects back by a 1x1 convolution. Module
names are those of the published state dict (`_blocks.3._expand_conv.weight`), so folding is the
only conversion.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURE_DIM = 1280
NATIVE_IMAGE_SIZE = 224
BATCH_NORM_EPS = 1e-3

STAGES = [
    # repeats, kernel, stride, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]

NORM_OF = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}
"""Convolution -> the batch norm that follows it, in the same scope of the published state dict."""


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: an odd pixel goes to the right and the
    bottom."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int = 1, groups: int = 1):
        even = kernel // 2 if stride == 1 else 0
        super().__init__(dim_in, dim_out, kernel, stride, padding=even, groups=groups, bias=True)

    def forward(self, pixels: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            height, width = (
                max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
                for size in pixels.shape[-2:]
            )
            sides = (width // 2, width - width // 2, height // 2, height - height // 2)
            pixels = F.pad(pixels, sides)
        return super().forward(pixels)


class Block(nn.Module):
    """Expand, convolve each channel, project; with a skip where the shape stays."""

    def __init__(self, kernel: int, stride: int, expansion: int, dim_in: int, dim_out: int):
        super().__init__()
        inner = dim_in * expansion
        self.skip = stride == 1 and dim_in == dim_out
        self._expand_conv = SameConv(dim_in, inner, 1) if expansion != 1 else None
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner)
        self._project_conv = SameConv(inner, dim_out, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        inner = pixels
        if self._expand_conv is not None:
            inner = F.relu6(self._expand_conv(pixels), inplace=True)
        inner = F.relu6(self._depthwise_conv(inner), inplace=True)
        inner = self._project_conv(inner)
        return inner.add_(pixels) if self.skip else inner


class EfficientNetLite0(nn.Module):
    """(M, 3, H, W) pixels, (rgb - 127) / 128 -> (M, 1280, ceil(H / 32), ceil(W / 32)) features >=
    0."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)
        self._blocks = nn.ModuleList(
            Block(
                kernel, stride if n == 0 else 1, expansion, dim_in if n == 0 else dim_out, dim_out
            )
            for repeats, kernel, stride, expansion, dim_in, dim_out in STAGES
            for n in range(repeats)
        )
        self._conv_head = SameConv(STAGES[-1][-1], FEATURE_DIM, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        features = F.relu6(self._conv_stem(pixels), inplace=True)
        for block in self._blocks:
            features = block(features)
        return F.relu6(self._conv_head(features), inplace=True)


def fold_batch_norms(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `EfficientNetLite0`: every convolution's batch norm became its scale and
    bias."""
    folded = {}
    for module, norm in NORM_OF.items():
        for key in published:
            scope, found, leaf = key.rpartition(f"{module}.weight")
            if not found or leaf:
                continue
            gain, bias, mean, variance = (
                published[f"{scope}{norm}.{name}"].double()
                for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain / (variance + BATCH_NORM_EPS).sqrt()
            folded[key] = (published[key].double() * scale[:, None, None, None]).float()
            folded[f"{scope}{module}.bias"] = (bias - mean * scale).float()
    return folded


def load_efficientnet_lite0(path: Path) -> EfficientNetLite0:
    """The network with the weights of a published state dict, in evaluation mode."""
    published = torch.load(path, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict(fold_batch_norms(published))
    return network.eval()
