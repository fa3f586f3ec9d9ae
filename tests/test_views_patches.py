"""Patches: cutting, normalising, dropping colours, lowering the resolution."""

import pytest
import torch
from torch.nn import functional as F

from unlabeled import views


def test_patches_are_the_pixels_that_their_corners_say() -> None:
    images = torch.randint(0, 256, (3, 2, 11, 13)).byte()
    top, left = torch.randint(0, 8, (3, 5)), torch.randint(0, 10, (3, 5))
    patches = views.cut_patches(images, top, left, 4)
    assert patches.shape == (3, 5, 2, 4, 4) and patches.dtype == torch.uint8
    for b in range(3):
        for p in range(5):
            y, x = top[b, p], left[b, p]
            assert torch.equal(patches[b, p], images[b, :, y : y + 4, x : x + 4])


def test_normalized_patches_have_one_mean_and_one_spread() -> None:
    patches = torch.rand(4, 3, 3, 6, 6) * (0.2 + torch.rand(4, 3, 3, 1, 1)) + torch.rand(4, 3, 3, 1, 1)
    for mean, std in ((0.0, 1.0), (0.3, 0.2)):
        normalized = views.normalize_patches(patches, mean, std)
        assert torch.allclose(normalized.mean((-2, -1)), torch.full((4, 3, 3), mean), atol=1e-5)
        assert torch.allclose(normalized.std((-2, -1), correction=0), torch.full((4, 3, 3), std), rtol=1e-4)
    # Each on its own: another brightness and contrast change nothing.
    assert torch.allclose(
        views.normalize_patches(patches), views.normalize_patches(0.3 * patches + 0.5), atol=1e-4
    )


def test_a_flat_patch_becomes_the_mean() -> None:
    flat = views.normalize_patches(torch.full((2, 1, 5, 5), 0.7), 0.3, 0.2)
    assert torch.allclose(flat, torch.full((2, 1, 5, 5), 0.3), atol=1e-3)


def test_dropping_colors_keeps_one_channel_and_no_trace_of_the_others() -> None:
    torch.manual_seed(0)
    patches = torch.randn(300, 3, 6, 6)
    dropped = views.drop_colors(patches, 2.0, 3.0)
    kept = (dropped == patches).flatten(2).all(2)
    assert (kept.sum(1) == 1).all() and kept.sum(0).min() > 70
    noise = dropped[~kept]
    assert noise.mean().item() == pytest.approx(2.0, abs=1e-3)
    assert noise.std().item() == pytest.approx(0.03, rel=0.02)
    assert torch.corrcoef(torch.stack((noise.flatten(), patches[~kept].flatten())))[0, 1].abs() < 0.03


def test_colors_are_dropped_with_a_probability_and_gray_is_kept() -> None:
    torch.manual_seed(0)
    patches = torch.randn(1000, 3, 2, 2)
    whole = (views.drop_colors(patches, probability=0.3) == patches).flatten(1).all(1)
    assert whole.float().mean().item() == pytest.approx(0.7, abs=0.05)
    assert torch.equal(views.drop_colors(patches[:, :1]), patches[:, :1])


def test_patches_are_laid_in_the_middle_of_their_cells() -> None:
    patches = torch.rand(2, 9, 3, 3, 3)
    laid = views.lay_patches(patches, 20)
    assert laid.shape == (2, 3, 20, 20)
    for number in range(9):
        top, left = 6 * (number // 3) + 1, 6 * (number % 3) + 1
        assert torch.equal(laid[:, :, top : top + 3, left : left + 3], patches[:, number])
        laid[:, :, top : top + 3, left : left + 3] = 0.5
    assert (laid == 0.5).all()


@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_a_lower_resolution_is_down_by_area_and_up_by_interpolation(size: int) -> None:
    torch.manual_seed(0)
    patches = torch.rand(40, 2, size, size)
    lowered = views.random_resolution(patches, smallest=0.3, probability=1.0)
    lowest = max(2, round(0.3 * size))
    through = [
        F.interpolate(F.interpolate(patches, side, mode="area"), size, mode="bilinear")
        for side in range(lowest, max(lowest + 1, size))
    ]
    errors = torch.stack([(lowered - one).abs().amax((1, 2, 3)) for one in through])
    assert errors.min(0).values.max() < 1e-5
    assert len(errors.argmin(0).unique()) == len(through)


def test_resolution_is_lowered_with_a_probability() -> None:
    torch.manual_seed(0)
    patches = torch.rand(1000, 1, 6, 6)
    lowered = views.random_resolution(patches)
    kept = (lowered - patches).abs().amax((1, 2, 3)) < 1e-6
    assert kept.float().mean().item() == pytest.approx(2 / 3, abs=0.05)
    assert torch.allclose(views.random_resolution(patches, probability=0.0), patches)


def test_training_goes_on_after_an_evaluation() -> None:
    """What the first call keeps for later was made in inference mode; a gradient must still pass."""
    with torch.inference_mode():
        views.random_resolution(torch.rand(2, 1, 13, 13))
    patches = torch.rand(2, 1, 13, 13, requires_grad=True)
    views.random_resolution(patches, probability=1.0).sum().backward()
    assert patches.grad is not None
