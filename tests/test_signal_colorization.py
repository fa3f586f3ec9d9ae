"""Colorization against METHODS section 3; scikit-image is the oracle for Lab."""

import math

import numpy as np
import pytest
import torch
from skimage import color
from torch import Tensor
from torch.nn import functional as F

from unlabeled import views
from unlabeled.errors import InputError
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.recovery.colorization import (
    Colorization,
    annealed_mean,
    colorful,
    occupied_bins,
    rebalanced,
    sampled,
    soft_code,
    soft_cross_entropy,
    spread,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def encoder(size: int = 16, channels: int = 3) -> Encoder:
    return Encoder("small_resnet", 16, 2, (channels, size, size), 0.5, 0.25)


def rgb(lightness: float | Tensor, ab: Tensor) -> Tensor:
    """Return uint8 images (B, 3, H, W) of a lightness and of colours (B, H, W, 2)."""
    light = torch.as_tensor(lightness).expand(ab.shape[:3])
    lab = torch.cat((light.unsqueeze(1), ab.movedim(3, 1)), 1)
    return (views.lab_to_rgb(lab) * 255).round().byte()


def tinted(count: int = 48, size: int = 16, share: float = 0.75, seed: int = 0) -> Tensor:
    """Images of noisy lightness: `share` of them reddish, the others bluish, which nothing in them tells."""
    generator = torch.Generator().manual_seed(seed)
    lightness = 55 + 8 * torch.rand(count, size, size, generator=generator)
    red = torch.rand(count, generator=generator).argsort() < share * count
    colors = torch.where(red.view(-1, 1), torch.tensor([30.0, 10.0]), torch.tensor([-20.0, -20.0]))
    return rgb(lightness, colors.view(-1, 1, 1, 2).expand(-1, size, size, -1))


def prepared(images: Tensor, **settings: float) -> Colorization:
    torch.manual_seed(0)
    signal = Colorization(encoder(images.shape[2]), **settings)
    signal.prepare(images, len(images))
    return signal


def train(signal: Colorization, images: Tensor, steps: int, rate: float = 3e-3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(signal.parameters(), rate), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = signal.loss(images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Lab


def test_lab_is_scikit_images() -> None:
    images = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    images[0, :, :2] /= 50  # the linear part of both curves
    expected = color.rgb2lab(images.movedim(1, 3).double().numpy())
    # It rounds the white point to four digits: that is what it may be apart.
    assert np.abs(views.rgb_to_lab(images).movedim(1, 3).numpy() - expected).max() < 0.02
    lab = torch.stack((torch.linspace(5, 95, 50), *torch.linspace(-25, 25, 50).expand(2, -1))).view(
        1, 3, 5, 10
    )
    expected = color.lab2rgb(lab.movedim(1, 3).double().numpy())
    assert np.abs(views.lab_to_rgb(lab).movedim(1, 3).numpy() - expected).max() < 1e-3


def test_lab_round_trip() -> None:
    every = torch.cartesian_prod(*[torch.arange(0, 256, 15.0)] * 3).T.reshape(1, 3, -1, 1) / 255
    assert (views.lab_to_rgb(views.rgb_to_lab(every)) - every).abs().max() < 1e-4
    lab = views.rgb_to_lab(every)
    assert (views.rgb_to_lab(views.lab_to_rgb(lab)) - lab).abs().max() < 1e-3 * 100


def test_lab_of_grays() -> None:
    lab = views.rgb_to_lab(torch.tensor([0.0, 0.02, 0.5, 1.0]).view(-1, 1, 1, 1).expand(-1, 3, 1, 1))
    assert torch.allclose(lab[3].flatten(), torch.tensor([100.0, 0, 0]), atol=1e-3)
    assert lab[0].abs().max() < 1e-4 and lab[:, 1:].abs().max() < 1e-3
    # CIE: Y of 18.42 % is L = 50.
    assert torch.allclose(
        views.rgb_to_lab(torch.full((1, 3, 1, 1), 0.46633))[0, 0], torch.tensor(50.0), atol=0.01
    )


def test_lab_keeps_its_precision_under_autocast() -> None:
    images = torch.rand(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under = views.lab_to_rgb(views.rgb_to_lab(images))
    assert (under - images).abs().max() < 1e-4


# Bins, code, weights, decoding


def test_bins_are_the_cells_that_colours_fall_into() -> None:
    ab = torch.tensor([[0.0, 0.0], [4.9, -4.9], [5.1, 0.0], [-14.0, 36.0], [-107.0, 98.0]])
    bins, counts = occupied_bins(ab)
    assert bins.tolist() == [[-110, 100], [-10, 40], [0, 0], [10, 0]]
    assert counts.tolist() == [1, 1, 2, 1]


def test_all_of_srgb_falls_into_261_bins() -> None:
    """The stored 313 of the paper's code do not follow from sRGB; every eighth value finds nearly all."""
    every = torch.cartesian_prod(*[torch.arange(0, 256, 5.0)] * 3).T.reshape(1, 3, -1, 1) / 255
    bins, counts = occupied_bins(views.rgb_to_lab(every)[0, 1:].flatten(1).T)
    assert 250 < len(bins) <= 261 and counts.sum() == 52**3


def test_the_code_is_that_of_the_nearest_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    bins, _ = occupied_bins(60 * torch.randn(500, 2, generator=generator).clamp(-1.5, 1.5))
    ab = 40 * torch.randn(50, 2, generator=generator)
    nearest, shares = soft_code(ab, bins, 5)
    assert nearest.shape == shares.shape == (50, 5)
    assert torch.allclose(shares.sum(1), torch.ones(50)) and (shares >= 0).all()
    for color_, row, share in zip(ab, nearest, shares, strict=True):
        distances = ((bins - color_) ** 2).sum(1)
        expected = distances.argsort()[:5]
        weights = torch.exp(-distances[expected] / 50)
        assert distances[row].tolist() == pytest.approx(distances[expected].tolist(), abs=1e-2)
        assert share.tolist() == pytest.approx((weights / weights.sum()).tolist(), abs=1e-4)
    # On a bin: it and its four neighbours, exp(-100 / 50) each.
    grid = torch.cartesian_prod(*[torch.arange(-30.0, 31, 10)] * 2)
    nearest, shares = soft_code(torch.tensor([[10.0, -20.0]]), grid)
    assert grid[nearest[0, 0]].tolist() == [10, -20]
    assert shares[0].tolist() == pytest.approx(torch.tensor([0, -2, -2, -2, -2.0]).softmax(0).tolist())
    assert soft_code(ab, bins[:2])[1].shape == (50, 2)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rebalancing(share: float) -> None:
    bins = torch.tensor([[0.0, 0.0], [10.0, 0.0], [90.0, 90.0]])
    prior, weights = rebalanced(bins, torch.tensor([90.0, 9.0, 1.0]), share)
    assert prior.sum().item() == pytest.approx(1) and (prior * weights).sum().item() == pytest.approx(1)
    # The Gaussian moves mass between neighbours, exp(-2) to 1, and none to the far bin.
    beside = math.exp(-2) / (1 + math.exp(-2))
    assert prior.tolist() == pytest.approx([0.9 - 0.81 * beside, 0.09 + 0.81 * beside, 0.01], abs=1e-6)
    unnormalised = 1 / ((1 - share) * prior + share / 3)
    assert torch.allclose(weights / weights[0], unnormalised / unnormalised[0])
    if share == 1:
        assert torch.allclose(weights, torch.ones(3))
    if share == 0:
        assert torch.allclose(weights * prior, torch.full((3,), 1 / 3))


def test_annealed_mean_goes_from_the_mean_to_the_mode() -> None:
    bins = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 80.0]])
    logits = torch.tensor([0.5, 0.3, 0.2]).log().view(1, 1, 1, 3)
    mean, mode = (annealed_mean(logits, bins, t).flatten() for t in (1.0, 1e-3))
    assert mean.tolist() == pytest.approx([12, 16], abs=1e-4) and mode.abs().max() < 1e-4
    sharpened = torch.tensor([0.5, 0.3, 0.2]) ** (1 / 0.38)
    expected = (sharpened / sharpened.sum()) @ bins
    assert torch.allclose(annealed_mean(logits, bins).flatten(), expected, atol=1e-4)


def test_samples_follow_the_distribution_and_neighbours_agree() -> None:
    torch.manual_seed(0)
    bins = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 80.0]])
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    colors = sampled(probabilities.log().expand(4000, 2, 2, 3), bins)
    assert (colors == colors[:, :1, :1]).all()
    shares = torch.stack([(colors[:, 0, 0] == one).all(1).float().mean() for one in bins])
    assert torch.allclose(shares, probabilities, atol=0.03)


