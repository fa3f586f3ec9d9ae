"""PIRL: jigsaws, and the loss that ties them to the memory of their image."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.nets.encoder import Encoder
from unlabeled.nets.memory import memory_nce
from unlabeled.signals.contrast.pirl import PIRL, shuffled_tiles


def smooth_images(count: int, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    return F.interpolate(coarse, side, mode="bilinear").mul(255).byte()


def pirl(count: int = 32, side: int = 16, **settings: Any) -> PIRL:
    torch.manual_seed(0)
    signal = PIRL(Encoder("small_resnet", 16, 2, (1, side, side), 0.5, 0.3), **settings)
    signal.prepare(smooth_images(2), count)
    return signal


# Jigsaws


@pytest.mark.parametrize("grid", [2, 3, 4])
@pytest.mark.parametrize("side", [8, 28, 33, 96])
def test_tiles_are_pieces_of_the_cells_and_of_their_own_image(grid: int, side: int) -> None:
    """Pixels that tell where they stand: every cell gives one tile, cut within it."""
    numbers = torch.arange(side * side).view(1, 1, side, side)
    images = torch.cat((numbers, numbers + side * side))
    tiles = shuffled_tiles(images, grid, 0.15)
    cell, size = side // grid, tiles.shape[-1]
    assert tiles.shape[:3] == (2, grid * grid, 1) and size == max(1, int(0.85 * cell))
    for image in range(2):
        rows, columns = (
            (tiles[image, :, 0] - image * side * side).div(side, rounding_mode="floor"),
            tiles % side,
        )
        assert ((tiles[image] // (side * side)) == image).all()
        top, left = rows[:, 0, 0], columns[image, :, 0, 0, 0]
        assert sorted((top // cell * grid + left // cell).tolist()) == list(range(grid * grid))
        assert ((top + size - 1) // cell == top // cell).all()
        assert ((left + size - 1) // cell == left // cell).all()
        # Whole pieces: neighbours of the tile were neighbours in the image.
        assert torch.equal(rows[:, :, 0], top.unsqueeze(1) + torch.arange(size))


def test_every_tile_comes_to_every_place_equally_often_and_is_jittered() -> None:
    cells = torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    images = (cells // 8 * 2 + cells % 4 // 2).expand(2000, 1, 8, 8)
    torch.manual_seed(0)
    tiles = shuffled_tiles(images, 2, 0.0)[:, :, 0, 0, 0]
    counts = torch.stack([(tiles == number).sum(0) for number in range(4)])
    assert ((counts - 500).abs() < 100).all()
    numbers = torch.arange(64).view(1, 1, 8, 8).expand(300, 1, 8, 8)
    assert len(shuffled_tiles(numbers, 2, 0.25)[:, :, 0, 0, 0].unique()) == 16  # four corners in each cell


def test_with_a_gap_edges_seldom_run_on_without_one_always() -> None:
    """The ablation: how often the next pixel of a left tile's edge is the right tile's first."""
    ramp = torch.arange(32).expand(500, 1, 32, 32)

    def touching(gap: float) -> float:
        tiles = shuffled_tiles(ramp, 2, gap)[:, :, 0, 0]
        starts, ends = tiles[:, :, 0], tiles[:, :, -1]
        return ((starts.amax(1) - ends.amin(1)) == 1).float().mean().item()

    torch.manual_seed(0)
    assert touching(0.0) == 1 and touching(0.15) < 0.3


# The loss


def test_the_loss_is_the_weighted_sum_of_two_contrasts_with_one_memory() -> None:
    images, indices = smooth_images(8), torch.tensor([3, 1, 4, 10, 5, 9, 2, 6])
    signal = pirl(weight=0.3).eval()
    signal.memory.vectors.data = F.normalize(torch.randn(32, 128), dim=1)
    signal.view = lambda images: images.float() / 255  # type: ignore[method-assign]
    torch.manual_seed(1)
    loss, _ = signal(images, indices)
    torch.manual_seed(1)
    memory, same = signal.memory.vectors, indices.unsqueeze(1) == torch.arange(32)
    parts = [
        memory_nce(z, memory[indices], memory, same, 0.07)[0]
        for z in (signal.embed_jigsaw(images), signal.embed(images))
    ]
    assert loss.item() == pytest.approx((0.3 * parts[0] + 0.7 * parts[1]).item(), rel=1e-5)
    # What is remembered is the image, not the jigsaw.
    expected = F.normalize(signal.embed(images).detach(), dim=1)
    expected = F.normalize((expected + memory[indices]) / 2, dim=1)
    signal.after_step()
    assert torch.allclose(signal.memory.vectors[indices], expected, atol=1e-5)


def test_each_tile_is_encoded_on_its_own_by_one_encoder() -> None:
    """Changing one tile changes that tile's features alone; equal tiles have equal features in any place."""
    signal = pirl().eval()
    seen: list[Tensor] = []
    signal.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tiles = torch.rand(1, 4, 1, 6, 6)
    changed = tiles.clone()
    changed[0, 2] = tiles[0, 0]
    for value in (tiles, changed):
        signal.jigsaw = lambda images, value=value: value  # type: ignore[method-assign]
        signal.embed_jigsaw(smooth_images(1))
    first, second = seen
    assert torch.equal(first[[0, 1, 3]], second[[0, 1, 3]])
    assert torch.allclose(second[0], second[2], atol=1e-6) and not torch.allclose(
        first[2], second[2], atol=1e-3
    )
    names = [name for name, _ in signal.named_parameters() if name.startswith("encoder")]
    assert len(names) == len(list(signal.encoder.parameters()))


