"""Context: where the patches lie, and the shortcuts that gap, normalisation and dropped colours close."""

import math
from typing import Any

import pytest
import torch
from signal_training import accuracy_after
from torch import Tensor
from torch.nn import functional as F

from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.transformation.context import Context, direction


def context(size: int = 32, channels: int = 1, **settings: Any) -> Context:
    torch.manual_seed(0)
    encoder = Encoder("small_resnet", 8, 2, (channels, size, size), 0.3, 0.29)
    return Context(encoder, **{"hidden_dim": 64} | settings)


def noise(count: int = 32, size: int = 32, channels: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size)).byte()


# Places


def test_the_other_way_round_is_7_minus_the_label() -> None:
    labels = torch.arange(8)
    assert direction(labels).tolist() == [
        [-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 0], [1, 1],
    ]  # fmt: skip
    assert torch.equal(direction(7 - labels), -direction(labels))


@pytest.mark.parametrize("size", [8, 9, 16, 28, 33, 64, 96])
def test_patches_share_no_pixel_and_none_leaves_the_image(size: int) -> None:
    torch.manual_seed(0)
    signal = context(size)
    labels = torch.arange(8).repeat(300)
    top, left = signal.corners(labels)
    last = size - signal.patch
    assert min(top.min(), left.min()) == 0 and max(top.max(), left.max()) == last
    apart = torch.stack((top[:, 1] - top[:, 0], left[:, 1] - left[:, 0]), 1)
    steps = direction(labels)
    # Along an axis that the label names, there is a gap of at least one pixel, on the side it names.
    between = (apart * steps)[steps != 0] - signal.patch
    assert signal.gap > 2 * signal.jitter
    assert between.min() == signal.gap - 2 * signal.jitter >= 1
    assert between.max() == signal.gap + 2 * signal.jitter
    # Along the other, they differ by their jitter alone.
    assert apart[steps == 0].abs().max() == 2 * signal.jitter
    covered = torch.zeros(len(labels), size, size)
    pixels = torch.arange(size)
    for patch in (0, 1):
        rows = (pixels >= top[:, patch, None]) & (pixels < top[:, patch, None] + signal.patch)
        columns = (pixels >= left[:, patch, None]) & (pixels < left[:, patch, None] + signal.patch)
        covered += rows.unsqueeze(2) & columns.unsqueeze(1)
    assert covered.max() == 1


def test_both_patches_are_jittered_each_on_its_own() -> None:
    torch.manual_seed(0)
    signal = context(64)
    top, left = signal.corners(torch.full((500,), 4))
    for apart in (top[:, 1] - top[:, 0], left[:, 1] - left[:, 0] - signal.patch - signal.gap):
        assert len(apart.unique()) == 4 * signal.jitter + 1


def test_a_jitter_that_closes_the_gap_is_refused() -> None:
    from unlabeled.signals import method_settings

    with pytest.raises(InputError, match=r"pretrain\.context\.jitter"):
        method_settings("context", {"jitter": 0.5})


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"pretrain\.context\.patch"):
        context(28, patch=0.45, gap=0.3)


def test_labels_are_balanced() -> None:
    _, labels = context().pairs(noise(64))
    assert torch.bincount(labels).tolist() == [8] * 8


def test_patches_are_what_lies_there() -> None:
    """Images of their own coordinates: each patch says where it lay."""
    size = 32
    rows = torch.arange(size).view(-1, 1).expand(size, size)
    images = torch.stack((rows, rows.T, rows)).expand(80, 3, size, size).byte()
    signal = context(channels=3)
    patches, labels = signal.pairs(images)
    middle = (patches * 255).mean((3, 4))[:, :, :2]
    signs = torch.where(
        (middle[:, 1] - middle[:, 0]).abs() > signal.patch, middle[:, 1] - middle[:, 0], 0
    ).sign()
    assert torch.equal(signs.long(), direction(labels))


# The nets


