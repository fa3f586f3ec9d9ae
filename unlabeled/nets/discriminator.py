"""The discriminator: images in, a score of being real out."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


class Discriminator(nn.Module):
    """DCGAN's (Radford et al. 2016), for small images: float images (B, C, H, W), 8 px and up, to logits (B,).

    Three 4x4 convolutions of stride 2, the first without batch norm, and a linear map. Real and generated
    images come in batches of their own, or their statistics would give them away.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int = 16) -> None:
        super().__init__()
        channels, rows, columns = image_shape
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(),
            nn.Linear(4 * width * (rows // 8) * (columns // 8), 1),
        )
        for layer in self.net:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).squeeze(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return −log D(real) − log(1 − D(fake)), means of the logits (B,); 2 ln 2 where D cannot tell.

    With the labels swapped, `discriminator_loss(fake, real)`, it is the loss that does not saturate of those
    who fool D (Goodfellow et al. 2014).
    """
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def judge_frozen(discriminator: nn.Module, *inputs: Tensor) -> Any:
    """Return what a discriminator says of inputs that a gradient shall reach, while none reaches its weights."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return functional_call(discriminator, frozen, inputs)