def test_soft_cross_entropy_is_pytorchs() -> None:
    logits, ab = torch.randn(2, 3, 4, 30), 30 * torch.randn(24, 2)
    bins, _ = occupied_bins(60 * torch.randn(200, 2).clamp(-1.5, 1.5))
    bins = bins[:30]
    nearest, shares = (code.view(2, 3, 4, 5) for code in soft_code(ab, bins))
    dense = torch.zeros_like(logits).scatter(3, nearest, shares)
    expected = F.cross_entropy(logits.movedim(3, 1), dense.movedim(3, 1), reduction="none")
    assert torch.allclose(soft_cross_entropy(logits, nearest, shares), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(16, 2), (33, 2), (28, 4), (33, 4), (8, 1)])
def test_colours_spread_from_where_they_were_taken(size: int, stride: int) -> None:
    """Targets come by striding: a colour goes back to the pixel it is from, and a flat one stays flat."""
    ab = torch.randn(2, 2, size, size)
    strided = ab[:, :, ::stride, ::stride]
    full = spread(strided.movedim(1, 3), stride, (size, size))
    assert full.shape == ab.shape
    assert torch.allclose(full[:, :, ::stride, ::stride], strided, atol=1e-5)


# The signal


def test_looked_up_codes_are_those_of_the_colours() -> None:
    images = tinted() // 2 + torch.randint(0, 128, (48, 3, 16, 16)).byte()
    signal = prepared(images)
    ab, nearest, shares, weights = signal.targets(views.rgb_to_lab(views.to_float(images)))
    exact = soft_code(ab.reshape(-1, 2).round(), signal.bins)
    assert torch.equal(nearest.reshape(-1, 5)[:, 0], exact[0][:, 0]) and torch.allclose(
        shares.reshape(-1, 5), exact[1], atol=1e-4
    )
    # The weight is that of the nearest bin, not a mean over the code.
    assert torch.equal(weights, signal.weights[nearest[..., 0]])
    assert len(signal.bins) == len(signal.prior) == signal.classifier.out_channels


