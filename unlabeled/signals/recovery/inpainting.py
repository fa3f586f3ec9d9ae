"""Inpainting, the context encoder: a hole is filled from its surroundings (Pathak et al. 2016)."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.errors import InputError
from unlabeled.measures.reconstruction import psnr
from unlabeled.nets.decoder import Decoder
from unlabeled.nets.discriminator import Discriminator, discriminator_loss, judge_frozen
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.signal import Signal
from unlabeled.views.holes import central_square, diffusion_fill, random_blocks, random_regions

# What makes holes, bool (B, 1, H, W), in float images (B, C, H, W), by the share of the area to take.
HOLES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "central": central_square,
    "blocks": random_blocks,
    "regions": random_regions,
}


def hole_error(
    predicted: Tensor, originals: Tensor, holes: Tensor, overlap: int, overlap_weight: float
) -> Tensor:
    """Return the squared error in the holes and in a band of the context around them.

    A mean over each image's hole and band, then over the images; what lies outside counts nothing. The band
    weighs more, for the net sees it: the filling has to go on from there without a seam.

    Args:
        predicted, originals: float (B, C, H, W).
        holes: bool (B, 1, H, W), in every image a pixel at least.
        overlap: width of the band, pixels.
        overlap_weight: weight of its pixels; the holes' is 1.
    """
    region = F.max_pool2d(holes.float(), 2 * overlap + 1, 1, overlap)
    weights = torch.where(holes, 1.0, overlap_weight * region)
    errors = (weights * (predicted.float() - originals).square()).mean(1).flatten(1).sum(1)
    return (errors / region.flatten(1).sum(1)).mean()


def adversarial_losses(discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the discriminator minimises, and what the net that made the fakes does (non-saturating).

    The first moves the discriminator alone, the second the fakes alone: their sum takes one backward.

    Args:
        discriminator: images to logits (B,), high for real ones.
        real, fake: float (B, C, H, W).
    """
    judging = discriminator_loss(discriminator(real), discriminator(fake.detach()))
    return judging, F.softplus(-judge_frozen(discriminator, fake).float()).mean()


def hole_psnr(filled: Tensor, originals: Tensor, holes: Tensor) -> Tensor:
    """Return the PSNR in dB over the holes alone, the mean over the images.

    Args:
        filled, originals: float (B, C, H, W) in [0, 1].
        holes: bool (B, 1, H, W).
    """
    errors = (filled - originals) * holes
    shares = holes.float().mean((2, 3), keepdim=True)
    return psnr(errors / shares.sqrt(), torch.zeros_like(errors))


class Inpainting(Signal):
    """The context encoder; holes at random places, for the features are to serve whole images."""

    family = "recovery"
    equation = "f(M(x)) = x"
    paper = "Pathak et al. 2016, Context Encoders: Feature Learning by Inpainting"
    picture_rows = ("image", "hole", "filled", "diffusion fill")
    mean_colour: Tensor

    def __init__(
        self,
        encoder: Encoder,
        hole: Annotated[
            Literal["central", "blocks", "regions"],
            Field(description="one square in the middle, four at random places, or any shape"),
        ] = "blocks",
        share: Annotated[float, Field(gt=0, lt=1, description="share of the image in the hole")] = 0.25,
        overlap: Annotated[int, Field(ge=0, description="pixels around the hole that are predicted too")] = 2,
        overlap_weight: Annotated[
            float, Field(gt=0, description="weight of their error; the hole's is 1")
        ] = 10.0,
        adversarial: Annotated[
            float, Field(ge=0, lt=1, description="weight of the adversarial term, of 1 in all; 0: none")
        ] = 0.001,
        width: Annotated[int, Field(ge=4, description="channels of the decoder's first map")] = 64,
        discriminator_width: Annotated[
            int, Field(ge=1, description="channels of the discriminator's first map")
        ] = 8,
    ) -> None:
        super().__init__(encoder)
        if adversarial and min(encoder.image_shape[1:]) < 8:
            raise InputError(
                "inpainting: the discriminator needs images of 8 px; set pretrain.inpainting.adversarial: 0"
            )
        self.decoder = Decoder(encoder.feature_dim, encoder.image_shape, width, float(encoder.mean))
        self.discriminator = Discriminator(encoder.image_shape, discriminator_width) if adversarial else None
        self.register_buffer("mean_colour", encoder.mean.repeat(encoder.image_shape[0]).view(-1, 1, 1))
        self.hole, self.share = hole, share
        self.overlap, self.overlap_weight, self.adversarial = overlap, overlap_weight, adversarial

    def prepare(self, sample: Tensor, count: int) -> None:
        self.mean_colour.copy_(views.to_float(sample).mean((0, 2, 3)).view(-1, 1, 1))

    def holes(self, originals: Tensor) -> Tensor:
        """Return fresh holes, bool (B, 1, H, W)."""
        return HOLES[self.hole](originals, self.share)

    def predict(self, originals: Tensor, holes: Tensor) -> Tensor:
        """Return whole predicted images (B, C, H, W); in place of the hole the net sees the mean colour."""
        return self.decoder(self.encoder(torch.where(holes, self.mean_colour, originals)))

    def fill(self, originals: Tensor, holes: Tensor) -> Tensor:
        """Return the images with their holes filled, float (B, C, H, W) in [0, 1]."""
        return torch.where(holes, self.predict(originals, holes).float().clamp(0, 1), originals)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals = views.to_float(images)
        holes = self.holes(originals)
        predicted = self.predict(originals, holes)
        error = hole_error(predicted, originals, holes, self.overlap, self.overlap_weight)
        if self.discriminator is None:
            return error, {"reconstruction": error}
        # The hole and nothing around it: a seam would give every fake away.
        real, fake = ((shown - self.mean_colour) * holes for shown in (originals, predicted))
        judging, fooling = adversarial_losses(self.discriminator, real, fake)
        joint = (1 - self.adversarial) * error + self.adversarial * fooling
        return joint + judging, {"reconstruction": error, "discriminator": judging, "generator": fooling}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return the PSNR in dB within the hole beside those of the mean colour and of the smoothest fill."""
        originals = views.to_float(images)
        holes = self.holes(originals)
        return {
            "psnr": hole_psnr(self.fill(originals, holes), originals, holes),
            "psnr_mean_fill": hole_psnr(self.mean_colour.expand_as(originals), originals, holes),
            "psnr_diffusion_fill": hole_psnr(diffusion_fill(originals, holes), originals, holes),
        }

    def picture(self, images: Tensor) -> Tensor:
        originals = views.to_float(images[:8])
        holes = self.holes(originals)
        shown = torch.where(holes, self.mean_colour, originals)
        filled, smooth = self.fill(originals, holes), diffusion_fill(originals, holes)
        return torch.stack((originals, shown, filled, smooth.clamp(0, 1)))
