"""The denoising autoencoder: a clean image from a corrupted one (Vincent et al. 2008)."""

from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.measures.reconstruction import psnr
from unlabeled.nets.decoder import Decoder
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.signal import Signal
from unlabeled.views.holes import diffusion_fill, grid_blocks

Corruption = Literal["masking", "gaussian", "salt_and_pepper"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)


def corrupt(images: Tensor, corruption: Corruption, strength: float) -> tuple[Tensor, Tensor]:
    """Return corrupted images and which of their values are, drawn anew at every call.

    Args:
        images: float (B, C, H, W) in [0, 1].
        strength: gaussian: standard deviation of the noise, which is not clipped; masking: share of the 4x4
            blocks that become 0, black; salt_and_pepper: share of the values that become 0 or 1.

    Returns:
        float and bool (B, C, H, W).
    """
    if corruption == "gaussian":
        return images + strength * torch.randn_like(images), torch.ones_like(images, dtype=torch.bool)
    if corruption == "masking":
        masked = grid_blocks(images, strength).expand_as(images)
        return images.masked_fill(masked, 0), masked
    draws = torch.rand_like(images)
    hit = draws < strength
    return torch.where(hit, (draws < strength / 2).to(images), images), hit


def restoration_error(restored: Tensor, originals: Tensor, corrupted: Tensor, intact_weight: float) -> Tensor:
    """Return the mean squared error, in which values that were not corrupted weigh `intact_weight`.

    The emphasised variant of Vincent et al. 2008; 1 weighs all alike, 0 asks for the corrupted ones alone.

    Args:
        restored, originals: float (B, C, H, W).
        corrupted: bool (B, C, H, W).
    """
    weights = torch.where(corrupted, 1.0, intact_weight)
    return (weights * (restored.float() - originals).square()).mean()


def best_blur(corrupted: Tensor, originals: Tensor) -> Tensor:
    """Return the images under the Gaussian blur, one for all, that comes nearest to the originals."""
    radius = min(6, corrupted.shape[2] - 1, corrupted.shape[3] - 1)
    blurred = [
        views.gaussian_blur(corrupted, corrupted.new_full((len(corrupted),), sigma), radius)
        for sigma in (0.0, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0)
    ]
    return max(blurred, key=lambda images: psnr(images, originals).item())


def median_filter(images: Tensor) -> Tensor:
    """Return each value's median over its 3x3 neighbours; the border is repeated."""
    patches = F.pad(images, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    return patches.flatten(4).median(4).values


class Denoising(Signal):
    """A convolutional denoising autoencoder; its features are those of clean images."""

    family = "recovery"
    equation = "f(M(x)) = x"
    paper = "Vincent et al. 2008, Extracting and Composing Robust Features with Denoising Autoencoders"
    picture_rows = ("image", "corrupted", "restored")

    def __init__(
        self,
        encoder: Encoder,
        corruption: Annotated[Corruption, Field(description="what is done to an image")] = "masking",
        strength: Annotated[
            float, Field(ge=0, le=1, description="share that is corrupted; gaussian: standard deviation")
        ] = 0.5,
        intact_weight: Annotated[
            float, Field(ge=0, description="weight of the values left intact; the corrupted ones' is 1")
        ] = 1.0,
        width: Annotated[int, Field(ge=4, description="channels of the decoder's first map")] = 64,
    ) -> None:
        super().__init__(encoder)
        self.decoder = Decoder(encoder.feature_dim, encoder.image_shape, width, float(encoder.mean))
        self.corruption, self.strength, self.intact_weight = corruption, strength, intact_weight

    def restore(self, corrupted: Tensor) -> Tensor:
        """Return restored float images (B, C, H, W)."""
        return self.decoder(self.encoder(corrupted))

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals = views.to_float(images)
        corrupted, hit = corrupt(originals, self.corruption, self.strength)
        error = restoration_error(self.restore(corrupted), originals, hit, self.intact_weight)
        return error, {"reconstruction": error}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return the PSNR in dB of the restored images beside the corrupted ones' and a filter's.

        The filter knows the corruption: the best Gaussian blur, the median, or for masking the smoothest fill.
        """
        originals = views.to_float(images)
        corrupted, hit = corrupt(originals, self.corruption, self.strength)
        values = {
            "psnr": psnr(self.restore(corrupted).clamp(0, 1), originals),
            "psnr_corrupted": psnr(corrupted, originals),
            "psnr_blur": psnr(best_blur(corrupted, originals), originals),
        }
        if self.corruption == "masking":
            values["psnr_diffusion_fill"] = psnr(diffusion_fill(corrupted, hit[:, :1]), originals)
        if self.corruption == "salt_and_pepper":
            values["psnr_median"] = psnr(median_filter(corrupted), originals)
        return values

    def picture(self, images: Tensor) -> Tensor:
        originals = views.to_float(images[:8])
        corrupted, _ = corrupt(originals, self.corruption, self.strength)
        return torch.stack((originals, corrupted, self.restore(corrupted))).clamp(0, 1)