def test_both_branches_move_the_encoder() -> None:
    images, indices = smooth_images(8), torch.arange(8)
    gradients = []
    for weight in (0.001, 0.999):
        signal = pirl(weight=weight)
        torch.manual_seed(0)
        signal(images, indices)[0].backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in signal.encoder.parameters() if p.grad is not None])
        )
    assert all(gradient.norm() > 1e-3 for gradient in gradients)
    assert F.cosine_similarity(gradients[0], gradients[1], dim=0) < 0.9


def test_a_jigsaw_learns_its_image_and_none_where_the_numbers_are_wrong() -> None:
    images, indices = smooth_images(32), torch.arange(32)
    signal = pirl(crop=0.8, jitter=0.2)
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    losses = []
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        loss, values = signal(images, indices)
        loss.backward()
        optimizer.step()
        signal.after_step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[1] and values["jigsaw_accuracy"] > 0.3
    _, wrong = signal(images, indices.roll(5))
    assert wrong["jigsaw_accuracy"] < 0.15 and wrong["image_accuracy"] < 0.15
    # Jigsaws of other images find nothing: ablating the pairing leaves chance.
    jigsaw = signal.jigsaw
    signal.jigsaw = lambda images: jigsaw(images.roll(3, 0))  # type: ignore[method-assign]
    assert signal(images, indices)[1]["jigsaw_accuracy"] < 0.15


def test_the_loss_of_one_image_in_all_places_is_chance() -> None:
    """Where jigsaw and image cannot differ, every place is as good as the own one."""
    signal = pirl(count=8, temperature=1.0).eval()
    signal.memory.vectors.data = F.normalize(torch.ones(8, 128), dim=1)
    loss, _ = signal(smooth_images(1).expand(8, -1, -1, -1), torch.arange(8))
    assert loss.item() == pytest.approx(math.log(8), abs=1e-5)


def test_objective_stands_beside_chance() -> None:
    result = pirl().eval().objective(smooth_images(1).expand(200, -1, -1, -1))
    assert result["accuracy"] < 0.05 and result["chance"] == pytest.approx(1 / 200)


@pytest.mark.parametrize("side", [8, 33])
def test_picture_shows_the_tiles(side: int) -> None:
    images = torch.full((3, 1, side, side), 128, dtype=torch.uint8)
    picture = pirl(side=side, jitter=0.0).eval().picture(images)
    assert picture.shape == (6, 3, 1, side, side)
    assert torch.allclose(picture, torch.tensor(128 / 255), atol=1 / 255)
