"""Confidence: a net that restores images also predicts its own error, pixel by pixel (Kendall & Gal 2017)."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unlabeled import views
from unlabeled.measures.reconstruction import psnr
from unlabeled.measures.uncertainty import calibration_error, confidence_levels, sparsification_error
from unlabeled.nets.decoder import Decoder
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.recovery.denoising import Corruption, corrupt
from unlabeled.signals.signal import Signal
from unlabeled.views.holes import random_regions


def laplace(errors: Tensor, log_scales: Tensor) -> Tensor:
    """Return √2 |e| / σ + log σ: the Laplace negative log likelihood without its constant, ln √2 nats.

    Lowest at σ = √2 |e|. The log of σ is bounded to ±10: no error is worth an infinite loss.

    Args:
        errors: truth minus prediction, float, any shape.
        log_scales: log σ, the log of the standard deviation, of the same shape.
    """
    log_scales = log_scales.clamp(-10, 10)
    return 2**0.5 * errors.abs() * (-log_scales).exp() + log_scales


def gaussian(errors: Tensor, log_scales: Tensor) -> Tensor:
    """Return e² / 2σ² + log σ: the Gaussian negative log likelihood without its constant, ½ ln 2π nats.

    Lowest at σ² = e²; arguments as those of `laplace`.
    """
    log_scales = log_scales.clamp(-10, 10)
    return (errors * (-log_scales).exp()).square() / 2 + log_scales


def error_prediction(errors: Tensor, log_scales: Tensor) -> Tensor:
    """Return |e| + (ê - |e|)², ê = σ / √2: the size of the error is regressed, and does not move the error.

    σ / √2 is the mean |e| of the Laplace distribution of that σ; arguments as those of `laplace`.
    """
    sizes = errors.abs()
    return sizes + (log_scales.clamp(-10, 10).exp() / 2**0.5 - sizes.detach()).square()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "laplace": laplace,
    "gaussian": gaussian,
    "error": error_prediction,
}


def mean_of(values: Tensor, asked: Tensor) -> Tensor:
    """Return the mean over the pixels asked for of each image, then over the images.

    Args:
        values: float (B, C, H, W).
        asked: bool (B, 1, H, W); an image of which nothing is asked counts 0.
    """
    sums = (values.mean(1, keepdim=True) * asked).flatten(1).sum(1)
    return (sums / asked.flatten(1).sum(1).clamp(min=1)).mean()


class Confidence(Signal):
    """Denoising or inpainting with two answers for each pixel: its value, and the scale of the error in it.

    Where an error cannot be avoided a large scale makes it cheap, and log σ makes a large scale dear. During
    the warm-up, by default the whole run, the values learn from the plain error and the scales follow: weighed
    by its scale, an error that is hard to mend is given up (Seitzer et al. 2022), and features, calibration and
    sparsification are worse for it.
    """

    family = "uncertainty"
    equation = "f(x) = own error"
    paper = "Kendall & Gal 2017, What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?"
    picture_rows = ("image", "corrupted", "restored", "expected error", "true error")

    def __init__(
        self,
        encoder: Encoder,
        task: Annotated[
            Literal["denoising", "inpainting"], Field(description="what is restored, and its error predicted")
        ] = "denoising",
        likelihood: Annotated[
            Literal["laplace", "gaussian", "error"],
            Field(description="of the errors; error: their size is regressed instead"),
        ] = "laplace",
        corruption: Annotated[
            Corruption, Field(description="what is done to an image; denoising")
        ] = "masking",
        strength: Annotated[
            float, Field(gt=0, le=1, description="share corrupted; gaussian: standard deviation; denoising")
        ] = 0.5,
        hole: Annotated[
            float, Field(gt=0, lt=1, description="share of the image taken away; inpainting")
        ] = 0.25,
        warm_up: Annotated[
            float, Field(ge=0, le=1, description="share of the steps in which scales do not weigh errors")
        ] = 1.0,
        width: Annotated[int, Field(ge=4, description="channels of the decoder's first map")] = 64,
    ) -> None:
        super().__init__(encoder)
        channels, height, columns = encoder.image_shape
        self.decoder = Decoder(
            encoder.feature_dim, (2 * channels, height, columns), width, float(encoder.mean)
        )
        # The first values are the mean of all pixels: their errors have the deviation of all pixels.
        scale_bias = self.decoder.out.get_parameter("bias").view(2, -1)[1]
        nn.init.constant_(scale_bias, math.log(float(encoder.std)))
        self.task, self.hole = task, hole
        self.corruption: Corruption = corruption
        self.strength = strength
        self.likelihood, self.warm_up = likelihood, warm_up
        self.distribution: Literal["laplace", "gaussian"] = (
            "gaussian" if likelihood == "gaussian" else "laplace"
        )

    def corrupt(self, originals: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrupted images and which pixels are asked for, bool (B, 1, H, W): those changed."""
        if self.task == "inpainting":
            holes = random_regions(originals, self.hole)
            return torch.where(holes, self.encoder.mean, originals), holes
        corrupted, hit = corrupt(originals, self.corruption, self.strength)
        return corrupted, hit.any(1, keepdim=True)

    def restore(self, corrupted: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and log scales, float32 (B, C, H, W) each."""
        values, log_scales = self.decoder(self.encoder(corrupted)).float().chunk(2, 1)
        return values, log_scales

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals = views.to_float(images)
        corrupted, asked = self.corrupt(originals)
        values, log_scales = self.restore(corrupted)
        errors = originals - values
        loss = LOSSES[self.likelihood]
        if self.progress < self.warm_up:
            likelihood = loss(errors, torch.zeros_like(errors)) + loss(errors.detach(), log_scales)
        else:
            likelihood = loss(errors, log_scales)
        total = mean_of(likelihood, asked)
        return total, {
            "error": mean_of(errors.detach().abs(), asked),
            "scale": mean_of(log_scales.detach().exp(), asked),
        }

    def expected_errors(self, log_scales: Tensor) -> Tensor:
        """Return the mean |e| of the predicted distributions."""
        return log_scales.clamp(-10, 10).exp() * (
            (2 / math.pi) ** 0.5 if self.distribution == "gaussian" else 0.5**0.5
        )

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how well the errors are foretold.

        `nll`, nats per number, constants left out, beside `nll_constant`, with the one scale that suits the
        true errors best; it may be negative, and lower is not more accurate. `ause`, the area between the
        sparsification curve and the oracle's, beside `ause_random`. `correlation` of expected and true |e|.
        `calibration_error`: mean distance of coverage from its prediction. `psnr` in dB beside
        `psnr_corrupted`.
        """
        originals = views.to_float(images)
        corrupted, asked = self.corrupt(originals)
        values, log_scales = self.restore(corrupted)
        chosen = asked.expand_as(originals)
        errors, logs = (originals - values)[chosen], log_scales[chosen]
        sizes, expected = errors.abs(), self.expected_errors(logs)
        if self.distribution == "gaussian":
            nll, best = gaussian, errors.square().mean().log() / 2
        else:
            nll, best = laplace, (2**0.5 * sizes.mean()).log()
        ause, ause_random = sparsification_error(sizes, expected)
        levels = confidence_levels(errors, logs.clamp(-10, 10).exp(), self.distribution)
        restored = torch.where(asked, values, originals).clamp(0, 1)
        return {
            "nll": nll(errors, logs).mean(),
            "nll_constant": nll(errors, best.expand_as(errors)).mean(),
            "ause": ause,
            "ause_random": ause_random,
            "correlation": torch.corrcoef(torch.stack((expected, sizes)))[0, 1].nan_to_num(),
            "calibration_error": calibration_error(levels),
            "psnr": psnr(restored, originals),
            "psnr_corrupted": psnr(corrupted, originals),
        }

    def picture(self, images: Tensor) -> Tensor:
        """Return eight images; both errors are shown on one scale, on which the largest true one is white."""
        originals = views.to_float(images[:8])
        corrupted, asked = self.corrupt(originals)
        values, log_scales = self.restore(corrupted)
        errors = torch.stack((self.expected_errors(log_scales), (originals - values).abs()))
        # One gray per pixel: the mean over the colours.
        errors = (errors.mean(2, keepdim=True) * asked).expand_as(torch.stack((originals, originals)))
        errors = errors / errors[1].max().clamp(min=1e-6)
        restored = torch.where(asked, values, originals)
        return torch.cat((torch.stack((originals, corrupted, restored)), errors)).clamp(0, 1)
