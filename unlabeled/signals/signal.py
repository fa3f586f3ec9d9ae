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
    # The method's own defaults of the training section, as {"learning_rate": 1e-3}.
    training_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch and values to log.

        One backward serves all nets: where two have opposite aims (GAN), each part of the loss detaches what
        is not its own to move.

        Args:
            images: uint8 (B, C, H, W) on the training device; the method makes its own views.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, where DistributedDataParallel can hook it."""
        return self.loss(images)

    def after_step(self) -> None:
        """Update what no gradient updates (EMA teacher, centre, queue) after an optimizer step."""

    def picture(self, images: Tensor) -> Tensor | None:
        """Return what the report shows of this method for a few uint8 images (B, C, H, W), or None.

        Returns:
            float (rows, columns, C, H, W) in [0, 1].
        """
        return None
