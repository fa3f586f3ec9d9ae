import copy
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve
from signal_training import train
from torch import Tensor, nn

from unlabeled.errors import InputError
from unlabeled.nets.discriminator import Discriminator
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.recovery.inpainting import HOLES, Inpainting, adversarial_losses, hole_error, hole_psnr
from unlabeled.views.holes import central_square, diffusion_fill, random_blocks, random_regions

SIZES = [8, 28, 33, 96]


def small_signal(size: int = 16, channels: int = 1, **settings: object) -> Inpainting:
    torch.manual_seed(0)
    return Inpainting(Encoder("small_resnet", 16, 2, (channels, size, size), 0.5, 0.3), **settings)


def images_of(size: int = 16, channels: int = 1, count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size)).byte()


# Holes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hole", HOLES)
def test_holes_take_their_share(hole: str, size: int) -> None:
    holes = HOLES[hole](torch.rand(20, 3, size, size), 0.25)
    assert holes.shape == (20, 1, size, size) and holes.dtype == torch.bool
    shares = holes.float().mean((1, 2, 3))
    assert (shares > 0).all() and (shares <= 0.26 + 1 / size).all()
    if hole != "blocks":  # they may overlap
        assert (shares > 0.22).all()


def test_the_central_hole_has_half_the_side() -> None:
    expected = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    expected[:, :, 8:24, 8:24] = True
    assert torch.equal(central_square(torch.rand(2, 3, 32, 32), 0.25), expected)


@pytest.mark.parametrize("make", [random_blocks, random_regions])
def test_random_holes_are_each_images_own_and_reach_everywhere(make) -> None:
    holes = make(torch.rand(400, 1, 16, 16), 0.25)
    assert not torch.equal(holes[0], holes[1])
    assert (holes.float().mean(0) > 0.005).all()


def test_a_block_is_a_square() -> None:
    holes = random_blocks(torch.rand(50, 1, 32, 32), 0.25, count=1)
    rows, columns = holes.any(3).sum(2), holes.any(2).sum(2)
    assert (rows == 16).all() and (columns == 16).all() and (holes.sum((1, 2, 3)) == 256).all()


def test_regions_are_connected_shapes_not_noise() -> None:
    """Upsampled noise: a pixel and its neighbour mostly agree, which at random they would 62 times of 100."""
    holes = random_regions(torch.rand(50, 1, 64, 64), 0.25)
    assert (holes[..., 1:] == holes[..., :-1]).float().mean() > 0.9


# The trivial fill


def laplace(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Solve Laplace's equation in a hole of one image (H, W), exactly: an equation for each pixel."""
    height, width = image.shape
    matrix, right = sparse.lil_matrix((image.size, image.size)), np.zeros(image.size)
    for row, column in np.ndindex(height, width):
        here = row * width + column
        if not hole[row, column]:
            matrix[here, here], right[here] = 1, image[row, column]
            continue
        for other_row, other_column in [
            (row - 1, column),
            (row + 1, column),
            (row, column - 1),
            (row, column + 1),
        ]:
            if 0 <= other_row < height and 0 <= other_column < width:
                matrix[here, here] += 1
                matrix[here, other_row * width + other_column] -= 1
    return spsolve(matrix.tocsr(), right).reshape(height, width)


@pytest.mark.parametrize("hole", HOLES)
def test_the_diffusion_fill_solves_laplaces_equation(hole: str) -> None:
    images = torch.rand(3, 2, 17, 17)
    holes = HOLES[hole](images, 0.25)
    filled = diffusion_fill(images, holes)
    for image, mask, result in zip(images, holes, filled):
        for channel in range(2):
            expected = laplace(image[channel].numpy(), mask[0].numpy())
            assert np.allclose(result[channel].numpy(), expected, atol=0.01)


def test_the_diffusion_fill_does_not_look_into_the_hole() -> None:
    images, others = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    holes = random_regions(images, 0.25)
    edited = torch.where(holes, others, images)
    assert torch.equal(diffusion_fill(images, holes), diffusion_fill(edited, holes))
    assert torch.equal(
        diffusion_fill(images, holes)[~holes.expand_as(images)], images[~holes.expand_as(images)]
    )


def test_a_plane_is_continued_without_error() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 0.5, 24), torch.linspace(0, 0.5, 24), indexing="ij")
    images = (x + y).expand(2, 1, 24, 24)
    holes = central_square(images, 0.25)
    assert torch.allclose(diffusion_fill(images, holes), images, atol=1e-3)


# What the net sees, and what the loss does


@pytest.mark.parametrize("hole", HOLES)
def test_pixels_in_the_hole_never_reach_the_net(hole: str) -> None:
    signal = small_signal(16, 3, hole=hole)
    nn.init.normal_(signal.decoder.out.weight)
    signal.eval()
    originals, others = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    holes = HOLES[hole](originals, 0.25)
    before = signal.predict(originals, holes)
    assert torch.equal(signal.predict(torch.where(holes, others, originals), holes), before)
    assert not torch.equal(signal.predict(torch.where(holes, originals, others), holes), before)


