"""The nets of DCGAN (Radford et al. 2016) and of BiGAN (Donahue et al. 2017), for images of any size."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


def halvings(size: int) -> int:
    """Return how often images of `size` pixels are halved, until at most 7 are left; at least once."""
    return max(1, next(count for count in range(size) if -(-size // 2**count) <= 7))


def initialize(module: nn.Module) -> None:
    """Draw the weights of convolutions and linear maps from N(0, 0.02), as DCGAN does; biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Generator(nn.Module):
    """DCGAN's generator: codes (B, code_dim) to images (B, C, H, W) in (0, 1).

    A linear map to 4 to 7 pixels a side, doublings by transposed 4x4 convolutions with batch norm and ReLU.
    Where H is no multiple of their power of two, the next one is made and cut.
    """

    def __init__(self, code_dim: int, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, *self.size = image_shape
        count = halvings(max(self.size))
        widths = [width * min(2**i, 8) for i in reversed(range(count))]
        self.base = widths[0], *(-(-pixels // 2**count) for pixels in self.size)
        rows, columns = self.base[1:]
        self.linear = nn.Linear(code_dim, widths[0] * rows * columns, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
        for wide, narrow in pairwise(widths):
            layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1))
        initialize(self)

    def forward(self, codes: Tensor) -> Tensor:
        maps = self.layers(self.linear(codes).view(-1, *self.base))
        # DCGAN's tanh, brought to (0, 1).
        return (maps[..., : self.size[0], : self.size[1]] * 2).sigmoid()


class JointDiscriminator(nn.Module):
    """BiGAN's discriminator: images (B, C, H, W) in [0, 1] and codes (B, code_dim) to logits (B,).

    Strided 4x4 convolutions as DCGAN's, then linear layers that each see the code again. In place of batch
    norm, by which real and generated batches would betray themselves, the weights have spectral norm 1
    (Miyato et al. 2018): each pair is judged alone, and the discriminator does not outrun the others.
    """

    def __init__(self, code_dim: int, image_shape: tuple[int, int, int], width: int, hidden: int) -> None:
        super().__init__()
        channels, *size = image_shape
        widths = [channels] + [width * min(2**i, 8) for i in range(halvings(max(size)))]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(narrow, wide, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        rows, columns = (pixels // 2 ** (len(widths) - 1) for pixels in size)
        self.linear1 = spectral_norm(nn.Linear(widths[-1] * rows * columns + code_dim, hidden))
        self.linear2 = spectral_norm(nn.Linear(hidden + code_dim, hidden))
        # Free to grow, and small at first: every pair starts at even odds.
        self.out = nn.Linear(hidden + code_dim, 1)
        initialize(self.out)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        x = self.layers(2 * images - 1).flatten(1)
        for linear in (self.linear1, self.linear2):
            x = F.leaky_relu(linear(torch.cat((x, codes), 1)), 0.2)
        return self.out(torch.cat((x, codes), 1)).squeeze(1)
