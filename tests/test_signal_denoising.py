import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from signal_training import train
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.measures.reconstruction import psnr
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.recovery.denoising import (
    CORRUPTIONS,
    Denoising,
    best_blur,
    corrupt,
    median_filter,
    restoration_error,
)
from unlabeled.signals.signal import Signal
from unlabeled.views.holes import grid_blocks


def tones(count: int, side: int = 8, mean: float = 0.5, std: float = 0.1) -> Tensor:
    """Return uint8 images (count, 1, side, side) whose values are independent, x ~ N(mean, std²)."""
    values = mean + std * torch.randn(count, 1, side, side)
    return (values * 255).round().clamp(0, 255).byte()


def small_signal(side: int = 8, **settings: object) -> Denoising:
    torch.manual_seed(0)
    return Denoising(Encoder("small_resnet", 16, 2, (1, side, side), 0.5, 0.3), **settings)


# Corruption


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_noise_is_fresh_for_every_image_and_every_step(corruption: str) -> None:
    images = torch.full((2, 3, 16, 16), 0.5)
    first, second = (corrupt(images, corruption, 0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]) and torch.equal(images, torch.full_like(images, 0.5))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_what_is_not_said_to_be_corrupted_is_untouched(corruption: str) -> None:
    images = torch.rand(4, 3, 33, 33)
    corrupted, hit = corrupt(images, corruption, 0.4)
    assert hit.shape == images.shape and hit.dtype == torch.bool
    assert torch.equal(corrupted[~hit], images[~hit]) and (corrupted[hit] != images[hit]).all()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_strength_0_corrupts_nothing(corruption: str) -> None:
    images = torch.rand(4, 1, 9, 9)
    assert torch.equal(corrupt(images, corruption, 0.0)[0], images)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.3])
def test_unclipped_noise_has_the_psnr_of_its_sigma(sigma: float) -> None:
    images = torch.rand(16, 1, 96, 96)
    noisy, hit = corrupt(images, "gaussian", sigma)
    assert psnr(noisy, images).item() == pytest.approx(-20 * math.log10(sigma), abs=0.05)
    assert hit.all() and noisy.min() < 0 and noisy.max() > 1


def test_salt_and_pepper_hit_their_share_half_each() -> None:
    images = torch.full((8, 3, 64, 64), 0.5)
    corrupted, hit = corrupt(images, "salt_and_pepper", 0.3)
    assert hit.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert corrupted[hit].unique().tolist() == [0, 1]
    assert corrupted[hit].mean().item() == pytest.approx(0.5, abs=0.02)


def test_masking_takes_whole_blocks_in_all_channels() -> None:
    images = torch.rand(6, 3, 32, 32) + 0.1
    corrupted, hit = corrupt(images, "masking", 0.5)
    assert (corrupted[hit] == 0).all()
    blocks = hit.view(6, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).flatten(3)
    assert (blocks.all(3) == blocks.any(3)).all() and (blocks.all(3).sum((1, 2)) == 32).all()


