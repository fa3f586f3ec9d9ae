"""The discriminator: images in, a score of being real out."""

from torch import Tensor, nn


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
