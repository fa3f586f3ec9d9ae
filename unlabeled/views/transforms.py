"""The seven transforms that SimCLR's ablation studies one by one (Chen et al. 2020, figures 4 and 5).

Each takes and returns float images (B, C, H, H) in [0, 1] and changes every image; only the jitter of the colours
and their loss have the paper's probabilities, 0.8 and 0.2.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.views.blur import random_blur
from unlabeled.views.color import random_color, random_grayscale
from unlabeled.views.geometry import random_crop
from unlabeled.views.holes import random_blocks

# SimCLR's 0.08 would leave nine pixels a side of an image of 32.
SMALLEST_CROP = 0.2


def random_cutout(images: Tensor, share: float = 0.25) -> Tensor:
    """Put gray in the place of a square, `share` of the area, anywhere in each image (DeVries & Taylor 2017)."""
    return torch.where(random_blocks(images, share, count=1), 0.5, images)


def random_color_distortion(images: Tensor, strength: float = 1.0) -> Tensor:
    """Jitter the colours with probability 0.8, then drop them with probability 0.2 (the paper's appendix A).

    `strength` 1 is the paper's for ImageNet. Of gray images only brightness and contrast change.
    """
    jitter = 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength
    return random_grayscale(random_color(images, *jitter, probability=0.8), 0.2)


def sobel(images: Tensor) -> Tensor:
    """Return the length of each channel's gradient: a step of height h gives h beside it, a flat image 0.

    The borders are repeated; nothing is random.
    """
    # Sums of shifted images: ten times as fast on a CPU as a convolution of single channels.
    padded = F.pad(images, (1, 1, 1, 1), "replicate")
    left, middle, right = (padded[..., column : column + images.shape[3]] for column in range(3))
    smooth, across = (left + 2 * middle + right) / 4, (right - left) / 4
    down = smooth[..., 2:, :] - smooth[..., :-2, :]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    return torch.hypot(across, down).clamp_(max=1)


def random_noise(images: Tensor, std: float = 0.1) -> Tensor:
    """Add Gaussian noise to every value; what leaves [0, 1] is cut to it."""
    return (images + std * torch.randn_like(images)).clamp_(0, 1)


def random_defocus(images: Tensor, largest: float = 0.04) -> Tensor:
    """Blur each image, sigma uniform up to a share of its height: at 32 pixels from 0.1 to 1.3."""
    return random_blur(images, (0.1, max(0.1, largest * images.shape[2])), probability=1.0)


def random_quarter_turns(images: Tensor) -> Tensor:
    """Turn each image by 0, 90, 180 or 270 degrees; pixels are moved, never resampled."""
    turns = torch.randint(4, (len(images), 1, 1, 1), device=images.device)
    images = torch.where(turns % 2 == 1, images.rot90(1, (2, 3)), images)
    return torch.where(turns >= 2, images.flip(2, 3), images)


# In the order of the paper's figure.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": partial(random_crop, area=(SMALLEST_CROP, 1.0)),
    "cutout": random_cutout,
    "color": random_color_distortion,
    "sobel": sobel,
    "noise": random_noise,
    "blur": random_defocus,
    "rotate": random_quarter_turns,
}
