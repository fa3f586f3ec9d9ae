"""The decoder: a code in, an image out."""

from torch import Tensor, nn
from torch.nn import functional as F


class Decoder(nn.Module):
    """A small encoder's mirror: codes (B, code_dim) to float images (B, C, H, W), the code its only input.

    A linear map to an eighth of the size, two doublings (nearest neighbour, 3x3 convolution), and a last
    one by pixel shuffle (Shi et al. 2016). Sizes are the encoder's, so odd ones come back exact. The output
    is linear and starts as a flat image of value `mean`.
    """

    def __init__(
        self, code_dim: int, image_shape: tuple[int, int, int], width: int = 64, mean: float = 0.5
    ) -> None:
        super().__init__()
        channels, rows, columns = image_shape
        # Height and width at full size, a half, a quarter, an eighth; halves are rounded up, as strides do.
        self.sizes = [(-(-rows // divisor), -(-columns // divisor)) for divisor in (1, 2, 4, 8)]
        self.linear = nn.Linear(code_dim, width * self.sizes[3][0] * self.sizes[3][1], bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width // 2, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 4, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width // 4)
        self.out = nn.Conv2d(width // 4, 4 * channels, 3, 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.get_parameter("bias"), mean)

    def forward(self, codes: Tensor) -> Tensor:
        (rows, columns), half, quarter, eighth = self.sizes
        x = F.relu(self.norm(self.linear(codes).view(len(codes), -1, *eighth)), inplace=True)
        x = F.relu(self.norm1(self.conv1(F.interpolate(x, quarter))), inplace=True)
        x = F.relu(self.norm2(self.conv2(F.interpolate(x, half))), inplace=True)
        return F.pixel_shuffle(self.out(x), 2)[..., :rows, :columns]
