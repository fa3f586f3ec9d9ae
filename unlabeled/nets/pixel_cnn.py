"""Networks that see one side of every position only: masked convolutions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RowConv(nn.Conv2d):
    """A convolution along the row over a position and `reach` positions to its left, colours in order.

    Channel c serves colour c mod `colours`. At the position itself an output sees the inputs that serve the
    colours before its own (`same` False: mask A, for the image) or those up to its own (mask B).
    """

    mask: Tensor

    def __init__(
        self, channels_in: int, channels_out: int, reach: int, colours: int, same: bool = True
    ) -> None:
        super().__init__(channels_in, channels_out, (1, reach + 1), padding=(0, reach))
        mask = torch.ones_like(self.weight)
        order = torch.arange(channels_out).unsqueeze(1) % colours - torch.arange(channels_in) % colours
        mask[..., 0, -1] = (order >= (0 if same else 1)).float()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Padded on both sides, cut on the right: column j of the result ends at column j of x.
        result = F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)
        return result[..., : x.shape[3]]


def gate(x: Tensor) -> Tensor:
    """Return tanh(a) · sigmoid(b) of the two halves of the channels."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class GatedPixelCNN(nn.Module):
    """The two stacks of a gated PixelCNN (van den Oord et al. 2016): images (B, colours, H, W) to maps.

    The vertical stack sees all rows above a position, the horizontal one what is left of it in its row and,
    through links, the vertical one: together all that comes before, with no blind spot. The shift down by a
    row is in the first vertical layer, so that all of that stack is of the rows above. Channel c of the maps
    knows of its own pixel the colours before c mod `colours` only. No normalisation: the statistics of a
    batch would tell of pixels to come.

    Attributes:
        channels: channels of the maps: each layer's gated outputs, and the sum of all layers.
        reach: rows above a position that its map depends on.
    """

    def __init__(self, colours: int, width: int, layers: int = 5, first_reach: int = 3) -> None:
        super().__init__()
        width = -(-width // colours) * colours
        self.channels, self.reach = (layers + 1) * width, first_reach + layers
        first = nn.Conv2d(colours, 2 * width, (first_reach, 2 * first_reach + 1), padding=first_reach)
        self.vertical = nn.ModuleList([first])
        self.link = nn.ModuleList([nn.Conv2d(2 * width, width, 1, bias=False)])
        self.horizontal = nn.ModuleList([RowConv(colours, width, first_reach, colours, same=False)])
        self.residual = nn.ModuleList()
        for _ in range(layers):
            self.vertical.append(nn.Conv2d(width, 2 * width, (2, 3), padding=1))
            self.link.append(nn.Conv2d(2 * width, 2 * width, 1, bias=False))
            self.horizontal.append(RowConv(width, 2 * width, 1, colours))
            self.residual.append(RowConv(width, width, 0, colours))
        for conv in (*self.vertical, *self.link, *self.horizontal, *self.residual):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        # A gate leaves a third of unit inputs: at PyTorch's own scale a few layers of it would hold nothing.
        with torch.no_grad():
            for conv in self.vertical[1:]:
                conv.get_parameter("weight").mul_(3)

    def above(self, x: Tensor) -> list[Tensor]:
        """Return what the vertical stack tells each layer of the horizontal one."""
        # Padded above and below, cut below: row i of the first result ends at row i - 1, of others at row i.
        rows = x.shape[2]
        x = self.vertical[0](x)[:, :, :rows]
        told = [self.link[0](x)]
        for vertical, link in zip(self.vertical[1:], self.link[1:], strict=True):
            x = vertical(gate(x))[:, :, :rows]
            told.append(link(x))
        return told

    def along(self, x: Tensor, told: list[Tensor]) -> Tensor:
        """Return the maps (B, channels, h, W) of rows (B, colours, h, W) and what they are told from above."""
        total = self.horizontal[0](x) + told[0]
        maps = []
        for horizontal, residual, above in zip(self.horizontal[1:], self.residual, told[1:], strict=True):
            maps.append(gate(horizontal(total) + above))
            total = total + residual(maps[-1])
        return torch.cat((*maps, total), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.along(x, self.above(x))


def pixel_cnn(channels: int, width: int) -> tuple[nn.Module, int]:
    """Return a gated PixelCNN of six layers at full resolution and the channels of its map."""
    net = GatedPixelCNN(channels, width)
    return net, net.channels


class RowContext(nn.Module):
    """CPC's context network (Henaff et al. 2020): maps (B, channels_in, h, w) to (B, channels, h, w).

    Residual blocks of masked convolutions: row i of the result depends on the rows up to i, none below.
    """

    def __init__(self, channels_in: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, (1, 3), padding=(0, 1)),
                nn.ReLU(inplace=True),
                nn.ZeroPad2d((0, 0, 1, 0)),
                nn.Conv2d(channels, channels, (2, 1)),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x)
