"""BiGAN: whose loss moves whom, what the discriminator sees, and that it covers the modes and comes back."""

import copy
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from unlabeled.nets.dcgan import Generator, JointDiscriminator, halvings
from unlabeled.nets.discriminator import discriminator_loss
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.generative.bigan import BiGAN, accuracy, adversarial_losses


def signal_of(side: int = 8, **settings: float) -> BiGAN:
    torch.manual_seed(0)
    small = {"code_dim": 8, "width": 8, "hidden": 32}
    return BiGAN(Encoder("small_resnet", 16, 2, (1, side, side), 0.3, 0.35), **{**small, **settings})  # type: ignore[arg-type]


def digits(count: int) -> Tensor:
    images = torch.from_numpy(load_digits().images[:count])
    return (images * (255 / 16)).round().byte().unsqueeze(1)


def halves(signal: BiGAN) -> tuple[Tensor, Tensor]:
    """Both sides' losses, apart."""
    originals = digits(32).float() / 255
    noise = signal.noise(originals)
    codes, generated = signal.code(signal.encoder(originals)), signal.generator(noise)
    judge, fool, _, _ = adversarial_losses(signal.discriminator, originals, codes, generated, noise)
    return judge, fool


def moved(signal: BiGAN) -> set[str]:
    """The nets that a gradient has reached."""
    return {
        name.split(".")[0] for name, p in signal.named_parameters() if p.grad is not None and p.grad.any()
    }


# The losses


