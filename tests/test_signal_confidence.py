"""Confidence against METHODS section 15; torch.distributions and torch's Gaussian loss are the oracles."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.measures.uncertainty import (
    calibration_error,
    confidence_levels,
    reliability,
    sparsification,
    sparsification_error,
)
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.uncertainty.confidence import (
    LOSSES,
    Confidence,
    error_prediction,
    gaussian,
    laplace,
    mean_of,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def signal_of(size: int = 12, channels: int = 1, **settings: Any) -> Confidence:
    torch.manual_seed(0)
    return Confidence(Encoder("small_resnet", 16, 2, (channels, size, size), 0.5, 0.25), **settings)


def noise_images(count: int = 16, size: int = 12, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator).byte()


def halves(count: int = 64, seed: int = 0, size: int = 8) -> Tensor:
    """Images of a gray upper half and of a lower half in which nothing can be foreseen."""
    images = torch.full((count, 1, size, size), 128).byte()
    generator = torch.Generator().manual_seed(seed)
    images[:, :, size // 2 :] = torch.randint(0, 256, (count, 1, size // 2, size), generator=generator)
    return images


def train(signal: Confidence, steps: int, rate: float = 3e-3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(signal.parameters(), rate), []
    for seed in range(steps):
        signal.progress = seed / steps
        optimizer.zero_grad()
        loss, _ = signal.loss(halves(seed=seed))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Losses


def test_the_likelihoods_are_pytorchs() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, logs = torch.randn(2, 200, generator=generator)
    density = torch.distributions.Laplace(0, logs.exp() / 2**0.5).log_prob(errors)
    assert torch.allclose(laplace(errors, logs) + math.log(2) / 2, -density, atol=1e-5)
    density = torch.distributions.Normal(0, logs.exp()).log_prob(errors)
    assert torch.allclose(gaussian(errors, logs) + math.log(2 * math.pi) / 2, -density, atol=1e-5)
    expected = F.gaussian_nll_loss(torch.zeros(200), errors, (2 * logs).exp(), reduction="none")
    assert torch.allclose(gaussian(errors, logs), expected, atol=1e-5)


def test_the_best_scale_of_an_error() -> None:
    logs = torch.linspace(-4, 1, 5001)
    values = laplace(torch.tensor(0.1), logs)
    assert logs[values.argmin()].exp().item() == pytest.approx(0.141421, rel=1e-3)
    assert values.min().item() == pytest.approx(-0.956012, abs=1e-5)
    errors = torch.tensor([0.1, -0.3, 0.2]).view(3, 1)
    values = gaussian(errors, logs).mean(0)
    assert (2 * logs[values.argmin()]).exp().item() == pytest.approx(errors.square().mean().item(), rel=1e-2)
    values = error_prediction(errors, logs).mean(0)
    assert logs[values.argmin()].exp().item() / 2**0.5 == pytest.approx(0.2, rel=1e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_a_scale_of_one_is_the_plain_loss(name: str) -> None:
    errors = torch.randn(50, requires_grad=True)
    (gradient,) = torch.autograd.grad(LOSSES[name](errors, torch.zeros(50)).sum(), errors)
    plain = {"laplace": 2**0.5 * errors.sign(), "gaussian": errors, "error": errors.sign()}[name]
    assert torch.allclose(gradient, plain)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log", [-1000.0, -10.0, 10.0, 1000.0])
def test_no_scale_breaks_the_loss(name: str, log: float) -> None:
    errors = torch.tensor([0.0, 1e-9, -1.0], requires_grad=True)
    logs = torch.full((3,), log, requires_grad=True)
    loss = LOSSES[name](errors, logs).sum()
    loss.backward()
    assert loss.isfinite() and errors.grad is not None and errors.grad.isfinite().all()
    assert logs.grad is not None and logs.grad.isfinite().all()


def test_without_its_log_term_the_scale_grows_for_ever() -> None:
    logs = torch.linspace(-3, 8, 100, dtype=torch.float64)
    errors = torch.full_like(logs, 0.1)
    assert (laplace(errors, logs) - logs).argmin() == 99 != laplace(errors, logs).argmin()
    assert (gaussian(errors, logs) - logs).argmin() == 99 != gaussian(errors, logs).argmin()


def test_error_prediction_does_not_move_the_prediction() -> None:
    """Else the cheapest error is the one that is foreseen, not the smallest."""
    errors = torch.randn(50, requires_grad=True)
    logs = torch.randn(50, requires_grad=True)
    error_prediction(errors, logs).sum().backward()
    assert errors.grad is not None and torch.equal(errors.grad, errors.detach().sign())
    assert logs.grad is not None and logs.grad.abs().max() > 0


# Calibration and sparsification


@pytest.mark.parametrize("distribution", ["laplace", "gaussian"])
def test_confidence_levels_are_those_of_the_distribution(distribution: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    errors, scales = torch.randn(300, generator=generator), torch.rand(300, generator=generator) + 0.1
    known: torch.distributions.Distribution = (
        torch.distributions.Laplace(0, scales / 2**0.5)
        if distribution == "laplace"
        else torch.distributions.Normal(0, scales)
    )
    expected = known.cdf(errors.abs()) - known.cdf(-errors.abs())
    assert torch.allclose(confidence_levels(errors, scales, distribution), expected, atol=1e-5)
    # Truths drawn from the predictions are calibrated; scales that are half of the true ones are not.
    torch.manual_seed(0)
    drawn = known.sample((200,))
    levels = confidence_levels(drawn, scales.expand_as(drawn), distribution)
    assert calibration_error(levels) < 0.01
    predicted, held = reliability(confidence_levels(drawn, scales / 2, distribution))
    assert (held < predicted)[:-1].all() and held[-1] == 1
    predicted, held = reliability(confidence_levels(drawn, scales * 2, distribution))
    assert (held > predicted)[:-1].all()


def test_calibration_error_of_the_worst() -> None:
    assert calibration_error(torch.zeros(100)).item() == pytest.approx(0.475)
    assert calibration_error(torch.ones(100)).item() == pytest.approx(0.475)
    assert calibration_error(torch.linspace(0, 1, 10001)) < 1e-3


def test_sparsification_by_hand() -> None:
    errors = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert sparsification(errors, errors, 4).tolist() == pytest.approx([1, 0.8, 0.6, 0.4])
    assert sparsification(errors, -errors, 4).tolist() == pytest.approx([1, 1.2, 1.4, 1.6])
    area, chance = sparsification_error(errors, -errors, 4)
    assert area.item() == pytest.approx((0 + 0.4 + 0.8 + 1.2) / 4) and chance.item() == pytest.approx(0.3)
    assert sparsification_error(errors, errors.exp(), 4)[0] == 0
    assert sparsification(torch.zeros(5), torch.rand(5)).isfinite().all()


def test_sparsification_lies_between_chance_and_the_oracle() -> None:
    torch.manual_seed(0)
    scales = torch.rand(20_000) + 0.05
    errors = (scales * torch.randn(20_000)).abs()
    knowing, chance = sparsification_error(errors, scales)
    blind, _ = sparsification_error(errors, torch.rand(20_000))
    assert 0 < knowing < 0.7 * chance and blind.item() == pytest.approx(chance.item(), rel=0.05)


@pytest.mark.parametrize("name", ["laplace", "gaussian"])
def test_a_net_finds_the_scale_of_noise_that_differs_by_place(name: str) -> None:
    """METHODS: the correlation of predicted and true scale above 0.9, standardised errors of deviation 1."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        x = 4 * torch.rand(count, 1) - 2
        scale = 0.05 + 0.1 * x.square()
        noise = torch.randn_like(x)
        if name == "laplace":
            noise = torch.distributions.Laplace(0.0, 0.5**0.5).sample(x.shape)
        return x, (2 * x).sin() + scale * noise, scale

    for _ in range(400):
        x, y, _ = draw(512)
        middle, logs = net(x).chunk(2, 1)
        optimizer.zero_grad()
        LOSSES[name](y - middle, logs).mean().backward()
        optimizer.step()
    x, y, scale = draw(5000)
    middle, logs = net(x).detach().chunk(2, 1)
    assert torch.corrcoef(torch.cat((logs.exp(), scale), 1).T)[0, 1] > 0.9
    assert ((y - middle) / logs.exp()).std().item() == pytest.approx(1, abs=0.1)
    levels = confidence_levels(y - middle, logs.exp(), name)  # type: ignore[arg-type]
    assert calibration_error(levels) < 0.05


