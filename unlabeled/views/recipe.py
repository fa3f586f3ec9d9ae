"""The random view that the contrastive signals share."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unlabeled.views.blur import random_blur
from unlabeled.views.color import random_color, random_grayscale
from unlabeled.views.geometry import random_crop
from unlabeled.views.random import to_float


def contrastive_view(
    images: Tensor,
    crop: Mapping[str, Any],
    color: tuple[float, float, float, float],
    grayscale: float = 0.2,
    blur: float = 0.3,
    blur_sigma: float = 0.04,
) -> Tensor:
    """Return a random view of each image: crop, colour jitter, gray, blur, in SimCLR's order (Chen et al. 2020).

    Milder than theirs, for small images: callers keep at least 0.4 of the image in a crop where they keep 0.08, and
    turn it by up to 10 degrees where they do not; the blur is rarer (they blur half of the views) and scales with
    the image. The jitter is in all views; they leave it out in a fifth of them.

    Args:
        images: uint8 (B, C, H, W).
        crop: settings of `random_crop`: area, aspect, flip, degrees.
        color: largest relative change of brightness, contrast and saturation; largest turn of the hue.
        grayscale: probability of a gray view.
        blur: probability of a blurred view.
        blur_sigma: largest blur, a share of the image's height.

    Returns:
        float (B, C, H, W) in [0, 1].
    """
    view = random_crop(to_float(images), **crop)
    view = random_grayscale(random_color(view, *color), grayscale)
    if blur > 0:
        view = random_blur(view, (0.1, max(0.1, blur_sigma * images.shape[2])), blur)
    return view
