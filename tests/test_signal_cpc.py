import math
from pathlib import Path
from typing import Any

import pytest
import torch
from signal_training import torchrun
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.pixel_cnn import RowContext
from unlabeled.signals.contrast.cpc import CPC, info_nce_logits


def signal_of(shape: tuple[int, int, int] = (1, 16, 16), **settings: Any) -> CPC:
    torch.manual_seed(0)
    return CPC(Encoder("small_resnet", 16, 1, shape, 0.5, 0.3), context_dim=16, **settings)


def plain_signal(shape: tuple[int, int, int] = (1, 16, 16), **settings: Any) -> CPC:
    """A signal that takes the patches as they are."""
    plain = {"crop": 1.0, "patch_crop": 1.0, "flip": 0.0, "rotation": 0.0, "brightness": 0.0, "contrast": 0.0}
    signal = signal_of(shape, **plain | settings)
    signal.crop["aspect"] = signal.patch_crop["aspect"] = (1.0, 1.0)
    return signal


def images_of(shape: tuple[int, int, int], count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)).byte()


def striped_images(count: int, seed: int = 0) -> Tensor:
    """Images of stripes: direction, spacing and gray levels are the same all over an image."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    a, b, phase, level = torch.rand(4, count, 1, 1, generator=generator)
    waves = ((a * 1.5 - 0.75) * y + (b * 1.5 - 0.75) * x + phase * 6).sin()
    return ((0.3 + 0.4 * level + 0.25 * waves) * 255).byte().unsqueeze(1)


def info_nce(predictions: Tensor, targets: Tensor, patches: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(*info_nce_logits(predictions, targets, patches, temperature))


# InfoNCE


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_info_nce_hand_values(temperature: float) -> None:
    """Orthonormal targets, each predicted exactly: ln(1 + (N - 1) exp(-1/τ)); all equal: ln N."""
    targets = torch.eye(6).view(2, 3, 6)
    every = torch.arange(3)
    loss = info_nce(targets * 5, targets, every, temperature)
    assert loss.item() == pytest.approx(math.log1p(5 * math.exp(-1 / temperature)), abs=1e-5)
    same = torch.ones(2, 3, 6)
    assert info_nce(same, same, every, temperature).item() == pytest.approx(math.log(6), abs=1e-5)
    # The patch to the left taken for the one predicted: the similarity 1 is the wrong one.
    wrong = info_nce(targets, targets, every.roll(1), temperature)
    assert wrong.item() == pytest.approx(loss.item() + 1 / temperature, rel=1e-5)


def test_info_nce_is_the_classification_of_every_patch_of_the_batch() -> None:
    torch.manual_seed(0)
    predictions, targets, patches = torch.randn(3, 5, 4), torch.randn(3, 6, 4), torch.tensor([4, 0, 5, 4, 2])
    total = 0.0
    for image in range(3):
        for number, patch in enumerate(patches.tolist()):
            scores = {
                (other, place): F.cosine_similarity(
                    predictions[image, number], targets[other, place], dim=0
                ).item()
                / 0.3
                for other in range(3)
                for place in range(6)
            }
            total -= scores[image, patch] - math.log(sum(math.exp(score) for score in scores.values()))
    assert info_nce(predictions, targets, patches, 0.3).item() == pytest.approx(total / 15, rel=1e-5)


# The context sees one side


def test_a_row_of_the_context_depends_on_the_rows_up_to_it() -> None:
    torch.manual_seed(0)
    context = RowContext(2, 8, 3).double()
    maps = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: context(x).square().sum((0, 1)))(maps)
    moved = (jacobian.abs().sum((2, 3)) > 0).permute(0, 2, 1, 3)
    rows = torch.arange(4)
    assert torch.equal(moved, (rows[:, None] >= rows).view(4, 4, 1, 1).expand(4, 4, 4, 4))
    # Without its mask it sees all: the check can fail.
    for block in context.blocks:
        block[3], block[4] = nn.Identity(), nn.Conv2d(8, 8, (3, 1), padding=(1, 0)).double()
    jacobian = torch.func.jacrev(lambda x: context(x).square().sum((0, 1)))(maps)
    assert (jacobian.abs().sum((2, 3)) > 0).all()


def seen_by_predictions(signal: CPC) -> tuple[Tensor, Tensor]:
    """Return bool (P, G), which patches each prediction depends on, and int64 (P,), which it predicts."""
    signal.encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, signal.encoder.feature_dim))  # type: ignore[assignment]
    signal = signal.double()
    patches = torch.randn(1, signal.grid**2, 1, 2, 2, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: signal.predict(x)[0].square().sum((0, 2)))(patches)
    return jacobian.abs().sum((1, 3, 4, 5)) > 0, signal.predict(patches)[2]


@pytest.mark.parametrize(("grid", "first", "blocks"), [(3, 2, 1), (3, 1, 2), (5, 2, 2)])
def test_every_direction_predicts_from_its_own_side(grid: int, first: int, blocks: int) -> None:
    signal = signal_of(grid=grid, first_distance=first, context_blocks=blocks)
    moved, predicted = seen_by_predictions(signal)
    moved, predicted = moved.view(4, -1, grid, grid), predicted.view(4, -1)
    lines = torch.arange(grid)
    distances = [d for d in range(first, grid) for _ in range(grid * (grid - d))]
    for turn in range(4):
        for number, distance in enumerate(distances):
            row, column = divmod(int(predicted[turn, number]), grid)
            # Down, left, up, right: what was seen lies so many rows or columns back, each block one more.
            back = ((row, column), (column, row))[turn % 2]
            gap = (back[0] - lines) if turn in (0, 3) else (lines - back[0])
            behind, across = (gap >= distance) & (gap <= distance + blocks), (lines - back[1]).abs() <= blocks
            expected = behind[:, None] & across if turn % 2 == 0 else across[:, None] & behind
            assert torch.equal(moved[turn, number], expected), (turn, number)


@pytest.mark.parametrize(("first", "shares"), [(2, False), (1, True)])
@pytest.mark.parametrize("side", [8, 28, 33, 96])
def test_no_pixel_of_a_patch_is_seen_before_it_is_predicted(first: int, shares: bool, side: int) -> None:
    """The neighbour's overlap would give the answer away: with it the check fails."""
    signal = signal_of((1, side, side), first_distance=first)
    pixels = signal.cut(torch.arange(side * side).view(1, 1, side, side)).flatten(2)[0]
    moved, predicted = seen_by_predictions(signal)
    shared = [
        bool(torch.isin(pixels[seen], pixels[patch]).any())
        for seen, patch in zip(moved, predicted, strict=True)
    ]
    assert any(shared) == shares