def test_the_hole_is_filled_with_the_mean_colour_of_the_train_images() -> None:
    signal, seen = small_signal(16, 3, hole="central"), []
    sample = torch.cat([torch.full((10, 1, 16, 16), value) for value in (104, 117, 123)], 1).byte()
    signal.prepare(sample, 10)
    signal.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    originals = torch.rand(2, 3, 16, 16)
    holes = central_square(originals, 0.25)
    signal.predict(originals, holes)
    assert torch.allclose(seen[0][:, :, 8, 8] * 255, torch.tensor([104.0, 117.0, 123.0]))
    assert torch.equal(seen[0][~holes.expand_as(originals)], originals[~holes.expand_as(originals)])
    assert "mean_colour" in signal.state_dict()


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("hole", HOLES)
def test_outside_hole_and_band_there_is_no_gradient(hole: str, overlap: int) -> None:
    originals = torch.rand(3, 2, 24, 24)
    holes = HOLES[hole](originals, 0.2)
    near = torch.zeros(3, 1, 24, 24, dtype=torch.bool)
    for image, row, column in (holes[:, 0]).nonzero():  # the band by its definition
        near[
            image,
            0,
            max(0, row - overlap) : row + overlap + 1,
            max(0, column - overlap) : column + overlap + 1,
        ] = True
    predicted = torch.rand(3, 2, 24, 24, requires_grad=True)
    hole_error(predicted, originals, holes, overlap, 10.0).backward()
    assert predicted.grad is not None
    assert ((predicted.grad != 0) == near.expand_as(originals)).all() and not near.all()


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_neither_does_the_whole_loss_move_the_outside(adversarial: float) -> None:
    """The adversarial term too: the discriminator sees the hole alone."""
    signal, kept = small_signal(16, hole="central", overlap=1, adversarial=adversarial), []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    signal.decoder.register_forward_hook(keep)
    signal.loss(images_of())[0].backward()
    moved = (kept[0].grad != 0).all(0)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[3:13, 3:13] = True
    assert torch.equal(moved, expected)


def test_the_band_weighs_ten_times_the_hole() -> None:
    originals = torch.zeros(1, 1, 16, 16)
    holes = central_square(originals, 0.25)
    inside, band = torch.zeros_like(originals), torch.zeros_like(originals)
    inside[0, 0, 8, 8] = 1
    band[0, 0, 3, 8] = 1
    assert hole_error(inside, originals, holes, 2, 10.0).item() == pytest.approx(1 / 144)
    assert hole_error(band, originals, holes, 2, 10.0).item() == pytest.approx(10 / 144)


def test_the_error_is_a_mean_over_the_hole_whatever_its_size() -> None:
    originals = torch.zeros(2, 3, 16, 16)
    holes = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    holes[0, :, :2, :2] = True
    holes[1, :, 4:, 4:] = True
    assert hole_error(originals + 0.5, originals, holes, 0, 10.0).item() == pytest.approx(0.25)


def test_the_composite_is_the_image_outside() -> None:
    signal = small_signal(16, 3)
    nn.init.normal_(signal.decoder.out.weight)
    signal.eval()
    originals = torch.rand(4, 3, 16, 16)
    holes = random_blocks(originals, 0.25)
    filled = signal.fill(originals, holes)
    outside = ~holes.expand_as(originals)
    assert torch.equal(filled[outside], originals[outside])
    assert not torch.isclose(filled[~outside], originals[~outside]).all()
    assert filled.min() >= 0 and filled.max() <= 1


def test_the_hole_psnr_counts_the_hole_alone() -> None:
    originals = torch.rand(3, 2, 16, 16)
    holes = random_regions(originals, 0.1)
    wrong = originals + 0.1
    assert hole_psnr(wrong, originals, holes).item() == pytest.approx(20, abs=1e-3)
    assert hole_psnr(torch.where(holes, originals, wrong), originals, holes).item() == pytest.approx(100)