@pytest.mark.parametrize("size", [8, 28, 33])
def test_every_image_loses_the_same_share_of_blocks(size: int) -> None:
    holes = grid_blocks(torch.rand(5, 3, size, size), 0.25)
    assert holes.shape == (5, 1, size, size)
    rows = -(-size // 4)
    assert (holes[..., ::4, ::4].sum((1, 2, 3)) == round(0.25 * rows * rows)).all()


# Loss


def test_the_error_weighs_intact_values() -> None:
    restored, originals = torch.zeros(1, 1, 1, 4), torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    hit = torch.tensor([[[[True, False, True, False]]]])
    assert restoration_error(restored, originals, hit, 1.0).item() == F.mse_loss(restored, originals).item()
    assert restoration_error(restored, originals, hit, 0.0).item() == (1 + 9) / 4
    assert restoration_error(restored, originals, hit, 0.5).item() == (1 + 9 + 0.5 * (4 + 16)) / 4


def test_full_emphasis_gives_intact_values_no_gradient() -> None:
    originals = torch.rand(3, 1, 16, 16)
    _, hit = corrupt(originals, "salt_and_pepper", 0.3)
    restored = torch.rand(3, 1, 16, 16, requires_grad=True)
    restoration_error(restored, originals, hit, 0.0).backward()
    assert restored.grad is not None
    assert (restored.grad[~hit] == 0).all() and (restored.grad[hit] != 0).all()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_target_is_the_clean_image(corruption: str) -> None:
    """At init the output is the mean whatever goes in, so the loss is the variance of the target."""
    signal, images = small_signal(corruption=corruption, strength=0.9), tones(64)
    originals = images.float() / 255
    nn.init.constant_(signal.decoder.out.get_parameter("bias"), originals.mean().item())
    expected = originals.var(unbiased=False).item()
    assert signal.loss(images)[0].item() == pytest.approx(expected, rel=1e-4)


def test_a_batch_is_overfitted() -> None:
    losses = train(small_signal(strength=0.25), tones(8, std=0.3), 60, 1e-2, batch=8)
    assert losses[-1] < 0.4 * losses[0]


# Linear theory


class Gain(nn.Module):
    """A linear encoder of one number: w · x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images + self.bias


def minimise(signal: Signal, images: Tensor) -> float:
    """Return the least loss that L-BFGS finds, the noise being the same at every call."""
    optimizer = torch.optim.LBFGS(signal.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss, _ = signal.loss(images)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    return closure().item()


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_the_linear_autoencoder_learns_the_wiener_gain(sigma: float) -> None:
    torch.manual_seed(0)
    images = tones(2000, std=0.1)
    signal = small_signal(corruption="gaussian", strength=sigma)
    signal.encoder, signal.decoder = Gain(), nn.Identity()  # type: ignore[assignment]
    error = minimise(signal, images)
    variance = (images.float() / 255).var().item()
    gain = variance / (variance + sigma**2)
    assert signal.encoder.weight.item() == pytest.approx(gain, abs=0.01)
    assert signal.encoder.bias.item() == pytest.approx(0.5 * (1 - gain), abs=0.01)
    assert error == pytest.approx(gain * sigma**2, rel=0.02)


def test_only_noise_keeps_an_overcomplete_code_from_the_identity() -> None:
    torch.manual_seed(0)
    images = tones(200, 4)
    variance = (images.float() / 255).var().item()
    errors = {}
    for strength in (0.0, 0.25):
        torch.manual_seed(0)
        signal = small_signal(corruption="salt_and_pepper", strength=strength)
        signal.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 32))  # type: ignore[assignment]
        signal.decoder = nn.Sequential(nn.Linear(32, 16), nn.Unflatten(1, (1, 4, 4)))  # type: ignore[assignment]
        errors[strength] = minimise(signal, images)
    assert errors[0.0] < 1e-4 * variance
    # Values that are independent of each other: nothing tells what was at a hit place.
    assert errors[0.25] > 0.2 * variance


# Trivial answers


def test_the_median_is_scipys() -> None:
    images = torch.rand(2, 3, 9, 9)
    expected = ndimage.median_filter(images.numpy(), (1, 1, 3, 3), mode="nearest")
    assert np.array_equal(median_filter(images).numpy(), expected)


def test_the_best_blur_is_at_least_as_good_as_none() -> None:
    images = F.interpolate(torch.rand(4, 1, 4, 4), (16, 16), mode="bilinear")
    noisy, _ = corrupt(images, "gaussian", 0.2)
    best = psnr(best_blur(noisy, images), images)
    assert best > psnr(noisy, images) + 3
    assert psnr(best_blur(images, images), images) > 60


# Learning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("corruption", "strength", "rivals"),
    [
        ("gaussian", 0.3, ["psnr_corrupted", "psnr_blur"]),
        ("masking", 0.5, ["psnr_corrupted", "psnr_blur", "psnr_diffusion_fill"]),
        ("salt_and_pepper", 0.4, ["psnr_corrupted", "psnr_blur", "psnr_median"]),
    ],
)
def test_held_out_digits_are_restored_better_than_by_any_filter(
    digits: tuple[np.ndarray, np.ndarray], corruption: str, strength: float, rivals: list[str]
) -> None:
    images = torch.from_numpy(digits[0])
    signal = small_signal(corruption=corruption, strength=strength)
    train(signal, images[:1500], 120, 5e-3)
    signal.eval()
    with torch.inference_mode():
        values = signal.objective(images[1500:])
    assert set(values) == {"psnr", *rivals}
    assert all(values["psnr"] > values[rival] + 1 for rival in rivals), values


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_before_training_no_filter_is_beaten(corruption: str) -> None:
    """The flat mean image is far from smooth images: the objective can tell."""
    smooth = F.interpolate(torch.rand(8, 1, 4, 4), (16, 16), mode="bilinear")
    images = (smooth * 255).byte()
    signal = small_signal(16, corruption=corruption, strength=0.1).eval()
    values = signal.objective(images)
    rival = {"gaussian": "blur", "masking": "diffusion_fill", "salt_and_pepper": "median"}[corruption]
    assert values["psnr"] < values[f"psnr_{rival}"] - 3


def test_the_picture_shows_what_was_restored() -> None:
    images = tones(10)
    rows = small_signal(strength=0.5).eval().picture(images)
    assert torch.equal(rows[0], images[:8].float() / 255)
    assert (rows[1] == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.allclose(rows[2], torch.tensor(0.5))
