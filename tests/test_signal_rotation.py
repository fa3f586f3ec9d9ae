"""Rotation: four turns without resampling, and nothing to learn where there is nothing to see."""

import math

import pytest
import torch
from signal_training import accuracy_after
from torch import Tensor

from unlabeled.nets.encoder import Encoder
from unlabeled.signals.transformation.rotation import Rotation, four_rotations


def rotation(size: int = 8, channels: int = 1, **settings: float) -> Rotation:
    torch.manual_seed(0)
    encoder = Encoder("small_resnet", 8, 2, (channels, size, size), 0.5, 0.29)
    return Rotation(encoder, hidden_dim=32, **settings)


def white_noise(count: int = 64, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 1, size, size)).byte()


def test_four_quarter_turns_are_none() -> None:
    images = torch.rand(2, 3, 5, 5)
    turned = images
    for _ in range(4):
        turned = four_rotations(turned)[0][2:4]
    assert torch.equal(turned, images)


def test_rotations_move_pixels_and_change_none() -> None:
    images = torch.arange(2 * 9).view(2, 1, 3, 3)
    rotated, turns = four_rotations(images)
    assert rotated.shape == (8, 1, 3, 3) and turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(torch.equal(rotated[i].flatten().sort()[0], images[i % 2].flatten()) for i in range(8))
    corners = [rotated[2 * k, 0, y, x].item() for k, (y, x) in enumerate([(0, 0), (2, 0), (2, 2), (0, 2)])]
    assert corners == [0, 0, 0, 0]  # the upper left one goes around counter-clockwise


@pytest.mark.parametrize("count", [2, 3, 64])
def test_every_rotation_is_a_quarter_of_the_batch(count: int) -> None:
    _, turns = four_rotations(torch.zeros(count, 1, 4, 4))
    assert torch.bincount(turns).tolist() == [count] * 4


def test_the_loss_starts_at_log_4() -> None:
    loss, values = rotation().loss(white_noise())
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6) and values["accuracy"] == 0.25


def test_mirroring_comes_before_turning() -> None:
    """An image and its mirror image, both turned by the same label, are each other's mirror images at 0."""
    seen: list[Tensor] = []
    signal = rotation(flip=1.0)
    signal.logits = lambda images: seen.append(images) or torch.zeros(len(images), 4)  # type: ignore[func-returns-value]
    images = white_noise(5)
    signal.loss(images)
    expected, _ = four_rotations(images.flip(3).float() / 255)
    assert torch.equal(seen[0], expected)


def test_white_noise_stays_at_chance() -> None:
    """Noise has no way up: whatever beats a quarter has read the pipeline."""
    assert accuracy_after(rotation(), white_noise, 80) == pytest.approx(0.25, abs=0.04)


def test_a_border_gives_the_rotation_away() -> None:
    """The ablation of the test above: the same noise, one row of padding, and the net reads it off."""

    def padded() -> Tensor:
        images = white_noise()
        images[:, :, -1] = 0
        return images

    assert accuracy_after(rotation(), padded, 40) > 0.9


def test_crops_leave_no_trace() -> None:
    assert accuracy_after(rotation(crop=0.5), white_noise, 80) == pytest.approx(0.25, abs=0.04)


def test_symmetric_images_give_no_signal() -> None:
    def discs() -> Tensor:
        axis = torch.arange(8) - 3.5
        radius = (axis.square() + axis.square().unsqueeze(1)).sqrt()
        return ((radius < 1 + 3 * torch.rand(64, 1, 1, 1)) * 255).byte()

    assert accuracy_after(rotation(), discs, 30) == pytest.approx(0.25, abs=1e-6)


def test_it_overfits_one_batch() -> None:
    torch.manual_seed(0)
    images = white_noise(16)
    signal = rotation(flip=0.0)
    assert accuracy_after(signal, lambda: images, 60) > 0.95


def test_the_picture_frames_what_is_told_wrong() -> None:
    images = white_noise(10)
    signal = rotation().eval()
    told = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    signal.logits = lambda rotated: torch.eye(4)[told.repeat(4)]  # type: ignore[method-assign]
    picture = signal.picture(images)
    rotated = four_rotations(images[:8].float() / 255)[0].view(4, 8, 1, 8, 8)
    for turn in range(4):
        for column in range(8):
            shown, plain = picture[turn, column, 0], rotated[turn, column, 0]
            assert torch.equal(shown[1:-1, 1:-1], plain[1:-1, 1:-1])
            edge = plain[0] if told[column] == turn else 1 - plain[0]
            assert torch.equal(shown[0], edge)