def test_the_second_half_of_the_logits_are_of_the_pairs_the_other_way() -> None:
    signal = context(low_resolution=0.0).eval()
    torch.nn.init.normal_(signal.head[-1].weight)
    patches = torch.rand(5, 2, 1, signal.patch, signal.patch)
    there, back = signal.logits(patches).chunk(2)
    assert torch.allclose(signal.logits(patches.flip(1)).chunk(2)[0], back, atol=1e-5)
    assert not torch.allclose(there, back, atol=1e-3)


def test_the_loss_starts_at_log_8() -> None:
    loss, _ = context().loss(noise())
    assert loss.item() == pytest.approx(math.log(8), abs=1e-6)


def test_every_patch_that_the_tower_sees_has_mean_0_and_spread_1() -> None:
    signal = context(channels=3, color_drop=0.0)
    patches = torch.rand(8, 2, 3, signal.patch, signal.patch) * 0.3 + torch.rand(8, 2, 3, 1, 1)
    seen = (signal.tower_input(patches) - signal.encoder.mean) / signal.encoder.std
    assert seen.shape == (16, 3, 16, 16)
    assert seen.mean((2, 3)).abs().max() < 1e-4
    assert (seen.std((2, 3), correction=0) - 1).abs().max() < 1e-3


def test_it_overfits_one_batch() -> None:
    torch.manual_seed(1)
    images = F.interpolate(torch.rand(8, 1, 8, 8), 32, mode="bilinear").mul(255).byte()
    assert accuracy_after(context(low_resolution=0.0), lambda: images, 150) > 0.6


# Shortcuts


def chromatic(count: int = 64, size: int = 32, strength: float = 0.12) -> Tensor:
    """Random dots through a bad lens: red is scaled up and blue down, about the centre of the image."""
    dots = (torch.rand(count, 1, size, size) < 0.03).float()
    dots = F.avg_pool2d(dots, 3, 1, 1) * 9
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(count, size, size, 2)
    red, blue = (
        F.grid_sample(dots, grid * factor, padding_mode="reflection", align_corners=False)
        for factor in (1 - strength, 1 + strength)
    )
    return torch.cat((red, dots, blue), 1).clamp(0, 1).mul(255).byte()


def test_the_lens_gives_places_away_until_colors_are_dropped() -> None:
    """The ablation must read the radial shift of the colours; the method must stay at one in eight."""
    settings = {"low_resolution": 0.0}
    assert accuracy_after(context(channels=3, color_drop=0.0, **settings), chromatic, 120) > 0.5
    assert accuracy_after(context(channels=3, **settings), chromatic, 120) == pytest.approx(0.125, abs=0.03)


def vignettes() -> Tensor:
    """Noise under one light: brighter to the upper left."""
    axis = torch.linspace(1, 0, 32)
    light = (axis.view(-1, 1) + axis) / 2
    return ((0.2 + 0.6 * light + 0.05 * torch.randn(64, 1, 32, 32)).clamp(0, 1) * 255).byte()


def test_brightness_gives_places_away_until_patches_are_normalized() -> None:
    assert accuracy_after(context(normalize=False), vignettes, 80) > 0.5
    assert accuracy_after(context(), vignettes, 80) == pytest.approx(0.125, abs=0.03)


# The picture


def test_the_picture_frames_the_patches() -> None:
    images = noise(10) // 4
    signal = context().eval()
    picture = signal.picture(images)
    assert picture.shape == (3, 8, 1, 32, 32)
    framed = (picture[0] - images[:8].float() / 255).abs() > 1e-6
    assert framed.flatten(1).sum(1).tolist() == [2 * 4 * (signal.patch - 1)] * 8


def test_the_picture_lays_the_second_patch_where_it_is_told() -> None:
    signal = context(33)
    patches = torch.stack((torch.zeros(8, 1, 12, 12), torch.ones(8, 1, 12, 12)), 1)
    laid = signal.lay(patches, torch.arange(8))
    for label, (down, right) in enumerate(direction(torch.arange(8)).tolist()):
        board = laid[label, 0].unfold(0, 11, 11).unfold(1, 11, 11).mean((2, 3))
        expected = torch.full((3, 3), 0.5)
        expected[1, 1], expected[1 + down, 1 + right] = 0.0, 1.0
        assert torch.allclose(board, expected, atol=1e-5)
