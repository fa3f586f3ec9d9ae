"""Diffusion: the noise in an image is found at every level of noise (Ho et al. 2020)."""

import copy
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.noise import NoiseProcess
from unlabeled.nets.unet import UNet
from unlabeled.signals.signal import Signal

BOUND_DRAWS, BOUND_PIXELS = 4, 200_000


class Diffusion(Signal):
    """DDPM with L_simple; the encoder is the contracting path of its U-Net, and is fed the noised images.

    Samples and the bound come from an average of the weights over the steps.
    """

    family = "recovery"
    equation = "f(M(x)) = x"
    paper = "Ho et al. 2020, Denoising Diffusion Probabilistic Models"
    picture_rows = (
        "image",
        "noised",
        "one-step estimate",
        "noise",
        "sampled",
        "sampled",
        "sampled",
        "sample",
    )
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 2e-3,
        "batch_size": 128,
        "gradient_clip": 1.0,
    }

    updates: Tensor

    def __init__(
        self,
        encoder: Encoder,
        steps: Annotated[int, Field(ge=2, description="levels of noise, T")] = 200,
        schedule: Annotated[
            Literal["linear", "cosine"], Field(description="how the noise grows; both end in pure noise")
        ] = "linear",
        variance: Annotated[
            Literal["beta", "posterior"], Field(description="noise added by a sampling step; the bound's too")
        ] = "beta",
        width: Annotated[
            int, Field(ge=8, multiple_of=8, description="channels of the U-Net beside the encoder")
        ] = 16,
        average: Annotated[
            float, Field(ge=0, lt=1, description="decay of the average of the weights, per step")
        ] = 0.998,
        sampling_steps: Annotated[
            int, Field(ge=0, description="of DDIM, for the pictures; 0: ancestral sampling, all T")
        ] = 25,
    ) -> None:
        super().__init__(encoder)
        self.unet = UNet(encoder.image_shape[0], encoder.map_channels, width)
        self.process = NoiseProcess(steps, schedule, variance)
        self.average_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.average_unet = copy.deepcopy(self.unet).requires_grad_(False)
        self.decay, self.sampling_steps = average, sampling_steps
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        clean = 2 * views.to_float(images) - 1
        t = torch.randint(1, self.process.steps + 1, (len(images),), device=images.device)
        noise = torch.randn_like(clean)
        seen = self.unet(self.process.noised(clean, t, noise), t / self.process.steps, self.encoder)
        return F.mse_loss(seen.float(), noise), {}

    @torch.no_grad()
    def after_step(self) -> None:
        self.updates += 1
        # A young average is that of few steps: the weights at the start are soon forgotten.
        decay = (self.updates / (self.updates + 10)).clamp(max=self.decay)
        means, values = (
            [value for net in nets for value in net.state_dict().values() if value.is_floating_point()]
            for nets in ((self.average_encoder, self.average_unet), (self.encoder, self.unet))
        )
        torch._foreach_mul_(means, decay)
        torch._foreach_add_(means, torch._foreach_mul(values, 1 - decay))

    def denoiser(self, noised: Tensor, t: Tensor) -> Tensor:
        """Return the noise that the averaged weights see in images x_t, int64 t (B,) in 1 … T."""
        return self.average_unet(noised, t / self.process.steps, self.average_encoder)

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return the bound in bits per dimension beside that of uniform levels, and L_simple beside that of 0.

        An estimate without bias: of each image a few times, of large images only as many as time allows.
        """
        images = images[: max(2, BOUND_PIXELS // images[0, 0].numel())]
        bits, error = self.process.bound(2 * views.to_float(images) - 1, self.denoiser, BOUND_DRAWS)
        return {
            "bits_per_dim": bits.mean(),
            "bits_per_dim_uniform": torch.tensor(8.0),
            "noise_error": error.mean(),
            "noise_error_of_zero": torch.tensor(1.0),
        }

    def picture(self, images: Tensor) -> Tensor:
        clean = 2 * views.to_float(images[:8]) - 1
        t = torch.full((len(clean),), -(-self.process.steps // 4), device=images.device)
        noised = self.process.noised(clean, t, torch.randn_like(clean))
        estimate = self.process.clean(noised, t, self.denoiser(noised, t))
        path = self.process.sample(self.denoiser, torch.randn_like(clean), self.sampling_steps)
        shown = [path[(len(path) - 1) * quarter // 4] for quarter in range(5)]
        return ((torch.stack((clean, noised, estimate, *shown)) + 1) / 2).clamp(0, 1)
