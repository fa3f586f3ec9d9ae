"""What every learning signal is: a network and a loss that needs no label."""

from typing import Any, ClassVar

from torch import Tensor, nn

from unlabeled.nets.encoder import Encoder


class Signal(nn.Module):
    """A learning signal: one method, one file, a subclass of this.

    The keyword arguments of a subclass's constructor are the method's settings; their annotations and
    defaults are what `pretrain.<method>.<key>` is validated against.
    """

    family: ClassVar[str]
    equation: ClassVar[str]
    paper: ClassVar[str]
    # The method's own defaults of the training and of the encoder section, as {"learning_rate": 1e-3}.
    training_defaults: ClassVar[dict[str, Any]] = {}
    encoder_defaults: ClassVar[dict[str, Any]] = {}
    # Whether gray images leave nothing to learn: `prepare` then refuses them.
    needs_color: ClassVar[bool] = False
    # What the rows of `picture` show.
    picture_rows: ClassVar[tuple[str, ...]] = ()

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        # The share of the run that is done, set by the loop before each step: what a method's schedules run over.
        self.progress = 0.0

    def prepare(self, sample: Tensor, count: int) -> None:
        """Make, once and before the first step, what depends on the data: a colour prior, a memory bank.

        Args:
            sample: uint8 (n, C, H, W), at most 2,000 train images, evenly spread, on the CPU.
            count: the number of train images.
        """

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch and values to log.

        One backward serves all nets: where two have opposite aims (GAN), each part of the loss detaches what
        is not its own to move.

        Args:
            images: uint8 (B, C, H, W) on the training device; the method makes its own views.
        """
        raise NotImplementedError

    def forward(self, images: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, where DistributedDataParallel can hook it.

        A method that remembers something of each image overrides this instead of `loss`.

        Args:
            indices: int64 (B,), the images' numbers, 0 to `count` - 1 of `prepare`.
        """
        return self.loss(images)

    def after_step(self) -> None:
        """Update what no gradient updates (EMA teacher, centre, memory) after an optimizer step."""

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return the method's own aim, measured on held-out images in eval mode: scalar means over the batch.

        Each stands beside its trivial answer: `psnr` and `psnr_mean_fill`, `accuracy` and `chance`.

        Args:
            images: uint8 (B, C, H, W) on the training device, B at least 2.
        """
        return {}

    def picture(self, images: Tensor) -> Tensor | None:
        """Return what the report shows of this method, or None.

        Args:
            images: uint8 (B, C, H, W), up to 64 held-out images to show or to choose from.

        Returns:
            float (rows, columns, C, H, W) in [0, 1], at most eight of each; a row for each of `picture_rows`.
        """
        return None