@pytest.mark.parametrize(("side", "grid"), [(8, 3), (28, 3), (33, 3), (28, 4), (96, 7)])
def test_the_patches_reach_from_edge_to_edge(side: int, grid: int) -> None:
    signal = signal_of((1, side, side), grid=grid)
    image = torch.arange(side * side).view(1, 1, side, side)
    patches = signal.cut(image)
    size = side // 2
    assert patches.shape == (1, grid**2, 1, size, size)
    assert torch.equal(patches[0, 0, 0], image[0, 0, :size, :size])
    assert torch.equal(patches[0, grid - 1, 0], image[0, 0, :size, -size:])
    assert torch.equal(patches[0, -1, 0], image[0, 0, -size:, -size:])


def test_a_grid_too_small_for_the_distance_is_refused() -> None:
    with pytest.raises(InputError, match="first_distance"):
        signal_of(grid=2)


# Learning


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16)])
def test_it_starts_at_chance(shape: tuple[int, int, int]) -> None:
    signal = signal_of(shape, temperature=1.0)
    loss, values = signal.loss(images_of(shape, 32))
    assert loss.item() == pytest.approx(math.log(32 * 9), abs=0.2)
    assert values["contrastive_accuracy"] < 0.03


def test_of_equal_images_none_can_be_told() -> None:
    signal = signal_of()
    images = images_of((1, 16, 16), 1).repeat(16, 1, 1, 1)
    loss, _ = signal.contrast(signal.cut(images.float() / 255))
    assert loss >= math.log(16)


