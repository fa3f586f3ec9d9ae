"""Random views of images: batched tensor operations on the device the images lie on.

Every function takes and returns float images (B, C, H, W) in [0, 1], C = 1 or 3, and draws each image's
parameters on its own from `generator`, or from PyTorch's global one. Nothing here loops over images.
"""

from unlabeled.views.blur import gaussian_blur, random_blur
from unlabeled.views.color import (
    brightness,
    contrast,
    grayscale,
    hue,
    random_color,
    random_grayscale,
    random_solarize,
    saturation,
    solarize,
)
from unlabeled.views.geometry import random_crop, resample
from unlabeled.views.lab import lab_to_rgb, rgb_to_lab
from unlabeled.views.patches import (
    cut_patches,
    drop_colors,
    lay_patches,
    normalize_patches,
    random_resolution,
)
from unlabeled.views.random import chance, to_float, uniform
from unlabeled.views.warps import Warp, cell_centres, in_frame, random_warp

__all__ = [
    "Warp",
    "brightness",
    "cell_centres",
    "chance",
    "contrast",
    "cut_patches",
    "drop_colors",
    "gaussian_blur",
    "grayscale",
    "hue",
    "in_frame",
    "lab_to_rgb",
    "lay_patches",
    "normalize_patches",
    "random_blur",
    "random_color",
    "random_crop",
    "random_grayscale",
    "random_resolution",
    "random_solarize",
    "random_warp",
    "resample",
    "rgb_to_lab",
    "saturation",
    "solarize",
    "to_float",
    "uniform",
]