# The signal


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_starts_at_its_analytic_value(name: str) -> None:
    """The values are the mean, the scale the deviation, of all pixels."""
    signal, images = signal_of(likelihood=name, warm_up=0.0, corruption="gaussian"), noise_images()
    errors = views.to_float(images) - 0.5
    expected = LOSSES[name](errors, torch.full_like(errors, math.log(0.25))).mean()
    assert signal.loss(images)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    # During the warm-up: the plain loss and the scales' own.
    signal = signal_of(likelihood=name, warm_up=1.0, corruption="gaussian")
    plain = LOSSES[name](errors, torch.zeros_like(errors)).mean()
    assert signal.loss(images)[0].item() == pytest.approx((expected + plain).item(), rel=1e-5)


def test_scales_weigh_no_error_during_the_warm_up() -> None:
    images, gradients = noise_images(), []
    for log in (0.0, 3.0):
        signal = signal_of(warm_up=0.5)
        with torch.no_grad():
            signal.decoder.out.get_parameter("bias").view(2, -1)[1] = log
        for signal.progress in (0.4, 0.5):
            torch.manual_seed(0)
            signal.zero_grad()
            signal.loss(images)[0].backward()
            gradient = signal.decoder.out.get_parameter("bias").grad
            assert gradient is not None
            gradients.append(gradient.view(2, -1)[0].clone())
    warm, hot, warm_wide, hot_wide = gradients
    assert torch.allclose(warm, warm_wide)
    assert torch.allclose(hot, warm, atol=1e-6) and torch.allclose(hot_wide, warm * math.exp(-3), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_inpainting_counts_the_hole_alone_and_sees_nothing_of_it(channels: int) -> None:
    signal = signal_of(task="inpainting", channels=channels)
    originals = views.to_float(noise_images(channels=channels))
    torch.manual_seed(1)
    corrupted, asked = signal.corrupt(originals)
    changed = torch.where(asked, torch.rand_like(originals), originals)
    torch.manual_seed(1)
    others, same = signal.corrupt(changed)
    assert torch.equal(corrupted, others) and torch.equal(asked, same)
    assert asked.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(asked[0], asked[1])
    values = torch.rand_like(originals, requires_grad=True)
    mean_of(values, asked).backward()
    assert values.grad is not None and torch.equal(values.grad != 0, asked.expand_as(values))
    constant = torch.full_like(originals, 3.0)
    assert mean_of(constant, asked).item() == pytest.approx(3)


def test_noise_is_fresh_and_has_its_strength() -> None:
    signal, originals = signal_of(corruption="gaussian", strength=0.1), views.to_float(noise_images(64))
    first, second = signal.corrupt(originals)[0], signal.corrupt(originals)[0]
    assert not torch.equal(first, second)
    assert (first - originals).std().item() == pytest.approx(0.1, rel=0.05)
    assert -20 * (first - originals).square().mean().sqrt().log10().item() == pytest.approx(20, abs=0.3)


@pytest.mark.parametrize("task", ["denoising", "inpainting"])
@pytest.mark.parametrize("name", LOSSES)
def test_it_knows_where_it_errs(name: str, task: str) -> None:
    """Half of each image cannot be foreseen: there are the errors, and there it expects them."""
    signal = signal_of(8, likelihood=name, task=task)
    losses = train(signal, 50)
    assert all(math.isfinite(loss) for loss in losses)
    signal.eval()
    torch.manual_seed(0)
    with torch.inference_mode():
        result = {key: value.item() for key, value in signal.objective(halves(seed=99)).items()}
        picture = signal.picture(halves(seed=99))
    assert result["nll"] < result["nll_constant"] and result["ause"] < 0.6 * result["ause_random"]
    assert result["correlation"] > 0.5 and result["psnr"] > result["psnr_corrupted"] - 0.1
    expected = picture[3]
    assert expected[:, :, 4:].mean() > 2 * expected[:, :, :4].mean()


def test_shuffled_errors_are_as_good_as_chance() -> None:
    torch.manual_seed(0)
    signal = signal_of(8)
    train(signal, 50)
    values, logs = signal.eval().restore(signal.corrupt(views.to_float(halves()))[0])
    errors = (views.to_float(halves()) - values).abs().flatten()
    area, chance = sparsification_error(errors, logs.flatten()[torch.randperm(len(errors))])
    assert area.item() == pytest.approx(chance.item(), rel=0.1)


def test_two_halves_of_a_batch_have_the_mean_of_its_loss() -> None:
    """No image of another process is needed."""
    signal = signal_of(task="inpainting").eval()
    originals = views.to_float(noise_images())
    corrupted, asked = signal.corrupt(originals)
    values, logs = signal.restore(corrupted)
    loss = laplace(originals - values, logs)
    parts = [mean_of(*half).item() for half in zip(loss.chunk(2), asked.chunk(2), strict=True)]
    assert sum(parts) / 2 == pytest.approx(mean_of(loss, asked).item(), rel=1e-5)