def test_the_loss_is_binary_cross_entropy_and_its_swap_does_not_saturate() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(50) * 3, torch.randn(50) * 3
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, torch.ones(50)) + bce(fake, torch.zeros(50))
    assert discriminator_loss(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(2 * math.log(2))
    # Exchanging who is called real and which sign says so is no change.
    assert torch.allclose(discriminator_loss(-fake, -real), discriminator_loss(real, fake))
    # A generated pair that is seen through still has its full gradient; log(1 - D) would leave e^-10 of it.
    logit = torch.tensor([-10.0]).requires_grad_()
    discriminator_loss(logit, torch.zeros(1)).backward()
    assert logit.grad is not None and logit.grad.item() == pytest.approx(-1, abs=1e-3)


def test_the_encoder_and_generator_play_the_same_game_with_swapped_labels() -> None:
    signal = signal_of().eval()
    originals = digits(32).float() / 255
    noise = signal.noise(originals)
    codes, generated = signal.code(signal.encoder(originals)), signal.generator(noise)
    judge, fool, real, fake = adversarial_losses(signal.discriminator, originals, codes, generated, noise)
    assert torch.allclose(judge, discriminator_loss(real, fake))
    assert torch.allclose(fool, discriminator_loss(fake, real), atol=1e-5)
    # Feeding the encoder's pairs as the generator's and the other way round swaps the two losses.
    swapped = adversarial_losses(signal.discriminator, generated, noise, originals, codes)
    assert torch.allclose(swapped[0], fool, atol=1e-5) and torch.allclose(swapped[1], judge, atol=1e-5)


@pytest.mark.parametrize("side", [8, 28])
def test_the_discriminator_starts_undecided(side: int) -> None:
    signal = signal_of(side)
    images = torch.randint(0, 256, (64, 1, side, side), generator=torch.Generator().manual_seed(0)).byte()
    _, values = signal.loss(images)
    assert values["discriminator"].item() == pytest.approx(2 * math.log(2), abs=0.15)
    assert values["generator"].item() == pytest.approx(2 * math.log(2), abs=0.15)


def test_each_side_moves_its_own_nets_alone() -> None:
    signal = signal_of()
    judge, fool = halves(signal)
    judge.backward(retain_graph=True)
    assert moved(signal) == {"discriminator"}
    own = [
        parameter.grad.clone()
        for parameter in signal.discriminator.parameters()
        if parameter.grad is not None
    ]
    fool.backward()
    assert moved(signal) == {"discriminator", "encoder", "code", "generator"}
    grads = [parameter.grad for parameter in signal.discriminator.parameters()]
    assert all(grad is not None and torch.equal(grad, mine) for grad, mine in zip(grads, own, strict=True))
    signal.zero_grad()
    halves(signal)[1].backward()
    assert moved(signal) == {"encoder", "code", "generator"}


def test_without_detaching_the_sides_would_cancel() -> None:
    """The ablation: one graph for both losses lets the discriminator learn to be fooled."""
    signal = signal_of()
    originals = digits(32).float() / 255
    noise = signal.noise(originals)
    pairs = (originals, signal.code(signal.encoder(originals))), (signal.generator(noise), noise)
    real, fake = (signal.discriminator(*pair) for pair in pairs)
    (discriminator_loss(real, fake) + discriminator_loss(fake, real)).backward()
    naive = signal.discriminator.out.weight.grad.clone()
    signal.zero_grad()
    torch.stack(halves(signal)).sum().backward()
    proper = signal.discriminator.out.weight.grad
    assert naive.norm() < 0.5 * proper.norm()


def test_one_step_moves_all_three_nets_and_every_parameter_has_a_gradient() -> None:
    signal = signal_of()
    before = copy.deepcopy(dict(signal.named_parameters()))
    optimizer = torch.optim.AdamW(signal.parameters(), 1e-3)
    signal.loss(digits(32))[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in signal.parameters())
    optimizer.step()
    changed = {
        name.split(".")[0] for name, p in signal.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {"encoder", "code", "generator", "discriminator"}


@pytest.mark.parametrize("round_trip", [0.0, 1.0])
def test_it_trains_under_distributed_data_parallel(tmp_path: Path, round_trip: float) -> None:
    """Its hooks see each parameter once per step: an unused or frozen one would stop the second step."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, alone = (
            DistributedDataParallel(signal_of(round_trip=round_trip)),
            signal_of(round_trip=round_trip),
        )
        for step in range(3):
            for net in (model, alone):
                torch.manual_seed(step)
                net.zero_grad()
                net(digits(16), torch.arange(16))[0].backward()
        expected = dict(alone.named_parameters())
        for name, parameter in model.module.named_parameters():
            assert parameter.grad is not None and torch.allclose(
                parameter.grad, expected[name].grad, atol=1e-6
            ), name
    finally:
        dist.destroy_process_group()


# The nets


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 9), (1, 28, 28), (3, 33, 33), (3, 33, 20), (1, 96, 96)])
def test_the_nets_take_every_size(shape: tuple[int, int, int]) -> None:
    images = Generator(5, shape, 4)(torch.rand(2, 5))
    assert images.shape == (2, *shape) and images.min() > 0 and images.max() < 1
    assert JointDiscriminator(5, shape, 4, 16)(images, torch.rand(2, 5)).shape == (2,)


def test_images_are_halved_to_at_most_seven_pixels() -> None:
    assert [halvings(size) for size in (4, 8, 14, 15, 28, 33, 64, 96)] == [1, 1, 1, 2, 2, 3, 4, 4]


def test_a_pair_is_judged_alone() -> None:
    """No batch statistics: neither the other pairs of a batch nor what they are tells on a pair."""
    discriminator = JointDiscriminator(5, (1, 12, 12), 8, 16)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in discriminator.modules())
    images, codes = torch.rand(6, 1, 12, 12), torch.rand(6, 5)
    discriminator.eval()
    together = discriminator(images, codes)
    apart = torch.cat([discriminator(images[i : i + 1], codes[i : i + 1]) for i in range(6)])
    assert torch.allclose(together, apart, atol=1e-6)


def test_the_discriminators_layers_have_spectral_norm_1() -> None:
    torch.manual_seed(0)
    discriminator = JointDiscriminator(5, (1, 12, 12), 8, 16)
    for _ in range(50):
        discriminator(torch.rand(2, 1, 12, 12), torch.rand(2, 5))
    for linear in (discriminator.linear1, discriminator.linear2):
        assert torch.linalg.matrix_norm(linear.weight, 2).item() == pytest.approx(1, abs=0.01)


def test_codes_are_uniform_and_new_for_each_image_and_step() -> None:
    signal = signal_of(code_dim=16)
    first, second = signal.noise(digits(500)), signal.noise(digits(500))
    assert first.min() >= -1 and first.max() < 1 and first.mean().abs() < 0.05
    assert first.var().item() == pytest.approx(1 / 3, abs=0.02) and not torch.equal(first, second)
    assert len(first.unique(dim=0)) == 500


# What it learns


def test_a_discriminator_that_uses_the_code_falls_when_codes_are_exchanged() -> None:
    torch.manual_seed(0)
    images = torch.rand(128, 1, 8, 8)
    codes = 2 * images[:, 0, ::4, ::4].flatten(1) - 1
    other = codes.roll(7, 0)
    discriminator = JointDiscriminator(4, (1, 8, 8), 8, 64)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 5e-3)

    def right(shift: int) -> float:
        return accuracy(
            discriminator(images, codes.roll(shift, 0)), discriminator(images, other.roll(shift, 0))
        ).item()

    for _ in range(150):
        optimizer.zero_grad()
        discriminator_loss(discriminator(images, codes), discriminator(images, other)).backward()
        optimizer.step()
    # Each image and each code is as frequent on both sides: only their match tells.
    assert right(0) > 0.8 and right(3) < 0.65


def perceptron(*sizes: int) -> nn.Sequential:
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


class PairPerceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(2 + 2, 128, 128, 1)

    def forward(self, points: Tensor, codes: Tensor) -> Tensor:
        return self.net(torch.cat((points, codes), 1)).squeeze(1)


@pytest.mark.slow
def test_it_covers_a_ring_of_eight_gaussians() -> None:
    """At least 7 of 8 modes hold each a fair number of samples."""
    torch.manual_seed(0)
    angles = torch.arange(8) * (math.pi / 4)
    centres = 2 * torch.stack((angles.cos(), angles.sin()), 1)
    generator, encoder, discriminator = (
        perceptron(2, 128, 128, 2),
        perceptron(2, 128, 128, 2),
        PairPerceptron(),
    )
    nets = nn.ModuleList((generator, encoder, discriminator))
    optimizer = torch.optim.AdamW(nets.parameters(), 1e-3, betas=(0.5, 0.999), fused=True)
    for _ in range(2000):
        points = centres[torch.randint(8, (256,))] + 0.1 * torch.randn(256, 2)
        noise = torch.rand(256, 2) * 2 - 1
        judge, fool, _, _ = adversarial_losses(
            discriminator, points, encoder(points), generator(noise), noise
        )
        optimizer.zero_grad()
        (judge + fool).backward()
        optimizer.step()
    with torch.no_grad():
        samples = generator(torch.rand(4000, 2) * 2 - 1)
    distances, modes = torch.cdist(samples, centres).min(1)
    shares = torch.bincount(modes[distances < 0.4], minlength=8) / len(samples)
    assert (shares > 0.02).sum() >= 7, shares


@pytest.fixture(scope="module")
def learned() -> BiGAN:
    signal = signal_of(width=16, hidden=64)
    optimizer = torch.optim.AdamW(signal.parameters(), 1e-3, betas=(0.5, 0.999), fused=True)
    images = digits(1500)
    for step in range(400):
        torch.manual_seed(step)
        optimizer.zero_grad()
        signal.loss(images[torch.randint(1500, (64,))])[0].backward()
        optimizer.step()
    return signal.eval()


@pytest.mark.slow
def test_round_trips_come_back_and_the_discriminator_beats_chance(learned: BiGAN) -> None:
    torch.manual_seed(0)
    held_out = torch.from_numpy(load_digits().images[1500:1750] * (255 / 16)).round().byte().unsqueeze(1)
    with torch.inference_mode():
        values = {name: value.item() for name, value in learned.objective(held_out).items()}
    assert values["round_trip_error"] < 0.8 * values["round_trip_error_random_pair"], values
    assert values["chance"] == 0.5 < values["accuracy"], values


def test_the_objective_of_an_untrained_net_is_chance() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        values = signal_of().eval().objective(digits(200))
    ratio = values["round_trip_error"] / values["round_trip_error_random_pair"]
    assert ratio.item() == pytest.approx(1, abs=0.05)


def test_the_weight_of_the_round_trip_adds_its_error() -> None:
    plain, more = signal_of(round_trip=0.0), signal_of(round_trip=2.0)
    results = []
    for signal in (plain, more):
        torch.manual_seed(1)
        results.append(signal.loss(digits(16)))
    (loss, values), (higher, with_error) = results
    assert (higher - loss).item() == pytest.approx(2 * with_error["round_trip"].item(), rel=1e-3)
    assert "round_trip" not in values and loss == values["discriminator"] + values["generator"]
