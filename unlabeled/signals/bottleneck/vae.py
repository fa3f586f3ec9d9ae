"""The variational autoencoder: an image comes back through a code that noise blurs (Kingma & Welling 2014)."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.distributed import gather
from unlabeled.measures.reconstruction import psnr
from unlabeled.nets.decoder import Decoder
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.likelihood import discretized_logistic
from unlabeled.signals.signal import Signal

IMPORTANCE_SAMPLES = 16
# Of the logistic, in units of [0, 1]: from a tenth of a level to wider than all levels.
LOG_SCALES = math.log(0.1 / 255), math.log(2.0)
ACTIVE_VARIANCE = 0.01


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) ‖ N(0, 1)) of each dimension, in nats: (B, D) like the arguments."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


def reparameterized(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Draw z = μ + σ ε, through which gradients reach both arguments, (B, D) like them."""
    return mean + (log_variance / 2).exp() * torch.randn_like(mean)


def log_density(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log N(z; mean, variance), (B,), summed over the dimensions of (B, D)."""
    squares = (z - mean).square() / log_variance.exp()
    return -(squares + log_variance + math.log(2 * math.pi)).sum(1) / 2


def importance_bound(log_weights: Tensor) -> Tensor:
    """Return log (1/K) Σ_k w_k, (B,), of log w = log p(x, z) - log q(z | x), (K, B) (Burda et al. 2016)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


class VAE(Signal):
    """A convolutional VAE; the mean of the code is a linear map of the features.

    The likelihood is one of 8-bit levels, so that the bound is in honest bits: a logistic whose mean and scale
    the decoder gives, cut into 256 bins; or a Bernoulli, of images binarised at half.
    """

    family = "bottleneck"
    equation = "f(g(x)) = x"
    paper = "Kingma & Welling 2014, Auto-Encoding Variational Bayes"
    picture_rows = ("image", "reconstruction", "sample", "interpolation")

    def __init__(
        self,
        encoder: Encoder,
        code_dim: Annotated[int, Field(ge=1, description="dimensions of the code")] = 32,
        width: Annotated[int, Field(ge=4, description="channels of the decoder's first map")] = 64,
        free_bits: Annotated[
            float, Field(ge=0, description="nats of each code dimension that cost nothing: no collapse")
        ] = 0.25,
        likelihood: Annotated[
            Literal["logistic", "bernoulli"], Field(description="of 256 levels, or of images binarised")
        ] = "logistic",
    ) -> None:
        super().__init__(encoder)
        channels, *size = encoder.image_shape
        self.code = nn.Linear(encoder.feature_dim, 2 * code_dim)
        outputs = 2 * channels if likelihood == "logistic" else channels
        self.decoder = Decoder(code_dim, (outputs, size[0], size[1]), width, 0.0)
        self.code_dim, self.free_bits, self.likelihood = code_dim, free_bits, likelihood
        self.bits = 8.0 if likelihood == "logistic" else 1.0
        self.dimensions = channels * size[0] * size[1]

    def target(self, images: Tensor) -> Tensor:
        """Return what is to come back of uint8 images, float (B, C, H, W): in [0, 1], or 0 and 1."""
        originals = views.to_float(images)
        return originals if self.likelihood == "logistic" else originals.round()

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the codes, (B, code_dim) both, of float images (B, C, H, W)."""
        mean, log_variance = self.code(self.encoder(images)).float().chunk(2, 1)
        return mean, log_variance.clamp(-14, 14)

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean images, float (B, C, H, W) in [0, 1], of codes."""
        if self.likelihood == "bernoulli":
            return self.decoder(z).float().sigmoid()
        return self.logistic(z)[0].clamp(0, 1)

    def logistic(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log scale, float (B, C, H, W) both, in units of [0, 1]."""
        mean, log_scale = self.decoder(z).float().chunk(2, 1)
        return mean + self.encoder.mean, (log_scale - 2).clamp(*LOG_SCALES)

    def log_likelihood(self, originals: Tensor, z: Tensor) -> Tensor:
        """Return log p(x | z) in nats, (B,), summed over the pixels and channels."""
        if self.likelihood == "bernoulli":
            pixels = -F.binary_cross_entropy_with_logits(self.decoder(z).float(), originals, reduction="none")
        else:
            pixels = discretized_logistic(originals, *self.logistic(z))
        return pixels.flatten(1).sum(1)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals = self.target(images)
        mean, log_variance = self.posterior(originals)
        error = -self.log_likelihood(originals, reparameterized(mean, log_variance)).mean()
        rate = gather(divergence(mean, log_variance)).mean(0)
        bits = (error + rate.sum()) / (self.dimensions * math.log(2))
        loss = error + rate.clamp(min=self.free_bits).sum()
        return loss, {"bits_per_dim": bits.detach(), "divergence": rate.sum().detach()}

    def log_weights(self, originals: Tensor, samples: int) -> Tensor:
        """Return log p(x, z) - log q(z | x) in nats, (samples, B), z drawn from q."""
        mean, log_variance = self.posterior(originals)
        weights = []
        for _ in range(samples):
            z = reparameterized(mean, log_variance)
            prior = log_density(z, torch.zeros_like(z), torch.zeros_like(z))
            weights.append(self.log_likelihood(originals, z) + prior - log_density(z, mean, log_variance))
        return torch.stack(weights)

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return the ELBO and the importance bound in bits per dimension beside those of uniform levels.

        And the units in use, those whose mean varies over the images, of all; and the PSNR in dB beside that
        of each image's own mean colour.
        """
        originals = self.target(images)
        weights = self.log_weights(originals, IMPORTANCE_SAMPLES)
        nats_per_bit = self.dimensions * math.log(2)
        mean, _ = self.posterior(originals)
        flat = originals.mean((2, 3), keepdim=True).expand_as(originals)
        return {
            "bits_per_dim": -weights.mean() / nats_per_bit,
            "bits_per_dim_importance": -importance_bound(weights).mean() / nats_per_bit,
            "bits_per_dim_uniform": torch.tensor(self.bits),
            "active_units": (mean.var(0) > ACTIVE_VARIANCE).sum().float(),
            "units": torch.tensor(float(self.code_dim)),
            "psnr": psnr(self.decode(mean), originals),
            "psnr_mean_fill": psnr(flat, originals),
        }

    def picture(self, images: Tensor) -> Tensor:
        originals = self.target(images[:8])
        mean, _ = self.posterior(originals)
        way = torch.linspace(0, 1, len(mean), device=mean.device).unsqueeze(1)
        between = torch.lerp(mean[:1], mean[-1:], way)
        return torch.stack((originals, *(self.decode(z) for z in (mean, torch.randn_like(mean), between))))
