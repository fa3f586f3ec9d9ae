"""1x1 convolutions."""

from torch import Tensor, nn
from torch.nn import functional as F

NARROW = 8


class Pointwise(nn.Conv2d):
    """A 1x1 convolution that is safe where few channels come in.

    oneDNN's AVX2 kernel for the gradient of its weights writes past their end where fewer than eight channels come in
    and memory is channels-last (found with valgrind in PyTorch 2.14). In training a product of matrices does the same
    there; what is exported is a convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels >= NARROW or not self.training:
            return super().forward(x)
        rows, columns = self.stride
        cells = x[..., ::rows, ::columns].movedim(1, -1)
        return F.linear(cells, self.weight.flatten(1), self.bias).movedim(-1, 1)
