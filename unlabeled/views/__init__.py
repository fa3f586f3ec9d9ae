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
from unlabeled.views.random import chance, to_float, uniform

__all__ = [
    "brightness",
    "chance",
    "contrast",
    "gaussian_blur",
    "grayscale",
    "hue",
    "random_blur",
    "random_color",
    "random_crop",
    "random_grayscale",
    "random_solarize",
    "resample",
    "saturation",
    "solarize",
    "to_float",
    "uniform",
]
