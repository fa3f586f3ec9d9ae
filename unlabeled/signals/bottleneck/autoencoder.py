"""The autoencoder: an image comes back through a code of few numbers (Hinton & Salakhutdinov 2006)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.distributed import gather
from unlabeled.measures.reconstruction import psnr
from unlabeled.nets.decoder import Decoder
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.signal import Signal


def sparsity_divergence(activations: Tensor, target: float) -> Tensor:
    """Return Σ_j KL(target ‖ mean of unit j over the batch) of units (B, K) in (0, 1) (Ng 2011)."""
    mean = activations.mean(0).clamp(1e-6, 1 - 1e-6)
    wanted = torch.full_like(mean, target)
    return (
        F.binary_cross_entropy(mean, wanted, reduction="none") - F.binary_cross_entropy(wanted, wanted)
    ).sum()


class Autoencoder(Signal):
    """A convolutional autoencoder whose decoder receives `code_dim` numbers and nothing else."""

    family = "bottleneck"
    equation = "f(g(x)) = x"
    paper = "Hinton & Salakhutdinov 2006, Reducing the Dimensionality of Data with Neural Networks"
    picture_rows = ("image", "reconstruction")

    def __init__(
        self,
        encoder: Encoder,
        code_dim: Annotated[
            int, Field(ge=0, description="numbers in the code; 0: the features themselves")
        ] = 64,
        width: Annotated[int, Field(ge=4, description="channels of the decoder's first map")] = 64,
        sparsity: Annotated[
            float, Field(ge=0, description="weight of the sparsity; above 0 the code is in (0, 1)")
        ] = 0.0,
        activity: Annotated[
            float, Field(gt=0, lt=1, description="mean of each code unit that sparsity aims at")
        ] = 0.05,
    ) -> None:
        super().__init__(encoder)
        self.code = nn.Linear(encoder.feature_dim, code_dim) if code_dim else nn.Identity()
        self.decoder = Decoder(
            code_dim or encoder.feature_dim, encoder.image_shape, width, float(encoder.mean)
        )
        self.sparsity, self.activity = sparsity, activity

    def encode(self, images: Tensor) -> Tensor:
        """Return the codes (B, code_dim) of float images (B, C, H, W)."""
        codes = self.code(self.encoder(images))
        return codes.sigmoid() if self.sparsity > 0 else codes

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals = views.to_float(images)
        codes = self.encode(originals)
        error = F.mse_loss(self.decoder(codes).float(), originals)
        values = {"reconstruction": error}
        if self.sparsity == 0:
            return error, values
        divergence = sparsity_divergence(gather(codes.float()), self.activity)
        return error + self.sparsity * divergence, values | {"sparsity": divergence}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return the PSNR in dB, a mean over images, beside that of each image's own mean colour."""
        originals = views.to_float(images)
        mean = originals.mean((2, 3), keepdim=True).expand_as(originals)
        reconstructed = self.decoder(self.encode(originals)).clamp(0, 1)
        return {"psnr": psnr(reconstructed, originals), "psnr_mean_fill": psnr(mean, originals)}

    def picture(self, images: Tensor) -> Tensor:
        originals = views.to_float(images[:8])
        return torch.stack((originals, self.decoder(self.encode(originals)).clamp(0, 1)))