def test_the_losses_at_init() -> None:
    """The decoder gives the mean, the discriminator knows nothing."""
    images = images_of(16, 1, 64)
    originals = images.float() / 255
    signal = small_signal(16, hole="central", overlap=0, adversarial=0.001)
    nn.init.zeros_(signal.discriminator.net[-1].weight)
    nn.init.zeros_(signal.discriminator.net[-1].bias)
    total, values = signal.loss(images)
    reconstruction = (originals - 0.5)[:, :, 4:12, 4:12].square().mean().item()
    assert values["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert values["discriminator"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert values["generator"].item() == pytest.approx(math.log(2), rel=1e-5)
    expected = 0.999 * reconstruction + 0.001 * math.log(2) + 2 * math.log(2)
    assert total.item() == pytest.approx(expected, rel=1e-4)


# The adversary


@pytest.mark.parametrize("size", SIZES)
def test_the_discriminator_starts_undecided(size: int) -> None:
    torch.manual_seed(0)
    judge, fooling = adversarial_losses(
        Discriminator((3, size, size)), torch.randn(16, 3, size, size), torch.randn(16, 3, size, size)
    )
    assert judge.item() == pytest.approx(2 * math.log(2), rel=0.2)
    assert fooling.item() == pytest.approx(math.log(2), rel=0.2)


def test_each_side_moves_only_its_own_net() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator((1, 16, 16))
    real, fake = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16, requires_grad=True)
    judge, fooling = adversarial_losses(discriminator, real, fake)
    fooling.backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    fake.grad = None
    judge.backward()
    assert fake.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_the_discriminator_sees_the_hole_alone() -> None:
    """Other surroundings, the same hole: real and fake are the same to it, bit for bit."""
    signal, seen = small_signal(16, hole="central"), []
    assert signal.discriminator is not None
    signal.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    images = images_of()
    signal.loss(images)
    real = seen[0]
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:12, 4:12] = True
    assert len(seen) == 3 and all((pictures[..., ~hole] == 0).all() for pictures in seen)
    seen.clear()
    signal.loss(torch.where(hole, images, images_of()))
    assert torch.equal(seen[0], real)


def test_the_discriminator_learns_to_tell_real_from_fake() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator((1, 16, 16), 8)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        real, fake = torch.randn(32, 1, 16, 16), torch.randn(32, 1, 1, 1).expand(-1, -1, 16, 16)
        judge, _ = adversarial_losses(discriminator, real, fake)
        judge.backward()
        optimizer.step()
    assert judge.item() < 0.3


def test_the_filling_learns_to_fool_a_discriminator_that_stands_still() -> None:
    torch.manual_seed(0)
    discriminator, fake = Discriminator((1, 16, 16)), nn.Parameter(torch.zeros(8, 1, 16, 16))
    optimizer, before = torch.optim.AdamW([fake], 0.05), copy.deepcopy(discriminator.state_dict())
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        _, fooling = adversarial_losses(discriminator, torch.randn(8, 1, 16, 16), fake)
        fooling.backward()
        optimizer.step()
        losses.append(fooling.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(weight, before[name]) for name, weight in discriminator.named_parameters())


def test_without_the_adversarial_term_there_is_no_discriminator() -> None:
    signal = small_signal(adversarial=0.0)
    total, values = signal.loss(images_of())
    assert not any(name.startswith("discriminator") for name in signal.state_dict())
    assert total == values["reconstruction"] and len(values) == 1


# Learning


def test_a_batch_is_overfitted() -> None:
    losses = train(small_signal(8, hole="central"), images_of(8, 1, 8), 60, 1e-2, batch=8)
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("hole", HOLES)
def test_held_out_digits_are_filled_better_than_by_the_mean_and_by_diffusion(
    digits: tuple[np.ndarray, np.ndarray], hole: str
) -> None:
    images = torch.from_numpy(digits[0])
    signal = small_signal(8, hole=hole, overlap=1)
    signal.prepare(images[:1500], 1500)
    train(signal, images[:1500], 120, 5e-3)
    signal.eval()
    with torch.inference_mode():
        values = signal.objective(images[1500:])
    assert values["psnr"] > values["psnr_mean_fill"] + 1, values
    assert values["psnr"] > values["psnr_diffusion_fill"] + 1, values


def test_the_picture_shows_the_hole_and_its_filling() -> None:
    signal, images = small_signal(16, 3, hole="central").eval(), images_of(16, 3, 10)
    image, hole, filled, smooth = signal.picture(images)
    inside = central_square(image, 0.25).expand_as(image)
    assert torch.equal(image, images[:8].float() / 255)
    assert (hole[inside] == 0.5).all() and torch.allclose(filled[inside], torch.tensor(0.5))
    for row in (hole, filled, smooth):
        assert torch.equal(row[~inside], image[~inside])


@pytest.mark.parametrize("adversarial", [0.0, 0.001])
def test_losses_are_float32_under_autocast(adversarial: float) -> None:
    signal = small_signal(16, 3, adversarial=adversarial)
    with torch.autocast("cpu", torch.bfloat16):
        loss, values = signal.loss(images_of(16, 3))
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in values.values())
    loss.backward()


def test_images_too_small_for_the_discriminator_are_refused_in_words() -> None:
    encoder = Encoder("small_resnet", 16, 1, (1, 4, 4), 0.3, 0.2)
    with pytest.raises(InputError, match=r"adversarial: 0"):
        Inpainting(encoder)
    loss, _ = Inpainting(encoder, adversarial=0)(torch.randint(0, 256, (8, 1, 4, 4)).byte(), torch.arange(8))
    assert loss.isfinite()
