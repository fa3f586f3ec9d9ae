"""BiGAN: an encoder and a generator that no discriminator of pairs can tell apart (Donahue et al. 2017)."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.nets.dcgan import Generator, JointDiscriminator
from unlabeled.nets.discriminator import discriminator_loss, judge_frozen
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.signal import Signal


def adversarial_losses(
    discriminator: nn.Module, images: Tensor, codes: Tensor, generated: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both sides' losses on pairs (x, E(x)) and (G(z), z), made to be summed for one backward.

    Args:
        discriminator: pairs of images and codes to logits (B,).
        images, codes: x and E(x).
        generated, noise: G(z) and z.

    Returns:
        D's loss, which moves D alone; E's and G's, which moves them alone; D's logits (B,) of the real pairs
        and of the generated ones.
    """
    real = discriminator(images, codes.detach())
    fake = discriminator(generated.detach(), noise)
    encoded = judge_frozen(discriminator, images, codes)
    fooling = judge_frozen(discriminator, generated, noise)
    return discriminator_loss(real, fake), discriminator_loss(fooling, encoded), real.detach(), fake.detach()


class BiGAN(Signal):
    """A BiGAN on DCGAN's nets; the encoder is the one exported, with a linear map to the code.

    All three nets take their step together, from one backward: each side's loss detaches the other. For a
    few minutes on a CPU the round trip's error is part of the loss, as in ALICE (Li et al. 2017);
    `round_trip` 0 is the paper's BiGAN.
    """

    family = "generative"
    equation = "f(z) <-> D"
    paper = "Donahue et al. 2017, Adversarial Feature Learning"
    picture_rows = ("image", "round trip", "sample", "sample")
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 2e-4,
        "momentum": 0.5,
        "weight_decay": 2.5e-5,
    }

    def __init__(
        self,
        encoder: Encoder,
        code_dim: Annotated[int, Field(ge=1, description="numbers in the code z")] = 50,
        width: Annotated[int, Field(ge=4, description="channels of the largest maps of G and D")] = 16,
        hidden: Annotated[int, Field(ge=4, description="hidden units of D, which see image and code")] = 256,
        round_trip: Annotated[
            float,
            Field(ge=0, description="weight of the round trip's mean square error; 0: BiGAN as published"),
        ] = 20.0,
    ) -> None:
        super().__init__(encoder)
        self.code_dim, self.round_trip_weight = code_dim, round_trip
        self.code = nn.Linear(encoder.feature_dim, code_dim)
        self.generator = Generator(code_dim, encoder.image_shape, width)
        self.discriminator = JointDiscriminator(code_dim, encoder.image_shape, width, hidden)

    def noise(self, images: Tensor) -> Tensor:
        """Return a random code (B, code_dim), uniform in [-1, 1), for each of the images."""
        return torch.rand(len(images), self.code_dim, device=images.device) * 2 - 1

    def round_trip(self, originals: Tensor) -> Tensor:
        """Return G(E(x)) of float images."""
        return self.generator(self.code(self.encoder(originals)))

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals, noise = views.to_float(images), self.noise(images)
        codes, generated = self.code(self.encoder(originals)), self.generator(noise)
        judge, fool, real, fake = adversarial_losses(self.discriminator, originals, codes, generated, noise)
        values = {"discriminator": judge, "generator": fool, "accuracy": accuracy(real, fake)}
        loss = judge + fool
        if self.round_trip_weight > 0:
            values["round_trip"] = F.mse_loss(self.generator(codes).float(), originals)
            loss = loss + self.round_trip_weight * values["round_trip"]
        return loss, values

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return D's accuracy, also with each pair's code exchanged for another's, and the round trip's error.

        The error is a mean square; the random pair's is that to another image's round trip.
        """
        originals, noise = views.to_float(images), self.noise(images)
        codes, generated = self.code(self.encoder(originals)), self.generator(noise)
        returned = self.generator(codes)

        def judged(shift: int) -> Tensor:
            real = self.discriminator(originals, codes.roll(shift, 0))
            return accuracy(real, self.discriminator(generated, noise.roll(shift, 0)))

        return {
            "accuracy": judged(0),
            "accuracy_shuffled_codes": judged(1),
            "chance": torch.tensor(0.5),
            "round_trip_error": F.mse_loss(returned, originals),
            "round_trip_error_random_pair": F.mse_loss(returned.roll(1, 0), originals),
        }

    def picture(self, images: Tensor) -> Tensor:
        originals = views.to_float(images[:8])
        samples = [self.generator(self.noise(originals)) for _ in range(2)]
        return torch.stack((originals, self.round_trip(originals), *samples))


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Return the share of logits that are right: above 0 for real pairs, below for generated ones."""
    return torch.cat((real > 0, fake < 0)).float().mean()
