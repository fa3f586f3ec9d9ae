"""The noise process against diffusers and against closed forms; the U-Net; the signal."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from unlabeled.nets.encoder import Encoder
from unlabeled.nets.likelihood import discretized_gaussian
from unlabeled.nets.noise import NoiseProcess
from unlabeled.nets.unet import UNet, time_embedding
from unlabeled.signals.recovery.diffusion import Diffusion

SCHEDULES = [("linear", 1000), ("linear", 200), ("cosine", 200), ("cosine", 7)]


def small(shape: tuple[int, int, int] = (1, 12, 12), **settings: object) -> Diffusion:
    torch.manual_seed(0)
    return Diffusion(Encoder("small_resnet", 8, 2, shape, 0.4, 0.3), **{"width": 8} | settings)  # type: ignore[arg-type]


def images_of(shape: tuple[int, int, int] = (1, 12, 12), count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)).byte()


def clean_and_noise(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (count, 1, 6, 6), generator=generator) / 127.5 - 1
    return clean, torch.randn(clean.shape, generator=generator)


def oracle(process: NoiseProcess, clean: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a denoiser that knows the image."""

    def noise_in(noised: Tensor, t: Tensor) -> Tensor:
        alpha_bar = process.alpha_bar[t].view(-1, 1, 1, 1)
        return (noised - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()

    return noise_in


def best_for_gaussian(process: NoiseProcess, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the optimal denoiser, E[ε | x_t], of pixels from N(mean, std²)."""

    def noise_in(noised: Tensor, t: Tensor) -> Tensor:
        alpha_bar = process.alpha_bar[t].view(-1, 1, 1, 1)
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (noised - alpha_bar.sqrt() * mean) / variance

    return noise_in


# The schedules


def test_the_linear_schedule_has_the_papers_values() -> None:
    process = NoiseProcess(1000, "linear")
    assert process.alpha_bar.shape == (1001,) and process.alpha_bar[0] == 1 and process.beta[0] == 0
    assert process.beta[1].item() == pytest.approx(1e-4) and process.beta[1000].item() == pytest.approx(0.02)
    for t, expected in ((1, 0.9999), (500, 0.078587), (1000, 4.0358e-5)):
        assert process.alpha_bar[t].item() == pytest.approx(expected, rel=1e-4)


def test_a_short_linear_chain_ends_in_noise() -> None:
    """Not scaled by 1000 / T it would keep a third of the image's amplitude."""
    unscaled = (1 - torch.linspace(1e-4, 0.02, 200)).prod().item()
    assert unscaled == pytest.approx(0.132, abs=1e-3)
    process = NoiseProcess(200, "linear")
    assert process.alpha_bar[200].item() == pytest.approx(3.0e-5, rel=0.02)
    assert process.beta[200].item() == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 10, 200, 1000])
def test_every_schedule_falls_from_image_to_noise(schedule: str, steps: int) -> None:
    process = NoiseProcess(steps, schedule)  # type: ignore[arg-type]
    assert (process.alpha_bar.diff() < 0).all() and process.alpha_bar[-1] < 0.02
    assert (process.beta[1:] > 0).all() and (process.beta <= 0.999).all()
    assert all(values.isfinite().all() for values in process.buffers())


def test_the_cosine_schedule_is_the_squared_cosine() -> None:
    process = NoiseProcess(100, "cosine")
    wanted = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(101)]
    assert torch.allclose(process.alpha_bar[:100], torch.tensor(wanted[:100]) / wanted[0], atol=1e-6)
    assert process.beta[100].item() == pytest.approx(0.999)


def test_the_schedules_are_no_state() -> None:
    assert not NoiseProcess(10).state_dict()


def test_noised_data_of_unit_variance_keeps_it() -> None:
    torch.manual_seed(0)
    process = NoiseProcess(200)
    for t in (1, 50, 200):
        times = torch.full((2000,), t)
        noised = process.noised(torch.randn(2000, 1, 6, 6), times, torch.randn(2000, 1, 6, 6))
        assert noised.var().item() == pytest.approx(1, abs=0.02)


# The formulas


