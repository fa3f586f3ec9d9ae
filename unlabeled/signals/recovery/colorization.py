"""Colorization: the distribution of each pixel's colour from the lightness alone (Zhang et al. 2016)."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.signal import Signal

# Side of a colour bin, width of the soft code, and the largest |a|, |b| of a gray, in units of Lab.
GRID, SIGMA, GRAY = 10, 5.0, 5.0
# sRGB ends before ±110 in a and b.
LIMIT = 110


def occupied_bins(ab: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cells of the 10-unit grid that colours fall into, and how many of them fall there.

    Args:
        ab: colours, float (N, 2), within ±110.

    Returns:
        Centres, float (Q, 2), and counts, float (Q,) of at least 1; rising in a, then in b.
    """
    side = 2 * LIMIT // GRID + 1
    row, column = ((ab + LIMIT) / GRID).round().long().unbind(1)
    counts = torch.bincount(row * side + column)
    cells = counts.nonzero().squeeze(1)
    centres = torch.stack((cells // side, cells % side), 1) * GRID - LIMIT
    return centres.float(), counts[cells].float()


def rebalanced(bins: Tensor, counts: Tensor, uniform_share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the prior of the bins and their weights in the loss, w ∝ 1 / ((1 - λ) p + λ / Q), Σ p w = 1.

    Args:
        bins: centres, float (Q, 2).
        counts: how many colours fall into each, float (Q,); smoothed between bins by a Gaussian of sigma 5.
        uniform_share: λ; 0: w ∝ 1 / p, 1: w = 1.

    Returns:
        p, w: float (Q,).
    """
    kernel = (torch.cdist(bins, bins).square() / (-2 * SIGMA**2)).exp()
    prior = (kernel / kernel.sum(0)) @ counts
    prior = prior / prior.sum()
    weights = 1 / ((1 - uniform_share) * prior + uniform_share / len(prior))
    return prior, weights / (prior * weights).sum()


def soft_code(ab: Tensor, bins: Tensor, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Return colours as mixtures of their nearest bins, weighted by exp(-d² / 2σ²), sigma 5.

    Args:
        ab: float (N, 2).
        bins: float (Q, 2).

    Returns:
        The k bins' numbers, int64 (N, k), the nearest first, and their shares, float (N, k), of sum 1; k is
        `neighbours`, or Q where that is less.
    """
    distances, nearest = torch.cdist(ab, bins).topk(min(neighbours, len(bins)), largest=False)
    return nearest, (distances.square() / (-2 * SIGMA**2)).softmax(1)


def soft_cross_entropy(logits: Tensor, nearest: Tensor, shares: Tensor) -> Tensor:
    """Return -Σ_q Z_q log Ẑ_q, float (…), for Ẑ = softmax of logits (…, Q) and Z a `soft_code` (…, k)."""
    return -(shares * logits.log_softmax(-1).gather(-1, nearest)).sum(-1)


def annealed_mean(logits: Tensor, bins: Tensor, temperature: float = 0.38) -> Tensor:
    """Return the mean colours (…, 2) of distributions, logits (…, Q), sharpened by a temperature.

    Temperature 1 gives the mean, which is grayish where colours compete; towards 0 it gives the most
    probable bin, which is spotty.
    """
    return (logits / temperature).softmax(-1) @ bins


def sampled(logits: Tensor, bins: Tensor) -> Tensor:
    """Draw colours (B, h, w, 2), each from its pixel's distribution, logits (B, h, w, Q).

    By the Gumbel trick with a draw per image and bin, not per pixel: each pixel follows its own
    distribution, and pixels that are alike get the same colour.
    """
    luck = -torch.empty_like(logits[:, :1, :1]).exponential_().log()
    return bins[(logits + luck).argmax(-1)]


def colorful(ab: Tensor) -> Tensor:
    """Return which images hold a colour with |a| or |b| above 5, bool (B,), for ab (B, h, w, 2)."""
    return ab.abs().amax((1, 2, 3)) > GRAY


def spread(ab: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Bring the colours (B, h, w, 2) of every `stride`-th pixel to all, (B, 2, *size): bilinear between them."""
    known = [(pixels - 1) * stride + 1 for pixels in ab.shape[1:3]]
    ab = F.interpolate(ab.movedim(3, 1), known, mode="bilinear", align_corners=True)
    return F.pad(ab, (0, size[1] - known[1], 0, size[0] - known[0]), mode="replicate")


class Colorization(Signal):
    """Colours as classes: Q bins of the ab plane, the cells of a 10-unit grid that hold colours of the data.

    The encoder sees the lightness alone, three times where a colour image has its channels. `prepare`
    decides the bins and their weights; Q is the length of `bins`.
    """

    family = "recovery"
    equation = "f(M(x)) = x"
    paper = "Zhang et al. 2016, Colorful Image Colorization"
    needs_color: ClassVar[bool] = True
    picture_rows = (
        "lightness",
        "image",
        "annealed mean",
        "sample",
        "sample",
        "sample",
        "worst: image",
        "worst: annealed mean",
    )
    bins: Tensor
    prior: Tensor
    weights: Tensor
    nearest: Tensor
    shares: Tensor

    def __init__(
        self,
        encoder: Encoder,
        stride: Annotated[
            int, Field(ge=1, le=4, description="colours are predicted at every such pixel")
        ] = 2,
        width: Annotated[int, Field(ge=4, description="channels of the head's first map")] = 64,
        neighbours: Annotated[int, Field(ge=1, description="bins that share the code of a colour")] = 5,
        uniform_share: Annotated[
            float, Field(ge=0, le=1, description="0: bins weigh by their rarity, 1: all the same")
        ] = 0.5,
        temperature: Annotated[
            float, Field(gt=0, description="of the mean that is shown: 1 the mean, near 0 the mode")
        ] = 0.38,
    ) -> None:
        super().__init__(encoder)
        self.stride, self.neighbours = stride, neighbours
        self.uniform_share, self.temperature = uniform_share, temperature
        height, width_pixels = encoder.image_shape[1:]
        half, full = (
            (-(-height // (stride * factor)), -(-width_pixels // (stride * factor))) for factor in (2, 1)
        )
        self.head = nn.Sequential(
            nn.Upsample(half),
            nn.Conv2d(encoder.map_channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Upsample(full),
            nn.Conv2d(width, width // 2, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Conv2d(width // 2, 1, 1)

    def prepare(self, sample: Tensor, count: int) -> None:
        """Decide the bins, their weights, and with their number the last layer, which starts at 0.

        Raises:
            InputError: the images are gray, in one channel or in three.
        """
        if sample.shape[1] != 3:
            raise InputError("colorization needs colour images; these have one channel: leave the method out")
        pixels = views.to_float(sample[:, :, :: self.stride, :: self.stride])
        ab = views.rgb_to_lab(pixels)[:, 1:].movedim(1, 3)
        ab = ab[colorful(ab)].flatten(0, 2)
        if not len(ab):
            raise InputError(
                "colorization needs colour images; those looked at are gray: leave the method out"
            )
        bins, counts = occupied_bins(ab)
        prior, weights = rebalanced(bins, counts, self.uniform_share)
        # The code of every colour, at whole units of a and b, which is finer than an eye: a step looks it up.
        unit = torch.arange(-LIMIT, LIMIT + 1.0)
        nearest, shares = soft_code(torch.cartesian_prod(unit, unit), bins, self.neighbours)
        for name, tensor in {"bins": bins, "prior": prior, "weights": weights}.items():
            self.register_buffer(name, tensor)
        for name, tensor in {"nearest": nearest, "shares": shares}.items():
            self.register_buffer(name, tensor, persistent=False)
        self.classifier = nn.Conv2d(self.classifier.in_channels, len(bins), 1)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.get_parameter("bias"))

    def logits(self, lightness: Tensor) -> Tensor:
        """Return the bins' logits, float32 (B, h, w, Q), for lightness L (B, 1, H, W) in [0, 100]."""
        gray = (lightness / 100).expand(-1, 3, -1, -1)
        return self.classifier(self.head(self.encoder.feature_map(gray))).movedim(1, 3).float()

    def targets(self, lab: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the colours to predict, ab (B, h, w, 2), their code (B, h, w, k) twice, and weights (B, h, w).

        A pixel weighs as its nearest bin does, and nothing in an image that is gray all over.
        """
        ab = lab[:, 1:, :: self.stride, :: self.stride].movedim(1, 3)
        row, column = (ab + LIMIT).round().long().unbind(3)
        colors = row * (2 * LIMIT + 1) + column
        nearest, shares = self.nearest[colors], self.shares[colors]
        return ab, nearest, shares, self.weights[nearest[..., 0]] * colorful(ab).view(-1, 1, 1)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        lab = views.rgb_to_lab(views.to_float(images))
        _, nearest, shares, weights = self.targets(lab)
        error = soft_cross_entropy(self.logits(lab[:, :1]), nearest, shares)
        return (weights * error).mean(), {"cross_entropy": error.detach().mean()}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how well colour images are coloured. Where none of these is one: chance 1, `bins`, all else 0.

        `cross_entropy`: the loss, nats per pixel, and `cross_entropy_prior`, that of the best answer which
        sees no image: the rebalanced prior. `accuracy`: of the most probable bin, a mean over the bins that
        occur, and `chance`. `chroma`: mean √(a² + b²) of the prediction, and `chroma_truth`: a net that
        shuns errors is pale. `bins`: Q.
        """
        lab = views.rgb_to_lab(views.to_float(images))
        ab, nearest, shares, weights = self.targets(lab)
        logits = self.logits(lab[:, :1])
        chosen = weights > 0
        truth, guess = nearest[..., 0][chosen], logits.argmax(-1)[chosen]
        counts, hits = (
            torch.bincount(bins, minlength=len(self.bins)) for bins in (truth, truth[truth == guess])
        )
        kinds = (counts > 0).sum().clamp(min=1)
        prior = (self.prior * self.weights).log().expand_as(logits)
        colors = annealed_mean(logits, self.bins, self.temperature)

        def mean(values: Tensor, weights: Tensor) -> Tensor:
            return (values * weights).sum() / weights.sum().clamp(min=1e-6)

        return {
            "cross_entropy": mean(soft_cross_entropy(logits, nearest, shares), weights),
            "cross_entropy_prior": mean(soft_cross_entropy(prior, nearest, shares), weights),
            "accuracy": (hits / counts.clamp(min=1)).sum() / kinds,
            "chance": 1 / kinds,
            "chroma": mean(colors.norm(dim=-1), chosen),
            "chroma_truth": mean(ab.norm(dim=-1), chosen),
            "bins": torch.tensor(float(len(self.bins))),
        }

    def picture(self, images: Tensor) -> Tensor:
        """Return eight images, and the eight of highest error, beside their predictions."""
        originals = views.to_float(images)
        lab = views.rgb_to_lab(originals)
        _, nearest, shares, weights = self.targets(lab)
        logits = self.logits(lab[:, :1])
        error = (weights * soft_cross_entropy(logits, nearest, shares)).mean((1, 2))
        worst = error.topk(min(8, len(images))).indices
        colors = annealed_mean(logits, self.bins, self.temperature)

        def painted(lab: Tensor, ab: Tensor) -> Tensor:
            ab = spread(ab, self.stride, (lab.shape[2], lab.shape[3]))
            return views.lab_to_rgb(torch.cat((lab[:, :1], ab), 1))

        return torch.stack(
            (
                painted(lab[:8], torch.zeros_like(colors[:8])),
                originals[:8],
                painted(lab[:8], colors[:8]),
                *(painted(lab[:8], sampled(logits[:8], self.bins)) for _ in range(3)),
                originals[worst],
                painted(lab[worst], colors[worst]),
            )
        )
