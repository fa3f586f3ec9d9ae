"""Jigsaw: permutations far apart, tiles on their own, and the cheats that gap and normalisation close."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from signal_training import accuracy_after
from torch import Tensor

from unlabeled import views
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.transformation.jigsaw import Jigsaw, permutation_set, shuffle_tiles


def jigsaw(size: int = 24, channels: int = 1, **settings: Any) -> Jigsaw:
    torch.manual_seed(0)
    encoder = Encoder("small_resnet", 8, 2, (channels, size, size), 0.5, 0.29)
    return Jigsaw(encoder, **{"tile_dim": 32, "hidden_dim": 64} | settings)


def noise(count: int = 32, size: int = 24, channels: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size)).byte()


# Permutations


def distances(tiles: int, count: int) -> np.ndarray:
    chosen = np.array(permutation_set(tiles, count))
    assert chosen.shape == (count, tiles) and (np.sort(chosen, 1) == np.arange(tiles)).all()
    assert len(np.unique(chosen, axis=0)) == count
    return (chosen[:, None] != chosen).sum(-1)[np.triu_indices(count, 1)]


@pytest.mark.parametrize(
    ("tiles", "count", "least"), [(9, 9, 9), (9, 24, 7), (9, 64, 7), (9, 100, 6), (4, 4, 4), (4, 24, 2)]
)
def test_permutations_are_far_from_each_other(tiles: int, count: int, least: int) -> None:
    assert distances(tiles, count).min() >= least


def test_all_permutations_of_four_tiles() -> None:
    assert distances(4, 24).mean() == pytest.approx(3.13, abs=0.005)


def test_a_random_set_of_permutations_is_worse_where_its_mean_is_not() -> None:
    """Why the minimum is what is chosen by."""
    every = np.array([np.random.default_rng(seed).permutation(9) for seed in range(100)])
    random = (every[:, None] != every).sum(-1)[np.triu_indices(100, 1)]
    assert random.min() <= 4 and random.mean() == pytest.approx(8, abs=0.1)


def test_permutations_are_the_same_for_the_same_seed() -> None:
    again = permutation_set.__wrapped__(4, 12, 3)
    assert again == permutation_set(4, 12, 3) != permutation_set(4, 12, 4)
    assert permutation_set(4, 24, 3)[:12] == again


def test_the_inverse_permutation_restores_the_order() -> None:
    tiles = torch.rand(24, 4, 1, 3, 3)
    permutations = torch.tensor(permutation_set(4, 24))
    shuffled = shuffle_tiles(tiles, permutations)
    assert torch.equal(shuffle_tiles(shuffled, permutations.argsort(1)), tiles)
    # A slot shows the tile that the permutation names.
    assert all(torch.equal(shuffled[5, slot], tiles[5, permutations[5, slot]]) for slot in range(4))
    # The permutation in place of its inverse does not restore: 24 orders hold some that are not their own.
    assert not torch.equal(shuffle_tiles(shuffled, permutations), tiles)


# Tiles


@pytest.mark.parametrize(("size", "grid"), [(8, 2), (16, 2), (24, 3), (33, 3), (96, 3)])
def test_tiles_lie_in_their_cells_each_at_its_own_place(size: int, grid: int) -> None:
    signal = jigsaw(size)
    assert signal.grid == grid
    rows = torch.arange(size).view(-1, 1).expand(size, size)
    tiles = signal.cut(torch.stack((rows, rows.T)).expand(64, 2, size, size))
    top, left = tiles[:, :, 0, 0, 0], tiles[:, :, 1, 0, 0]
    cell, free = size // grid, size // grid - signal.tile
    assert free >= 1
    corners = torch.arange(grid) * cell
    down, right = top - corners.repeat_interleave(grid), left - corners.repeat(grid)
    for jitter in (down, right):
        assert jitter.min() == 0 and jitter.max() == free
        # Neither one for all tiles of an image, nor one for all images.
        assert (jitter != jitter[:, :1]).any() and (jitter != jitter[:1]).any()
    assert (down != right).any()
    assert torch.equal(tiles[:, :, 0, -1, 0], top + signal.tile - 1)


def test_every_tile_that_the_tower_sees_has_mean_0_and_spread_1() -> None:
    signal = jigsaw(channels=3, color_drop=0.0)
    brightness = torch.rand(8, 9, 3, 1, 1)
    tiles = torch.rand(8, 9, 3, signal.tile, signal.tile) * 0.3 + brightness
    seen = (signal.tower_input(tiles) - signal.encoder.mean) / signal.encoder.std
    assert seen.shape[2:] == (12, 12)
    assert seen.mean((2, 3)).abs().max() < 1e-4
    assert (seen.std((2, 3), correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(("shape", "least"), [((1, 8, 8), 1), ((1, 28, 28), 2), ((3, 96, 96), 4)])
def test_tiles_are_large_enough_for_the_encoder(shape: tuple[int, int, int], least: int) -> None:
    signal = jigsaw(shape[1], shape[0])
    seen = signal.tower_input(torch.rand(2, signal.grid**2, shape[0], signal.tile, signal.tile))
    assert min(signal.encoder.feature_map(seen).shape[2:]) >= least


def test_one_tower_for_all_tiles() -> None:
    signal = jigsaw().eval()
    tile = torch.rand(1, 1, 1, signal.tile, signal.tile).expand(2, 9, -1, -1, -1)
    features = signal.tile_features(signal.encoder(signal.tower_input(tile)))
    assert torch.allclose(features, features[:1].expand_as(features), atol=1e-6)
    towers = {name.split(".")[0] for name in signal.state_dict()}
    assert towers == {"permutations", "encoder", "tile_features", "head"}
    # No normalisation but the encoder's sees one slot alone.
    batches = [module.num_features for module in signal.head if isinstance(module, torch.nn.BatchNorm1d)]
    assert batches == [64]


def test_colors_are_dropped_from_each_tile() -> None:
    signal = jigsaw(channels=3)
    seen = signal.tower_input(torch.rand(16, 9, 3, signal.tile, signal.tile))
    alive = seen.std((2, 3)) > 0.5 * signal.encoder.std
    assert (alive.sum(1) == 1).all()
    assert (alive.view(16, 9, 3).any(1).sum(1) > 1).any()


# The task


@pytest.mark.parametrize(("size", "permutations", "count"), [(28, 24, 24), (28, 64, 64), (8, 64, 24)])
def test_the_loss_starts_at_the_log_of_the_permutations(size: int, permutations: int, count: int) -> None:
    signal = jigsaw(size, permutations=permutations)
    assert signal.permutations.shape == (count, signal.grid**2)
    loss, _ = signal.loss(noise(16, size))
    assert loss.item() == pytest.approx(math.log(count), abs=1e-5)
    assert signal.objective(noise(16, size))["chance"].item() == pytest.approx(1 / count)


def test_it_overfits_one_batch() -> None:
    signal = jigsaw(permutations=4, grid=2)
    torch.manual_seed(1)
    images = torch.nn.functional.interpolate(torch.rand(16, 1, 6, 6), 24, mode="bilinear").mul(255).byte()
    assert accuracy_after(signal, lambda: images, 150) > 0.6


def ramps() -> Tensor:
    """Noise on a plane of random slope: brightness and edges tell how tiles lie, what they show does not."""
    axis = torch.linspace(-1, 1, 24)
    slopes = torch.rand(2, 64, 1, 1, 1) * 2 - 1
    planes = slopes[0] * axis.view(-1, 1) + slopes[1] * axis
    return (128 + 50 * planes + 8 * torch.randn(64, 1, 24, 24)).clamp(0, 255).byte()


def test_brightness_is_a_cheat_that_gap_and_normalization_close() -> None:
    """The ablation must solve what cannot be solved by what the tiles show; the method must not."""
    settings = {"grid": 2, "permutations": 4}
    assert accuracy_after(jigsaw(**settings, gap=0.0, normalize=False), ramps, 80) > 0.8
    assert accuracy_after(jigsaw(**settings), ramps, 80) == pytest.approx(0.25, abs=0.05)


def bands() -> Tensor:
    """Noise, and along every edge of a cell a line of one brightness, the same on both sides of it."""
    values = torch.rand(2, 64, 1, 2, 3)
    images = torch.rand(64, 1, 24, 24) * 0.2 + 0.4
    for part in (0, 1):
        within = slice(12 * part, 12 * part + 12)
        for edge in range(3):
            line = slice(max(0, 12 * edge - 1), 12 * edge + 1)
            images[:, :, within, line] = values[0, :, :, part, edge, None, None]
            images[:, :, line, within] = values[1, :, :, part, edge, None, None]
    return images.mul(255).byte()


def test_edges_that_continue_are_a_cheat_that_the_gap_closes() -> None:
    settings = {"grid": 2, "permutations": 2}
    assert accuracy_after(jigsaw(**settings, gap=0.0), bands, 200) > 0.8
    assert accuracy_after(jigsaw(**settings), bands, 200) == pytest.approx(0.5, abs=0.06)


def test_the_picture_puts_the_tiles_back_as_told() -> None:
    images = noise(10, 28)
    signal = jigsaw(28).eval()
    torch.manual_seed(3)
    picture = signal.picture(images)
    assert picture.shape == (3, 8, 1, 28, 28)
    torch.manual_seed(3)
    tiles, numbers = signal.puzzle(images[:8])
    assert torch.equal(picture[1], views.lay_patches(tiles, 28))
    # Told right, they lie as in the image.
    signal.logits = lambda tiles: torch.eye(24)[numbers]  # type: ignore[method-assign]
    torch.manual_seed(3)
    restored = signal.picture(images)[2]
    torch.manual_seed(3)
    torch.randint(24, (8,))
    assert torch.equal(restored, views.lay_patches(signal.cut(images[:8].float() / 255), 28))
