"""The encoders: images in, features out. Normalisation is inside: training and serving cannot differ."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.errors import InputError
from unlabeled.files import read_json
from unlabeled.nets.pixel_cnn import pixel_cnn
from unlabeled.nets.pointwise import Pointwise
from unlabeled.nets.vit import VisionTransformer

MODEL, CONFIG = "model.safetensors", "config.json"


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016), stride on the first."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential(
            Pointwise(channels_in, channels_out, stride, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


def small_resnet(channels: int, size: int, width: int) -> tuple[nn.Module, int]:
    """Return a ResNet of one stem and two blocks, for small images on a CPU, and the channels of its map."""
    stem = width // 4
    return nn.Sequential(
        nn.Conv2d(channels, stem, 3, 2 if size >= 16 else 1, 1, bias=False),
        nn.BatchNorm2d(stem),
        nn.ReLU(inplace=True),
        BasicBlock(stem, width, 2),
        BasicBlock(width, 2 * width, 2),
    ), 2 * width


def resnet18(channels: int, size: int) -> tuple[nn.Module, int]:
    """Return torchvision's ResNet-18 up to its last map (512 channels).

    Images of up to 64 px get SimCLR's stem for small images: a 3x3 convolution of stride 1, no max-pool.
    """
    import torchvision  # seconds: only where it is asked for

    net = torchvision.models.resnet18(weights=None)
    small = size <= 64
    stem = (
        nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        if small
        else nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    )
    pool = nn.Identity() if small else net.maxpool
    return nn.Sequential(stem, net.bn1, net.relu, pool, net.layer1, net.layer2, net.layer3, net.layer4), 512


class Encoder(nn.Module):
    """An encoder with its normalisation: float images (B, C, H, W) in [0, 1] to float features (B, D).

    Attributes:
        image_shape: (C, H, W) that it is trained on.
        feature_dim: D.
        map_channels: channels of `feature_map`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, width: int, pool: int, image_shape: tuple[int, int, int], mean: float, std: float
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "name": name,
            "width": width,
            "pool": pool,
            "image_shape": list(image_shape),
            "mean": mean,
            "std": std,
        }
        channels, height, width_pixels = image_shape
        self.image_shape = channels, height, width_pixels
        self.pool = pool
        if name == "small_resnet":
            self.net, self.map_channels = small_resnet(channels, height, width)
        elif name == "resnet18":
            self.net, self.map_channels = resnet18(channels, height)
        elif name == "tiny_vit":
            self.net, self.map_channels = VisionTransformer(self.image_shape, 3 * width), 3 * width
        elif name == "pixel_cnn":
            self.net, self.map_channels = pixel_cnn(channels, width)
        else:
            raise InputError(f"no encoder '{name}'; valid: small_resnet, resnet18, tiny_vit, pixel_cnn")
        self.feature_dim = self.map_channels * pool * pool
        if isinstance(self.net, VisionTransformer):
            self.feature_dim += self.net.dim
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(max(std, 1e-3)))

    def feature_map(self, images: Tensor) -> Tensor:
        """Return the last map (B, map_channels, h, w)."""
        output = self.net(self.normalised(images))
        return output[1] if isinstance(self.net, VisionTransformer) else output

    def normalised(self, images: Tensor) -> Tensor:
        """Return what the net sees: mean 0 and deviation 1 over the train images."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.net, VisionTransformer):
            cls, maps = self.net(self.normalised(images))
            return torch.cat((cls, average_pool(maps, self.pool).flatten(1)), 1)
        return average_pool(self.feature_map(images), self.pool).flatten(1)


def average_pool(maps: Tensor, size: int) -> Tensor:
    """Average maps (B, C, h, w) to (B, C, size, size), as adaptive average pooling does.

    Written as two matrix products where the window varies: ONNX has no adaptive pooling.
    """
    height, width = maps.shape[-2:]
    if height % size == 0 and width % size == 0:
        return F.avg_pool2d(maps, (height // size, width // size))
    rows, columns = (maps.new_tensor(_pooling_weights(n, size)) for n in (height, width))
    return rows @ maps @ columns.T


def _pooling_weights(n: int, size: int) -> list[list[float]]:
    """Return (size, n) weights: window i covers floor(i n / size) up to ceil((i + 1) n / size)."""
    windows = [range(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return [[1 / len(window) if column in window else 0.0 for column in range(n)] for window in windows]


def load_encoder(model: Path | str) -> Encoder:
    """Return the encoder of a model artifact (`config.json`, `model.safetensors`), in eval mode, on the CPU.

    Raises:
        InputError: the folder is no model artifact.
    """
    folder = Path(model)
    if not (folder / CONFIG).is_file() or not (folder / MODEL).is_file():
        raise InputError(f"{folder} is no model: {CONFIG} and {MODEL} belong there")
    encoder = Encoder(**read_json(folder / CONFIG)["encoder"])
    weights = load_file(folder / MODEL)
    encoder.load_state_dict(
        {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    )
    return encoder.eval()