def test_the_loss_starts_at_its_analytic_value() -> None:
    images = tinted()
    signal = prepared(images)
    loss, values = signal.loss(images)
    _, _, _, weights = signal.targets(views.rgb_to_lab(views.to_float(images)))
    chance = math.log(len(signal.bins))
    assert values["cross_entropy"].item() == pytest.approx(chance, rel=1e-5)
    assert loss.item() == pytest.approx(weights.mean().item() * chance, rel=1e-5)
    assert signal.objective(images)["cross_entropy"].item() == pytest.approx(chance, rel=1e-5)


def test_the_logits_do_not_depend_on_the_colours() -> None:
    signal = prepared(tinted(), stride=1)
    train(signal, tinted(), 3)
    signal.eval()
    lab = views.rgb_to_lab(views.to_float(tinted(4))).requires_grad_()
    signal.logits(views.rgb_to_lab(views.lab_to_rgb(lab))[:, :1]).square().sum().backward()
    assert lab.grad is not None
    assert lab.grad[:, 1:].abs().max() < 1e-3 * lab.grad[:, 0].abs().max()
    # And so in the loss: other colours of the same lightness change its targets, not the logits.
    seen: list[Tensor] = []
    hook = signal.encoder.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    lightness = lab[:, 0].detach()
    for ab in (torch.zeros(4, 16, 16, 2), torch.full((4, 16, 16, 2), 15.0)):
        signal.loss(rgb(lightness, ab))
    hook.remove()
    assert seen[0].shape == (4, 3, 16, 16)
    # What rounding to 8 bits leaves of it.
    assert (seen[0] - seen[1]).abs().max() < 0.02 < seen[0].std()


def test_gray_images_are_left_out_of_the_loss() -> None:
    images = tinted(8)
    gray = rgb(60.0, torch.full((8, 16, 16, 2), 0.0))
    assert not colorful(views.rgb_to_lab(views.to_float(gray))[:, 1:].movedim(1, 3)).any()
    signal = prepared(images)
    train(signal, images, 2)
    signal.eval()
    alone, both = signal.loss(images)[0], signal.loss(torch.cat((images, gray)))[0]
    assert both.item() == pytest.approx(alone.item() / 2, rel=1e-5)
    loss, _ = signal.loss(gray)
    loss.backward()
    assert loss == 0
    assert all(value.isfinite() for value in signal.objective(gray).values())
    # Nor do they move the prior: half of all pixels would be in its gray bin.
    with_gray = prepared(torch.cat((images, gray)))
    assert torch.equal(with_gray.bins, signal.bins) and torch.equal(with_gray.prior, signal.prior)


def test_two_halves_of_a_batch_have_the_mean_of_its_loss() -> None:
    """No image of another process is needed."""
    images = torch.cat((tinted(8), rgb(60.0, torch.zeros(8, 16, 16, 2))))[torch.randperm(16)]
    signal = prepared(images)
    train(signal, images, 2)
    signal.eval()
    halves = [signal.loss(half)[0].item() for half in images.chunk(2)]
    assert sum(halves) / 2 == pytest.approx(signal.loss(images)[0].item(), rel=1e-5)


