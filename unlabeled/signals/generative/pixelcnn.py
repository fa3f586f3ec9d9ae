"""Gated PixelCNN: each pixel's value from those before it, an exact likelihood (van den Oord et al. 2016)."""

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.likelihood import discretized_logistic
from unlabeled.nets.pixel_cnn import GatedPixelCNN, RowConv
from unlabeled.signals.signal import Signal

# Values drawn one after the other for a picture, at most, but for the rest of a row: more than 28 x 28.
PICTURE_DRAWS = 1000
OBJECTIVE_BATCH = 32


def softmax_log_probability(logits: Tensor, values: Tensor) -> Tensor:
    """Return log p(value), float (...), of int64 values (...) under a softmax of logits (..., levels)."""
    return logits.float().log_softmax(-1).take_along_dim(values.unsqueeze(-1), -1).squeeze(-1)


def mixture_log_probability(parameters: Tensor, values: Tensor, levels: int) -> Tensor:
    """Return log p(value) under a mixture of logistics cut into levels (Salimans et al. 2017).

    Args:
        parameters: (..., 3K), of K components the logits of their shares, means, and log scales (at least -7);
            the levels lie in [0, 1].
        values: int64 (...), 0 to levels - 1.

    Returns:
        float (...), natural logarithms; the probabilities of all levels sum to 1.
    """
    shares, means, log_scales = parameters.float().chunk(3, -1)
    positions = (values / (levels - 1)).unsqueeze(-1)
    each = discretized_logistic(positions, means, log_scales.clamp(min=-7), levels)
    return torch.logsumexp(shares.log_softmax(-1) + each, -1)


class PixelCNN(Signal):
    """A gated PixelCNN over pixels in raster order, red before green before blue; its own net is the encoder."""

    family = "generative"
    equation = "f(z) <-> D"
    paper = "van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders"
    picture_rows = (
        "image",
        "without its last rows",
        "last rows drawn",
        "last rows drawn again",
        "image drawn from the first row on",
    )
    encoder_defaults: ClassVar[dict[str, Any]] = {"name": "pixel_cnn", "width": 32, "pool": 2}
    training_defaults: ClassVar[dict[str, Any]] = {"batch_size": 8, "learning_rate": 3e-3}
    log_marginal: Tensor

    def __init__(
        self,
        encoder: Encoder,
        levels: Annotated[int, Field(ge=2, le=256, description="levels that pixels are cut to")] = 256,
        components: Annotated[
            int, Field(ge=0, description="logistics of the mixture; 0: a softmax over the levels")
        ] = 10,
    ) -> None:
        super().__init__(encoder)
        if not isinstance(encoder.net, GatedPixelCNN):
            raise InputError("pixelcnn needs the encoder pixel_cnn: set pretrain.pixelcnn.encoder.name to it")
        self.levels, self.components, self.colours = levels, components, encoder.image_shape[0]
        start = torch.zeros(levels)
        if components:
            # A flat start: components side by side, as wide as the way from one to the next.
            means = (torch.arange(components) + 0.5) / components
            scales = torch.full((components,), -math.log(2 * components))
            start = torch.cat((torch.zeros(components), means, scales))
        self.head = RowConv(encoder.map_channels, len(start) * self.colours, 0, self.colours)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.head.get_parameter("bias").copy_(start.repeat_interleave(self.colours))
        self.register_buffer("log_marginal", torch.full((levels,), -math.log(levels)))

    def prepare(self, sample: Tensor, count: int) -> None:
        """Count how often each level occurs in the sample, over all positions; each once more than seen."""
        counts = torch.bincount(self.quantised(sample).flatten(), minlength=self.levels) + 1
        self.log_marginal.copy_((counts / counts.sum()).log())

    def quantised(self, images: Tensor) -> Tensor:
        """Return the levels, int64 (B, C, H, W), of uint8 images."""
        return images.long() * self.levels // 256

    def normalised(self, values: Tensor) -> Tensor:
        """Return what the net sees of levels."""
        return self.encoder.normalised(values / (self.levels - 1))

    def outputs(self, maps: Tensor) -> Tensor:
        """Return the distributions' parameters (B, h, w, C, n) of maps (B, channels, h, w)."""
        return self.head(maps).permute(0, 2, 3, 1).unflatten(3, (-1, self.colours)).transpose(3, 4)

    def log_probability(self, outputs: Tensor, values: Tensor) -> Tensor:
        if self.components:
            return mixture_log_probability(outputs, values, self.levels)
        return softmax_log_probability(outputs, values)

    def score(self, values: Tensor) -> Tensor:
        """Return log p of every value given those before it, float (B, H, W, C), of levels (B, C, H, W)."""
        maps = self.encoder.feature_map(values / (self.levels - 1))
        return self.log_probability(self.outputs(maps), values.permute(0, 2, 3, 1))

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        bits = -self.score(self.quantised(images)).mean() / math.log(2)
        return bits, {"bits_per_dim": bits.detach()}

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return the bits per value: the model's, those of the train pixels' histogram, those of no knowledge."""
        values = self.quantised(images)
        # In parts: maps at full resolution take much memory.
        scores = torch.cat([self.score(part).flatten(1).mean(1) for part in values.split(OBJECTIVE_BATCH)])
        return {
            "bits_per_dim": -scores.mean() / math.log(2),
            "bits_per_dim_histogram": -self.log_marginal[values].mean() / math.log(2),
            "bits_per_dim_uniform": torch.tensor(math.log2(self.levels)),
        }

    @torch.no_grad()
    def draw(self, values: Tensor, first: int, end: int) -> Tensor:
        """Return levels (B, C, H, W) with the rows `first` to `end` - 1 drawn anew, value by value."""
        net = self.encoder.net
        assert isinstance(net, GatedPixelCNN)
        values, reach = values.clone(), net.reach
        columns = values.shape[3]
        for row in range(first, end):
            # All that the rows above say is said once for the whole row.
            seen = self.normalised(values[:, :, max(0, row - reach) : row + 1])
            told = [part[:, :, -1:] for part in net.above(seen)]
            for column in range(columns):
                window = slice(max(0, column - reach), column + 1)
                for colour in range(self.colours):
                    pixels = self.normalised(values[:, :, row : row + 1, window])
                    maps = net.along(pixels, [part[..., window] for part in told])
                    values[:, colour, row, column] = self.drawn(self.outputs(maps[..., -1:])[:, 0, 0, colour])
        return values

    def drawn(self, outputs: Tensor) -> Tensor:
        """Return a level (B,) drawn from each of the distributions (B, n)."""
        every = torch.arange(self.levels, device=outputs.device)
        log_probabilities = self.log_probability(outputs.unsqueeze(1), every.expand(len(outputs), -1))
        return log_probabilities.exp().multinomial(1).squeeze(1)

    def picture(self, images: Tensor) -> Tensor:
        values = self.quantised(images[:8])
        _, colours, height, width = values.shape
        rows = max(1, PICTURE_DRAWS // (colours * width))
        kept = height - min(rows, height // 2)
        completed = self.draw(values.repeat(2, 1, 1, 1), kept, height).chunk(2)
        shown = [
            part / (self.levels - 1)
            for part in (values, values, *completed, self.draw(values, 0, min(rows, height)))
        ]
        shown[1][:, :, kept:] = 0.5
        shown[4][:, :, rows:] = 0.5
        return torch.stack(shown)