@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES)
def test_noise_and_image_are_found_back(schedule: str, steps: int) -> None:
    process = NoiseProcess(steps, schedule)  # type: ignore[arg-type]
    clean, noise = clean_and_noise()
    t = torch.tensor([1, 2, steps // 2, steps - 1])
    assert torch.allclose(process.clean(process.noised(clean, t, noise), t, noise), clean, atol=2e-3)


def test_the_posterior_at_the_first_step_is_the_image() -> None:
    process = NoiseProcess(200)
    clean, noise = clean_and_noise()
    first = torch.ones(4, dtype=torch.int64)
    assert process.posterior_variance[1] == 0
    assert torch.equal(process.posterior_mean(clean, noise, first), clean)
    assert process.variance[1] == process.posterior_variance[2] > 0


@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES)
def test_the_reverse_mean_in_images_is_that_in_noise(schedule: str, steps: int) -> None:
    process = NoiseProcess(steps, schedule)  # type: ignore[arg-type]
    clean, noise = clean_and_noise()
    t = torch.tensor([1, 2, steps // 2 + 1, steps - 2])
    noised = process.noised(clean, t, noise)
    beta, alpha_bar = (values[t].view(-1, 1, 1, 1) for values in (process.beta, process.alpha_bar))
    in_noise = (noised - beta / (1 - alpha_bar).sqrt() * noise) / (1 - beta).sqrt()
    assert torch.allclose(process.reverse_mean(noised, t, noise), in_noise, atol=1e-5)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES)
def test_an_ancestral_step_is_diffusers(schedule: str, steps: int, variance: str) -> None:
    process = NoiseProcess(steps, schedule, variance)  # type: ignore[arg-type]
    peer = DDPMScheduler(
        num_train_timesteps=steps,
        beta_start=0.1 / steps,
        beta_end=20 / steps,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        variance_type={"beta": "fixed_large", "posterior": "fixed_small"}[variance],
        clip_sample=True,
    )
    assert torch.allclose(process.alpha_bar[1:], peer.alphas_cumprod, rtol=1e-3, atol=1e-7)
    _, seen = clean_and_noise()
    noised = 2 * seen.roll(1, 0)
    for time in {1, 2, 3, steps // 2, steps - 1}:
        t = torch.full((4,), time)
        expected = peer.step(seen, time - 1, noised, generator=torch.Generator().manual_seed(5)).prev_sample
        noise = torch.randn(noised.shape, generator=torch.Generator().manual_seed(5))
        mean = process.reverse_mean(noised, t, seen)
        std = process.variance[time].sqrt() if time > 1 else 0
        # The peer's products of α are in float32: near 1 few digits of 1 − ᾱ are left.
        assert torch.allclose(mean + std * noise, expected, atol=1e-3)
        torch.manual_seed(5)
        assert torch.allclose(process.ancestral_step(noised, t, seen), expected, atol=1e-3)
        if time > 1 and variance == "posterior":
            assert peer._get_variance(time - 1).item() == pytest.approx(
                process.posterior_variance[time].item(), rel=1e-3
            )


@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES[:3])
def test_a_ddim_step_is_diffusers(schedule: str, steps: int) -> None:
    process = NoiseProcess(steps, schedule)  # type: ignore[arg-type]
    peer = DDIMScheduler(
        num_train_timesteps=steps,
        beta_start=0.1 / steps,
        beta_end=20 / steps,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        set_alpha_to_one=True,
    )
    peer.set_timesteps(20)
    stride = steps // 20
    _, seen = clean_and_noise()
    noised = 1.5 * seen.roll(1, 0)
    for index in peer.timesteps.tolist():
        expected = peer.step(seen, index, noised, use_clipped_model_output=True).prev_sample
        t, to = torch.full((4,), index + 1), torch.full((4,), max(0, index + 1 - stride))
        assert torch.allclose(process.ddim_step(noised, t, to, seen), expected, atol=2e-4)


def test_noise_is_added_at_every_step_but_the_last() -> None:
    process = NoiseProcess(20)
    clean, noise = clean_and_noise()
    for time in (1, 2, 20):
        t = torch.full((4,), time)
        draws = torch.stack([process.ancestral_step(clean, t, noise) for _ in range(2)])
        assert torch.equal(draws[0], draws[1]) == (time == 1)


# Sampling


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("sampling_steps", [0, 10, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_with_an_oracle_every_sampler_returns_the_image(
    schedule: str, sampling_steps: int, variance: str
) -> None:
    torch.manual_seed(0)
    process = NoiseProcess(50, schedule, variance)  # type: ignore[arg-type]
    clean, noise = clean_and_noise()
    path = process.sample(oracle(process, clean), noise, sampling_steps)
    assert len(path) == (min(sampling_steps, 50) or 50) + 1 and torch.equal(path[0], noise)
    assert torch.allclose(path[-1], clean, atol=1e-3)


@pytest.mark.parametrize(("sampling_steps", "tolerance"), [(0, 0.02), (100, 0.02)])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_gaussian_data_come_back_with_their_moments(
    variance: str, sampling_steps: int, tolerance: float
) -> None:
    torch.manual_seed(0)
    process = NoiseProcess(200, "linear", variance)  # type: ignore[arg-type]
    noise = torch.randn(20_000, 1, 1, 1)
    samples = process.sample(best_for_gaussian(process, 0.2, 0.15), noise, sampling_steps)[-1]
    assert samples.mean().item() == pytest.approx(0.2, abs=tolerance / 2)
    assert samples.std().item() == pytest.approx(0.15, abs=tolerance)


# The bound


def test_the_decoders_masses_sum_to_one() -> None:
    levels = (torch.arange(256) / 255).view(256, 1)
    mean = torch.tensor([-0.3, 0.0, 0.1234, 0.5, 1.0, 1.4])
    for std in (1e-3, 0.01, 0.3, 3.0):
        masses = discretized_gaussian(levels, mean, torch.tensor(std))
        assert masses.isfinite().all()
        assert torch.allclose(masses.exp().sum(0), torch.ones(6), atol=2e-4)


def test_the_decoders_masses_are_differences_of_the_distribution() -> None:
    mean, std = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    levels = torch.arange(70, 140, dtype=torch.float64) / 255
    phi = torch.distributions.Normal(mean, std).cdf
    expected = (phi(levels + 1 / 510) - phi(levels - 1 / 510)).log()
    assert torch.allclose(discretized_gaussian(levels, mean, std), expected, atol=1e-9)
    assert torch.allclose(
        discretized_gaussian(levels.float(), mean.float(), std.float()).double(),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )
    for level, mass in ((0.0, phi(torch.tensor(1 / 510))), (1.0, 1 - phi(torch.tensor(1 - 1 / 510)))):
        found = discretized_gaussian(torch.tensor(level, dtype=torch.float64), mean, torch.tensor(0.2))
        wide = torch.distributions.Normal(mean, torch.tensor(0.2, dtype=torch.float64)).cdf
        mass = wide(torch.tensor(1 / 510)) if level == 0 else 1 - wide(torch.tensor(1 - 1 / 510))
        assert found.exp().item() == pytest.approx(mass.item(), rel=1e-4)


def test_the_prior_term_has_its_reference_value() -> None:
    process = NoiseProcess(1000)
    nats = process._prior(torch.ones(1, 1, 1, 1)).item()
    assert nats / math.log(2) == pytest.approx(2.9e-5, rel=0.02)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES)
def test_every_term_of_the_bound_is_finite_and_not_negative(schedule: str, steps: int, variance: str) -> None:
    process = NoiseProcess(steps, schedule, variance)  # type: ignore[arg-type]
    clean, noise = clean_and_noise(1)
    for time in range(1, steps + 1, max(1, steps // 50)):
        t = torch.tensor([time])
        noised = process.noised(clean, t, noise)
        mean = process.reverse_mean(noised, t, noise + 0.1)
        term = (process._decoder if time == 1 else process._divergence)(clean, noised, t, mean).sum()
        assert term.isfinite() and term >= 0
    assert process._prior(clean) >= 0


def test_the_divergence_is_that_of_torch() -> None:
    process = NoiseProcess(50, "linear", "beta")
    clean, noise = clean_and_noise()
    t = torch.tensor([2, 3, 25, 50])
    noised = process.noised(clean, t, noise)
    mean = process.reverse_mean(noised, t, noise * 0.9)
    true = torch.distributions.Normal(
        process.posterior_mean(clean, noised, t), process.posterior_variance[t].sqrt().view(-1, 1, 1, 1)
    )
    ours = torch.distributions.Normal(mean, process.variance[t].sqrt().view(-1, 1, 1, 1))
    expected = torch.distributions.kl_divergence(true, ours)
    assert torch.allclose(process._divergence(clean, noised, t, mean), expected, rtol=1e-3, atol=1e-4)


def test_the_weight_of_the_noises_error_in_the_bound() -> None:
    """KL(ε̂) - KL(ε) = β² / (2σ²α(1 - ᾱ)) ‖ε - ε̂‖², where nothing is clipped."""
    process = NoiseProcess(100, "linear", "beta")
    t = torch.tensor([5, 20, 50, 60])
    clean, noise = torch.zeros(4, 1, 6, 6), torch.randn(4, 1, 6, 6).clamp(-1, 1)
    noised = process.noised(clean, t, noise)
    terms = [
        process._divergence(clean, noised, t, process.reverse_mean(noised, t, noise + shift))
        for shift in (0.1, 0.0)
    ]
    beta, alpha_bar = process.beta[t], process.alpha_bar[t]
    weight = beta**2 / (2 * process.variance[t] * (1 - beta) * (1 - alpha_bar))
    found = (terms[0] - terms[1]).mean((1, 2, 3))
    assert torch.allclose(found, weight * 0.01, rtol=0.02)


def test_the_bound_of_the_best_denoiser_nears_the_entropy() -> None:
    """Gaussian pixels: −log₂ p is known, the bound lies above it, and near when the chain is long."""
    torch.manual_seed(0)
    std = 0.2
    clean = ((torch.randn(64, 1, 8, 8) * std + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    entropy = math.log2(std * 127.5 * math.sqrt(2 * math.pi * math.e))
    process = NoiseProcess(200, "cosine", "beta")
    bits, _ = process.bound(clean, best_for_gaussian(process, 0.0, std), 199)
    assert entropy - 0.05 < bits.mean().item() < entropy + 0.25
    wrong, _ = process.bound(clean, best_for_gaussian(process, 0.0, 3 * std), 199)
    assert wrong.mean() > bits.mean() + 0.1


def test_the_bound_from_few_draws_is_without_bias() -> None:
    torch.manual_seed(0)
    process = NoiseProcess(40)
    clean, _ = clean_and_noise(8)
    denoiser = best_for_gaussian(process, 0.0, 0.58)
    whole = [torch.stack([process.bound(clean, denoiser, 39)[i].mean() for _ in range(8)]) for i in (0, 1)]
    few = [torch.stack([process.bound(clean, denoiser, 2)[i].mean() for _ in range(150)]) for i in (0, 1)]
    for exact, estimate in zip(whole, few):
        error = estimate.std() / math.sqrt(len(estimate)) + exact.std() / math.sqrt(len(exact))
        assert abs(estimate.mean() - exact.mean()) < 3 * error


def test_a_whole_bound_takes_every_time_once() -> None:
    process, seen = NoiseProcess(30), []

    def denoiser(noised: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(noised)

    torch.manual_seed(0)
    process.bound(torch.zeros(5, 1, 2, 2), denoiser, 29)
    times = torch.stack(seen)
    assert all(sorted(times[:, image].tolist()) == list(range(1, 31)) for image in range(5))


def test_a_denoiser_of_zero_has_an_error_of_one() -> None:
    torch.manual_seed(0)
    _, error = NoiseProcess(20).bound(torch.zeros(64, 1, 8, 8), lambda noised, t: torch.zeros_like(noised), 4)
    assert error.mean().item() == pytest.approx(1, abs=0.03)


# The U-Net


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 9), (1, 28, 28), (3, 33, 20)])
def test_the_unet_gives_the_size_of_the_images_and_zero_at_first(shape: tuple[int, int, int]) -> None:
    encoder = Encoder("small_resnet", 8, 1, shape, 0.4, 0.3)
    unet = UNet(shape[0], encoder.map_channels, 8)
    noised, time = torch.randn(2, *shape), torch.tensor([0.1, 0.9])
    assert torch.equal(unet(noised, time, encoder), torch.zeros(2, *shape))


def test_the_unet_sees_the_time_the_encoder_and_every_pixel() -> None:
    torch.manual_seed(0)
    encoder = Encoder("small_resnet", 8, 1, (1, 9, 9), 0.4, 0.3).eval()
    unet = UNet(1, encoder.map_channels, 8)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    noised, time = torch.randn(2, 1, 9, 9).requires_grad_(), torch.tensor([0.1, 0.9])
    before = unet(noised, time, encoder)
    assert (unet(noised, time + 0.005, encoder) - before).abs().max() > 1e-3
    before.square().sum().backward()
    assert noised.grad is not None and (noised.grad.abs() > 0).all()
    for parameter in (*unet.parameters(), *encoder.parameters()):
        assert parameter.grad is not None
    assert max(parameter.grad.abs().max() for parameter in encoder.parameters()) > 1e-3
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(unet(noised, time, encoder), before, atol=1e-3)


def test_times_are_told_apart() -> None:
    embedding = time_embedding(torch.arange(1, 201) / 200, 16)
    assert embedding.shape == (200, 16)
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(200)
    assert distances.min() > 0.05


# The signal


def test_the_loss_at_init_is_that_of_zero() -> None:
    loss, _ = small().loss(images_of(count=64))
    assert loss.item() == pytest.approx(1, abs=0.05)


def test_one_batch_is_overfitted() -> None:
    signal = small((1, 8, 8))
    optimizer = torch.optim.AdamW(signal.parameters(), 4e-3)
    images = images_of((1, 8, 8), 2).repeat(16, 1, 1, 1)
    losses = []
    for step in range(70):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss, _ = signal.loss(images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


def test_the_image_is_not_clipped_in_training() -> None:
    """A clipped image has no gradient where the prediction is far off; here all have one."""
    signal = small()
    torch.nn.init.constant_(signal.unet.out.get_parameter("bias"), 50.0)
    loss, _ = signal.loss(images_of())
    loss.backward()
    gradient = signal.unet.out.get_parameter("bias").grad
    assert gradient is not None and (gradient > 0).all()


def test_the_average_follows_the_weights_and_takes_no_gradient() -> None:
    signal = small(average=0.9)
    assert not any(p.requires_grad for p in signal.average_unet.parameters())
    assert not any(p.requires_grad for p in signal.average_encoder.parameters())
    start = signal.average_unet.stem.weight.clone()
    with torch.no_grad():
        signal.unet.stem.weight.add_(1)
        signal.updates.fill_(10_000)
    signal.after_step()
    assert torch.allclose(signal.average_unet.stem.weight, start + 0.1, atol=1e-6)
    young = small(average=0.9)
    with torch.no_grad():
        young.unet.stem.weight.add_(1)
    young.after_step()
    assert torch.allclose(young.average_unet.stem.weight, start + 10 / 11, atol=1e-5)


def test_samples_and_bound_come_from_the_averaged_weights() -> None:
    signal = small(steps=10, sampling_steps=3).eval()
    images = images_of()

    def shown() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            torch.manual_seed(0)
            return signal.objective(images)["bits_per_dim"], signal.picture(images)

    before = shown()
    torch.nn.init.normal_(signal.unet.out.weight)
    assert all(torch.equal(*pair) for pair in zip(before, shown()))
    torch.nn.init.normal_(signal.average_unet.out.weight)
    assert not any(torch.equal(*pair) for pair in zip(before, shown()))


def test_the_encoder_is_the_contracting_path() -> None:
    signal = small()
    torch.nn.init.normal_(signal.unet.out.weight)
    loss, _ = signal.loss(images_of())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in signal.encoder.parameters())


def test_the_bound_is_far_from_l_simple_and_beside_uniform() -> None:
    signal = small().eval()
    with torch.no_grad():
        values = signal.objective(images_of())
    assert values["bits_per_dim_uniform"] == 8 and values["noise_error_of_zero"] == 1
    assert values["noise_error"].item() == pytest.approx(1, abs=0.1)
    # Zero noise seen at every level is a poor model: worse than uniform levels.
    assert values["bits_per_dim"] > 8


def test_the_picture_begins_with_the_images_and_ends_with_samples() -> None:
    signal = small(sampling_steps=4).eval()
    images = images_of(count=10)
    with torch.no_grad():
        picture = signal.picture(images)
    assert picture.shape == (8, 8, 1, 12, 12) and len(signal.picture_rows) == 8
    assert torch.allclose(picture[0], images[:8] / 255, atol=1e-6)
    assert not torch.allclose(picture[1], picture[0], atol=0.05)


def test_nothing_is_clipped_or_lost_on_the_way_to_the_loss() -> None:
    """The loss is the mean square of the noise itself, for a net that sees none."""
    signal = small()
    images = images_of()
    torch.manual_seed(3)
    loss, _ = signal.loss(images)
    torch.manual_seed(3)
    torch.randint(1, 201, (8,))
    assert torch.allclose(loss, F.mse_loss(torch.randn(8, 1, 12, 12), torch.zeros(8, 1, 12, 12)))