def test_gray_data_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match="needs colour") as error:
        Colorization(encoder(channels=1)).prepare(torch.zeros(4, 1, 16, 16).byte(), 4)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="needs colour"):
        Colorization(encoder()).prepare(torch.full((4, 3, 16, 16), 90).byte(), 4)
    assert Colorization.needs_color


def test_one_colour_is_no_task_but_no_fault() -> None:
    images = rgb(60.0, torch.tensor([12.0, 12.0]).expand(6, 16, 16, 2))
    signal = prepared(images)
    assert len(signal.bins) == 1 and signal.loss(images)[0] == 0


def test_it_overfits_a_batch_and_colours_it() -> None:
    """Colours that the lightness tells: the loss goes to its floor, the entropy of the code."""
    generator = torch.Generator().manual_seed(1)
    stripes = (torch.arange(8) % 4 < 2).float().expand(8, -1)
    upright = torch.rand(32, 1, 1, generator=generator) < 0.5
    lightness = 45 + 20 * torch.where(upright, stripes, stripes.T)
    warm, cold = torch.tensor([30.0, 20.0]), torch.tensor([-10.0, -20.0])
    images = rgb(lightness, torch.where(upright.unsqueeze(3), warm, cold).expand(-1, 8, 8, -1))
    signal = prepared(images)
    _, _, shares, weights = signal.targets(views.rgb_to_lab(views.to_float(images)))
    floor = (weights * torch.special.entr(shares).sum(3)).mean().item()
    losses = train(signal, images, 40)
    assert losses[-1] - floor < 0.1 * (losses[0] - floor)
    result = signal.objective(images)
    assert result["accuracy"] > 0.9 > result["chance"]
    assert result["cross_entropy"] < result["cross_entropy_prior"] - 0.3
    assert result["chroma"].item() == pytest.approx(result["chroma_truth"].item(), rel=0.2)


def test_colours_that_nothing_tells_stay_at_the_prior() -> None:
    """Shuffled targets: the best answer is the rebalanced prior, and the loss cannot pass below it."""
    signal = prepared(tinted(256, 8))
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    for seed in range(1, 30):
        optimizer.zero_grad()
        signal.loss(tinted(64, 8, seed=seed))[0].backward()
        optimizer.step()
    result = signal.objective(tinted(256, 8, seed=99))
    assert result["cross_entropy"] > 0.9 * result["cross_entropy_prior"]
    assert result["accuracy"] < result["chance"] + 0.1


def test_regression_is_grayer_than_the_truth_and_than_classification() -> None:
    """Three of four images are red, the others blue, at random: the mean of both is pale."""
    classifier, regression = prepared(tinted(64, 8)), prepared(tinted(64, 8))
    regression.classifier = torch.nn.Conv2d(regression.classifier.in_channels, 2, 1)
    parameters = [*classifier.parameters(), *regression.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-3)
    for seed in range(40):
        # Fresh images, so that none is known by heart.
        images = tinted(64, 8, seed=seed)
        lab = views.rgb_to_lab(views.to_float(images))
        error = F.mse_loss(regression.logits(lab[:, :1]), regression.targets(lab)[0] / 30)
        optimizer.zero_grad()
        (error + classifier.loss(images)[0]).backward()
        optimizer.step()
    lab = views.rgb_to_lab(views.to_float(tinted(64, 8, seed=100)))
    truth = regression.targets(lab)[0].norm(dim=-1).mean()
    pale = 30 * regression.logits(lab[:, :1]).norm(dim=-1).mean()
    classified = annealed_mean(classifier.logits(lab[:, :1]), classifier.bins).norm(dim=-1).mean()
    assert pale < 0.75 * truth and pale < 0.9 * classified


def test_the_picture_shows_the_worst() -> None:
    images = torch.cat((tinted(20, 8, share=1.0), tinted(4, 8, share=0.0)))
    signal = prepared(images)
    train(signal, images, 10)
    signal.eval()
    picture = signal.picture(images)
    assert picture.shape == (8, 8, 3, 8, 8) and len(signal.picture_rows) == 8
    assert torch.allclose(picture[1], views.to_float(images[:8]))
    assert (picture[0] - picture[0].mean(1, keepdim=True)).abs().max() < 1e-3
    lab = views.rgb_to_lab(views.to_float(images))
    _, nearest, shares, weights = signal.targets(lab)
    error = (weights * soft_cross_entropy(signal.logits(lab[:, :1]), nearest, shares)).mean((1, 2))
    assert torch.allclose(picture[6, 0], views.to_float(images[error.argmax()]))
    # Predictions keep the lightness of the image, up to the edge of the screen's colours.
    assert (views.rgb_to_lab(picture[2])[:, 0] - lab[:8, 0]).abs().mean() < 1
