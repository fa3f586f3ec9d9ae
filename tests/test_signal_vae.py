"""The variational autoencoder: its bounds against closed forms, its likelihood, its code."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from signal_training import torchrun
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.nets.encoder import Encoder
from unlabeled.nets.likelihood import discretized_logistic
from unlabeled.signals.bottleneck.vae import (
    LOG_SCALES,
    VAE,
    divergence,
    importance_bound,
    log_density,
    reparameterized,
)


def small(shape: tuple[int, int, int] = (1, 12, 12), **settings: object) -> VAE:
    torch.manual_seed(0)
    settings = {"code_dim": 8, "width": 16} | settings
    return VAE(Encoder("small_resnet", 8, 2, shape, 0.4, 0.3), **settings)  # type: ignore[arg-type]


def images_of(shape: tuple[int, int, int] = (1, 12, 12), count: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)).byte()


def smooth_images(count: int = 32, size: int = 8) -> Tensor:
    """Images of two numbers each, a brightness and a slope: something that a code can hold."""
    generator = torch.Generator().manual_seed(0)
    brightness, slope = torch.rand(2, count, 1, 1, 1, generator=generator)
    across = torch.linspace(-0.5, 0.5, size).expand(size, size)
    return ((0.25 + 0.5 * brightness + 0.5 * (slope - 0.5) * across) * 255).round().byte()


def train(signal: VAE, images: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss, _ = signal.loss(images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# The divergence and the draw


def test_the_divergence_has_its_reference_values() -> None:
    assert divergence(torch.zeros(3, 2), torch.zeros(3, 2)).abs().max() == 0
    mean, log_variance = torch.tensor([[1.0, -0.5]]), torch.tensor([[0.0, math.log(0.25)]])
    assert divergence(mean, log_variance).sum().item() == pytest.approx(0.943147, abs=1e-6)


def test_the_divergence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(4, 5), torch.randn(4, 5)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0, 1))
    assert torch.allclose(divergence(mean, log_variance), expected, atol=1e-6)


def test_the_log_density_is_that_of_torch() -> None:
    torch.manual_seed(0)
    z, mean, log_variance = torch.randn(3, 4, 5)
    expected = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(z).sum(1)
    assert torch.allclose(log_density(z, mean, log_variance), expected, atol=1e-5)


def test_a_draw_has_the_moments_and_the_gradient_it_should() -> None:
    """dE[z²]/dμ = 2μ and dE[z²]/d log σ² = σ²; log σ² taken for σ would give other values."""
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([0.7]).requires_grad_(), torch.tensor([math.log(0.25)]).requires_grad_()
    z = reparameterized(mean.expand(200_000, 1), log_variance.expand(200_000, 1))
    assert z.mean().item() == pytest.approx(0.7, abs=0.01) and z.std().item() == pytest.approx(0.5, abs=0.01)
    z.square().mean().backward()
    assert mean.grad is not None and mean.grad.item() == pytest.approx(1.4, abs=0.02)
    assert log_variance.grad is not None and log_variance.grad.item() == pytest.approx(0.25, abs=0.02)


# The likelihood


def test_the_256_masses_sum_to_one() -> None:
    levels = (torch.arange(256) / 255).view(256, 1, 1)
    mean = torch.tensor([-0.3, 0.0, 0.1234, 0.5, 1.0, 1.4])
    log_scale = torch.tensor([LOG_SCALES[0], -6.0, -3.0, 0.0, LOG_SCALES[1]]).view(-1, 1)
    masses = discretized_logistic(levels, mean, log_scale)
    assert masses.isfinite().all() and (masses <= 0).all()
    assert torch.allclose(masses.exp().sum(0), torch.ones(5, 6), atol=1e-4)


def test_the_masses_are_differences_of_the_distribution() -> None:
    mean, log_scale = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    levels = torch.arange(256, dtype=torch.float64) / 255
    below = ((levels - mean + 1 / 510) / log_scale.exp()).sigmoid()
    expected = torch.cat((below[:1], below[1:-1] - below[:-2], 1 - below[-2:-1])).log()
    assert torch.allclose(discretized_logistic(levels, mean, log_scale), expected, atol=1e-9)


def test_far_out_the_masses_and_their_gradients_are_finite() -> None:
    """A difference of two sigmoids would be 0 here, its logarithm -inf."""
    images = torch.tensor([0.0, 0.5, 1.0]).requires_grad_()
    mean, log_scale = (torch.tensor(value).requires_grad_() for value in (30.0, LOG_SCALES[0]))
    discretized_logistic(images.detach(), mean, log_scale).sum().backward()
    for value in (mean, log_scale):
        assert value.grad is not None and value.grad.isfinite() and value.grad != 0


def test_a_learned_scale_cannot_run_away() -> None:
    """The mass of a level is at most 1, however narrow the density: no likelihood grows without bound."""
    signal = small()
    nn.init.constant_(signal.decoder.out.get_parameter("bias"), -100.0)
    _, log_scale = signal.logistic(torch.randn(2, 8))
    assert (log_scale == LOG_SCALES[0]).all()
    flat = torch.zeros(2, 1, 12, 12)
    assert (signal.log_likelihood(flat, torch.randn(2, 8)) <= 0).all()


# The importance bound


def linear_gaussian(samples: int, repeats: int) -> tuple[Tensor, Tensor, float]:
    """Return log weights (samples, repeats) of x = z + noise at x = 1 under a wrong and the true posterior."""
    normal = torch.distributions.Normal
    x = torch.tensor(1.0)
    log_weights = []
    for posterior in (normal(0.2, 0.9), normal(0.5, math.sqrt(0.5))):
        z = posterior.sample((samples, repeats))
        log_weights.append(normal(z, 1.0).log_prob(x) + normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z))
    return log_weights[0], log_weights[1], normal(0.0, math.sqrt(2)).log_prob(x).item()


def test_the_importance_bound_rises_with_its_samples_to_the_evidence() -> None:
    torch.manual_seed(0)
    log_weights, exact, evidence = linear_gaussian(64, 20_000)
    bounds = [importance_bound(log_weights[:count]).mean().item() for count in (1, 2, 4, 16, 64)]
    assert bounds[0] == pytest.approx(log_weights[0].mean().item())
    assert all(low < high for low, high in itertools.pairwise(bounds)) and bounds[-1] < evidence + 0.002
    assert evidence - bounds[0] > 0.05 and evidence - bounds[-1] < 0.005
    # With the true posterior every weight is the evidence itself.
    assert torch.allclose(importance_bound(exact[:1]), torch.tensor(evidence), atol=1e-5)


def test_the_log_weights_are_a_bound_whose_mean_is_the_elbo() -> None:
    signal = small().eval()
    nn.init.normal_(signal.decoder.out.weight, std=0.05)
    originals = images_of() / 255
    with torch.no_grad():
        weights = signal.log_weights(originals, 400)
        mean, log_variance = signal.posterior(originals)
        errors = [signal.log_likelihood(originals, reparameterized(mean, log_variance)) for _ in range(400)]
    elbo = torch.stack(errors).mean(0) - divergence(mean, log_variance).sum(1)
    assert torch.allclose(weights.mean(0), elbo, atol=0.3)
    assert (importance_bound(weights) >= weights.mean(0)).all()


# The loss


def test_the_loss_is_summed_over_the_dimensions_and_averaged_over_the_images() -> None:
    signal = small(free_bits=0.0)
    images = images_of(count=4)
    torch.manual_seed(1)
    loss, values = signal.loss(images)
    torch.manual_seed(1)
    originals = images / 255
    mean, log_variance = signal.posterior(originals)
    log_p = discretized_logistic(originals, *signal.logistic(reparameterized(mean, log_variance)))
    expected = (-log_p.sum((1, 2, 3)) + divergence(mean, log_variance).sum(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert values["bits_per_dim"].item() == pytest.approx(loss.item() / (144 * math.log(2)), rel=1e-5)


def test_the_error_at_init_is_that_of_one_logistic() -> None:
    signal = small(free_bits=0.0)
    originals = images_of() / 255
    expected = -discretized_logistic(originals, torch.tensor(0.4), torch.tensor(-2.0)).sum((1, 2, 3)).mean()
    loss, values = signal.loss(images_of())
    assert (loss - values["divergence"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mean_reduced_error_would_collapse_the_code() -> None:
    """The ablation: the same net, its error a mean over the pixels, uses no dimension of its code."""
    active = {}
    for name in ("sum", "mean"):
        signal = small((1, 8, 8), free_bits=0.0)
        if name == "mean":
            whole = signal.log_likelihood
            signal.log_likelihood = lambda originals, z, whole=whole: whole(originals, z) / 64  # type: ignore[method-assign]
        train(signal, smooth_images(), 80)
        signal.eval()
        with torch.no_grad():
            active[name] = signal.objective(smooth_images())["active_units"].item()
    assert active["sum"] >= 1 and active["mean"] == 0


def test_free_bits_keep_the_code_alive() -> None:
    """Noise holds nothing that a code could tell: without free bits it collapses, with them it does not."""
    divergences = {}
    for free_bits in (0.0, 0.5):
        signal = small((1, 8, 8), free_bits=free_bits)
        optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
        for step in range(80):
            torch.manual_seed(step)
            images = torch.randint(0, 256, (32, 1, 8, 8)).byte()
            optimizer.zero_grad()
            loss, values = signal.loss(images)
            loss.backward()
            optimizer.step()
        divergences[free_bits] = values["divergence"].item()
    assert divergences[0.0] < 0.2 and divergences[0.5] > 1.5


def test_free_bits_are_of_the_mean_over_the_images() -> None:
    signal = small(free_bits=100.0)
    torch.manual_seed(1)
    loss, values = signal.loss(images_of())
    torch.manual_seed(1)
    error = signal.loss(images_of())[1]["bits_per_dim"] * 144 * math.log(2) - values["divergence"]
    assert loss.item() == pytest.approx(error.item() + 8 * 100, rel=1e-5)


def test_one_batch_is_overfitted() -> None:
    losses = train(small((1, 8, 8)), smooth_images(), 80)
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])
def test_every_weight_learns(likelihood: str) -> None:
    signal = small(likelihood=likelihood)
    nn.init.normal_(signal.decoder.out.weight, std=0.1)
    signal.loss(images_of())[0].backward()
    for name, parameter in signal.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert signal.code.weight.grad is not None and (signal.code.weight.grad.abs().sum(1) > 0).all()


def test_bernoulli_is_of_binarised_images() -> None:
    """Grey values have no Bernoulli likelihood: they are cut at half, and a bit is the uniform answer."""
    signal = small(likelihood="bernoulli", free_bits=0.0).eval()
    images = images_of()
    assert torch.equal(signal.target(images), (images > 127).float())
    loss, values = signal.loss(images)
    assert (loss - values["divergence"]).item() == pytest.approx(144 * math.log(2), rel=1e-5)
    with torch.no_grad():
        assert signal.objective(images)["bits_per_dim_uniform"] == 1
        assert signal.picture(images).shape == (4, 8, 1, 12, 12)
    expected = -F.binary_cross_entropy(torch.full((16, 144), 0.5), (images > 127).float().flatten(1)) * 144
    assert signal.log_likelihood(signal.target(images), torch.zeros(16, 8)).mean().item() == pytest.approx(
        expected.item(), rel=1e-5
    )


# What is shown and exported


def test_the_objective_counts_the_units_in_use() -> None:
    signal = small().eval()
    nn.init.zeros_(signal.code.weight)
    with torch.no_grad():
        assert signal.objective(images_of())["active_units"] == 0
        nn.init.normal_(signal.code.weight[:3])
        values = signal.objective(images_of())
    assert values["active_units"] == 3 and values["units"] == 8 and values["bits_per_dim_uniform"] == 8
    assert values["bits_per_dim_importance"] <= values["bits_per_dim"]


def test_the_mean_of_the_code_is_a_linear_map_of_the_features() -> None:
    signal = small().eval()
    originals = images_of() / 255
    mean, _ = signal.posterior(originals)
    expected = signal.encoder(originals) @ signal.code.weight[:8].T + signal.code.get_parameter("bias")[:8]
    assert torch.allclose(mean, expected, atol=1e-5)


def test_samples_are_decoded_from_the_prior_alone() -> None:
    signal = small().eval()
    nn.init.normal_(signal.decoder.out.weight)
    rows = dict(zip(signal.picture_rows, range(4)))
    with torch.no_grad():
        pictures = []
        for images in (images_of(), images_of().flip(0)):
            torch.manual_seed(0)
            pictures.append(signal.picture(images))
    samples = [picture[rows["sample"]] for picture in pictures]
    assert torch.equal(*samples)
    assert not torch.equal(pictures[0][rows["reconstruction"]], pictures[1][rows["reconstruction"]])
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(samples[0], signal.decode(torch.randn(8, 8)))


def test_the_interpolation_goes_from_the_first_image_to_the_last() -> None:
    signal = small().eval()
    nn.init.normal_(signal.decoder.out.weight)
    with torch.no_grad():
        _, reconstruction, _, between = signal.picture(images_of())
    assert torch.allclose(between[[0, -1]], reconstruction[[0, -1]], atol=1e-5)


WORKER = """
import sys, torch
from unlabeled.signals.bottleneck import vae
from test_signal_vae import images_of, small
from unlabeled.distributed import process_group, rank

with process_group():
    torch.set_num_threads(1)
    signal = small(free_bits=0.25).eval()
    mine = images_of()[rank() * 8:][:8]
    # The same draw on one and on two processes: none.
    vae.reparameterized = lambda mean, log_variance: mean
    loss, _ = signal.loss(mine)
    loss.backward()
    torch.save({"loss": loss.detach(), "gradient": signal.code.weight.grad}, f"{sys.argv[1]}/{rank()}.pt")
"""


@pytest.mark.slow
def test_free_bits_of_two_ranks_are_those_of_the_joined_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(str(tmp_path / "worker.py"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    monkeypatch.setattr("unlabeled.signals.bottleneck.vae.reparameterized", lambda mean, log_variance: mean)
    signal = small(free_bits=0.25).eval()
    loss, _ = signal.loss(images_of())
    loss.backward()
    joined = sum(r["loss"] for r in ranks) / 2
    assert joined.item() == pytest.approx(loss.item(), rel=1e-5)
    gradient = sum(r["gradient"] for r in ranks) / 2
    assert signal.code.weight.grad is not None
    assert torch.allclose(gradient, signal.code.weight.grad, rtol=1e-4, atol=1e-4)
