import pytest
import torch
from torchvision.transforms.v2 import functional as oracle

from unlabeled import views

SHAPES = [(channels, size) for channels in (1, 3) for size in (8, 9, 28, 33, 96)]


def random_images(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def full_boxes(images: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[0.0, 0.0, *images.shape[-2:]]]).repeat(len(images), 1)


def every_view(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    images = views.random_crop(images, (0.4, 1.0), degrees=10, generator=generator)
    images = views.random_color(images, probability=0.8, generator=generator)
    images = views.random_grayscale(images, generator=generator)
    images = views.random_blur(images, (0.1, 1.2), generator=generator)
    return views.random_solarize(images, generator=generator)


@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_identity_parameters_keep_the_images(channels: int, size: int) -> None:
    images = random_images(5, channels, size)
    one, zero = torch.ones(5), torch.zeros(5)
    no = torch.zeros(5, dtype=torch.bool)
    assert torch.allclose(views.resample(images, full_boxes(images), no, zero), images, atol=1e-5)
    assert torch.allclose(views.random_crop(images, (1, 1), (1, 1), flip=0), images, atol=1e-5)
    for same in (
        views.brightness(images, one),
        views.contrast(images, one),
        views.saturation(images, one),
        views.hue(images, zero),
        views.hue(images, one),
        views.gaussian_blur(images, zero, 2),
        views.random_color(images, 0, 0, 0, 0),
        views.random_color(images, probability=0),
        views.random_grayscale(images, 0),
        views.random_blur(images, probability=0),
        views.random_solarize(images, 0),
    ):
        assert torch.allclose(same, images, atol=2e-6)


@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_every_view_stays_in_range_and_is_of_its_own(channels: int, size: int) -> None:
    image = random_images(1, channels, size)
    result = every_view(image.repeat(6, 1, 1, 1), torch.Generator().manual_seed(1))
    assert result.shape == (6, channels, size, size) and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1 and result.isfinite().all()
    assert all((result[i] - result[j]).abs().max() > 1e-3 for i in range(6) for j in range(i))


def test_a_generator_decides_alone() -> None:
    images = random_images(4, 3, 12)
    before = torch.get_rng_state()
    first = every_view(images, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(first, every_view(images, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, every_view(images, torch.Generator().manual_seed(4)))


def test_an_image_does_not_see_the_others_of_its_batch() -> None:
    images = random_images(4, 3, 16)
    other = images.clone()
    other[1:] = random_images(3, 3, 16, seed=9)
    first, second = (every_view(batch, torch.Generator().manual_seed(0)) for batch in (images, other))
    assert torch.allclose(first[0], second[0], atol=1e-6)
    assert not torch.allclose(first[1], second[1], atol=1e-2)


def test_uint8_becomes_unit_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(views.to_float(levels), levels.float() / 255)


@pytest.mark.parametrize("size", [8, 9, 28])
def test_flip_mirrors_left_and_right(size: int) -> None:
    images = random_images(3, 1, size)
    flips = torch.tensor([True, False, True])
    result = views.resample(images, full_boxes(images), flips)
    assert torch.allclose(result[flips], images[flips].flip(3), atol=1e-5)
    assert torch.allclose(result[~flips], images[~flips], atol=1e-5)


@pytest.mark.parametrize("size", [8, 9, 28])
def test_rotation_by_right_angles_is_exact(size: int) -> None:
    images = random_images(4, 3, size)
    angles = torch.tensor([0.0, 90.0, 180.0, -90.0])
    result = views.resample(images, full_boxes(images), angles=angles)
    for image, turned, quarters in zip(images, result, (0, 1, 2, -1), strict=True):
        assert torch.allclose(turned, image.rot90(quarters, (1, 2)), atol=1e-4)


def test_rotation_turns_as_torchvision_does() -> None:
    images = random_images(1, 1, 28)
    ours = views.resample(images, full_boxes(images), angles=torch.tensor([10.0]))
    theirs = oracle.rotate(images, 10.0, interpolation=oracle.InterpolationMode.BILINEAR)
    assert torch.allclose(ours[..., 6:-6, 6:-6], theirs[..., 6:-6, 6:-6], atol=1e-4)


def test_a_delta_lands_where_the_box_puts_it() -> None:
    images = torch.zeros(1, 1, 12, 12)
    images[0, 0, 5, 7] = 1
    shifted = views.resample(images, torch.tensor([[2.0, 3.0, 12.0, 12.0]]))
    assert shifted[0, 0, 3, 4] == pytest.approx(1, abs=1e-5)
    assert shifted.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("box", [(3, 5, 17, 20), (0, 0, 14, 28), (10, 2, 18, 9), (0, 0, 28, 28)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_torchvisions_resized_crop(box: tuple[int, int, int, int], channels: int) -> None:
    images = random_images(2, channels, 28)
    top, left, height, width = box
    ours = views.resample(images, torch.tensor([box, box]).float())
    theirs = oracle.resized_crop(images, top, left, height, width, [28, 28], antialias=False)
    # torchvision repeats the rim of the box, we see the image beyond it: positions between pixels of the
    # box agree.
    rows, columns = (
        ((torch.arange(28) + 0.5) * side / 28 - 0.5 >= 0)
        & ((torch.arange(28) + 0.5) * side / 28 - 0.5 <= side - 1)
        for side in (height, width)
    )
    assert torch.allclose(ours[:, :, rows][..., columns], theirs[:, :, rows][..., columns], atol=1e-5)
    assert rows.sum() >= 26 * height / 28 and columns.sum() >= 8
    if box == (0, 0, 28, 28):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_resizing_to_another_size_is_interpolation() -> None:
    images = random_images(2, 3, 20)
    ours = views.resample(images, full_boxes(images), size=(33, 41))
    theirs = torch.nn.functional.interpolate(images, (33, 41), mode="bilinear", align_corners=False)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_crops_have_the_wanted_areas_and_aspects() -> None:
    # In an image of its own coordinates a view shows which box it was cut from.
    size, count = 64, 2000
    ramp = (torch.arange(size) + 0.5) / size
    images = torch.stack(
        (ramp.view(-1, 1).expand(size, size), ramp.expand(size, size), torch.zeros(size, size))
    )
    result = views.random_crop(images.repeat(count, 1, 1, 1), (0.2, 0.5), (3 / 4, 4 / 3), flip=0.5)
    middle = result[:, :, size // 4 : -size // 4, size // 4 : -size // 4]
    height = 2 * (middle[:, 0, -1, 0] - middle[:, 0, 0, 0]) * (size / (size - 2))
    width = 2 * (middle[:, 1, 0, -1] - middle[:, 1, 0, 0]) * (size / (size - 2))
    flipped = width < 0
    area, aspect = height * width.abs(), width.abs() / height
    assert 0.45 < flipped.float().mean() < 0.55
    assert area.min() > 0.19 and area.max() < 0.51 and abs(area.mean() - 0.35) < 0.01
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert abs(aspect.log().mean()) < 0.02


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.5])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 17, 24)])
def test_blur_is_torchvisions_gaussian_blur(sigma: float, channels: int, height: int, width: int) -> None:
    images = torch.rand(2, channels, height, width)
    ours = views.gaussian_blur(images, torch.tensor([sigma, 0.0]), radius=2)
    theirs = oracle.gaussian_blur(images[:1], [5, 5], [sigma, sigma])
    assert torch.allclose(ours[:1], theirs, atol=1e-5)
    assert torch.allclose(ours[1], images[1], atol=1e-6)


def test_colour_functions_are_torchvisions() -> None:
    images, factors = random_images(3, 3, 12), torch.tensor([0.5, 1.0, 1.6])
    for ours, theirs in (
        (views.brightness, oracle.adjust_brightness),
        (views.contrast, oracle.adjust_contrast),
        (views.saturation, oracle.adjust_saturation),
    ):
        result = ours(images, factors)
        for image, factor, changed in zip(images, factors, result, strict=True):
            assert torch.allclose(changed, theirs(image, float(factor)), atol=1e-3)
    assert torch.allclose(views.grayscale(images), oracle.rgb_to_grayscale(images), atol=1e-3)
    assert torch.allclose(views.solarize(images, 0.6), oracle.solarize(images, 0.6))


def test_hue_by_a_third_is_hsvs_and_moves_the_channels_on() -> None:
    images = random_images(2, 3, 8)
    turned = views.hue(images, torch.tensor([1 / 3, -1 / 3]))
    assert torch.allclose(turned[0], images[0].roll(1, 0), atol=1e-5)
    assert torch.allclose(turned[1], images[1].roll(-1, 0), atol=1e-5)
    assert torch.allclose(turned[0], oracle.adjust_hue(images[0], 1 / 3), atol=1e-2)


def test_gray_images_have_no_hue_and_no_saturation() -> None:
    gray = random_images(2, 1, 8).expand(-1, 3, -1, -1)
    assert torch.allclose(views.hue(gray, torch.tensor([0.2, 0.4])), gray, atol=1e-5)
    assert torch.allclose(views.saturation(gray, torch.tensor([0.2, 1.8])), gray, atol=1e-3)


def test_probabilities_are_kept() -> None:
    images = random_images(1, 3, 8).repeat(1000, 1, 1, 1)
    for result in (
        views.random_blur(images, (1, 1), 0.3),
        views.random_grayscale(images, 0.3),
        views.random_solarize(images, 0.3),
        views.random_color(images, probability=0.3),
    ):
        changed = ((result - images).abs().amax((1, 2, 3)) > 1e-4).float().mean()
        assert 0.25 < changed < 0.35