def test_each_patch_is_changed_on_its_own() -> None:
    signal = plain_signal((3, 16, 16), drop_colors=1.0)
    images = images_of((3, 16, 16))
    views, plain = signal.view(images), signal.cut(images.float() / 255)
    kept = ((views - plain).abs() < 1e-5).flatten(3).all(3)
    assert (kept.sum(2) == 1).all() and kept.float().mean((0, 1)).min() > 0.2
    patches = plain_signal(brightness=0.5).view(images_of((1, 16, 16), 1).fill_(100))
    assert len(patches[..., 4, 4].unique()) == 9


def test_it_learns_and_the_batch_statistics_are_no_help() -> None:
    """Batch norm lets the patches of an image see each other while training; the aim is measured without.

    Patches mixed over the images bring it back to chance.
    """
    signal = plain_signal(temperature=0.2)
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    for step in range(60):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss, _ = signal.loss(striped_images(32, step))
        loss.backward()
        optimizer.step()
    signal.eval()
    images = striped_images(64, 1000)
    objective = signal.objective(images)
    assert objective["chance"].item() == pytest.approx(1 / (64 * 9))
    assert objective["accuracy"] > 15 * objective["chance"]
    patches = signal.cut(images.float() / 255)
    mixed = torch.stack([patches[torch.randperm(64), place] for place in range(9)], 1)
    assert signal.contrast(mixed)[1]["contrastive_accuracy"] < 5 * objective["chance"]
    # Nor does the objective read other images' statistics: half of the images, the same predictions.
    some, all_ = (signal.predict(part)[0] for part in (patches[:8], patches))
    assert torch.allclose(some, all_[:8], atol=1e-5)


def test_it_overfits_one_batch() -> None:
    signal = plain_signal()
    optimizer = torch.optim.AdamW(signal.parameters(), 5e-3)
    images, losses = images_of((1, 16, 16), 8), []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = signal.loss(images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_picture_shows_what_is_found_in_other_images() -> None:
    """Of a black and a white image, an image's own patches look like it, another's do not."""
    signal = signal_of().eval()
    images = torch.tensor([0, 255]).byte().view(2, 1, 1, 1).expand(2, 1, 16, 16)
    image, seen, found, elsewhere = signal.picture(images)
    assert torch.equal(image, images.float() / 255)
    assert (seen[:, :, 8:] == 0.5).all() and torch.equal(seen[:, :, :8], image[:, :, :8])
    assert torch.equal(found[:, :, :8], seen[:, :, :8]) and (found[:, :, 8:] != 0.5).all()
    assert torch.equal(elsewhere[:, :, 8:], image.flip(0)[:, :, 8:])


# Two processes

WORKER = """
import sys, torch
from torch.nn import functional as F
from unlabeled.signals.contrast.cpc import info_nce_logits
from unlabeled.distributed import process_group, rank

with process_group():
    data = torch.load(sys.argv[1])
    mine = slice(rank() * 3, rank() * 3 + 3)
    weight = data["weight"].requires_grad_()
    predictions, targets = data["predictions"][mine] @ weight, data["targets"][mine] @ weight
    loss = F.cross_entropy(*info_nce_logits(predictions, targets, data["patches"], 0.3))
    loss.backward()
    torch.save({"loss": loss.detach(), "weight": weight.grad}, f"{sys.argv[2]}/{rank()}.pt")
"""


@pytest.mark.slow
def test_the_loss_of_two_ranks_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {"predictions": torch.randn(6, 4, 5), "targets": torch.randn(6, 9, 5), "weight": torch.randn(5, 4)}
    data["patches"] = torch.tensor([0, 8, 3, 3])
    torch.save(data, tmp_path / "data.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(str(tmp_path / "worker.py"), str(tmp_path / "data.pt"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    weight = data["weight"].requires_grad_()
    predictions, targets = data["predictions"] @ weight, data["targets"] @ weight
    loss = info_nce(predictions, targets, data["patches"], 0.3)
    loss.backward()
    assert abs(sum(r["loss"] for r in ranks) / 2 - loss) < 1e-5
    assert torch.allclose(sum(r["weight"] for r in ranks) / 2, weight.grad, atol=1e-5)
    # Without the other rank's patches it would be another loss.
    assert abs(info_nce(predictions[:3], targets[:3], data["patches"], 0.3) - loss) > 0.1
