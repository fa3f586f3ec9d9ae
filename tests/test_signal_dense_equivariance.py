"""Dense equivariance: the warps' directions, both losses, and what must fail."""

import math
from pathlib import Path

import pytest
import torch
from signal_training import torchrun
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.equivariance.dense_equivariance import (
    DenseEquivariance,
    correspondence,
    correspondence_loss,
    map_loss,
    mean_where,
    nearest,
    principal_components,
    spread_losses,
)
from unlabeled.views.warps import Warp, cell_centres, in_frame, random_warp

SIDE = 28


def identity(count: int) -> Warp:
    return Warp(torch.eye(2).repeat(count, 1, 1), torch.zeros(count, 2), torch.zeros(count, 2, 3))


def turn(degrees: float) -> Warp:
    """A turn of the picture, clockwise as rows count downwards."""
    angle = torch.tensor(math.radians(degrees))
    matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(1, 2, 2)
    return Warp(matrix, torch.zeros(1, 2), torch.zeros(1, 2, 3))


def pixels_to_points(pixels: Tensor, side: int) -> Tensor:
    return (2 * pixels + 1) / side - 1


def bump(x: float, y: float, side: int, sigma: float = 1.2) -> Tensor:
    """A small bright spot at pixel (x, y), image (1, 1, side, side)."""
    at = torch.arange(side)
    return (
        torch.exp(-((at - y) ** 2).view(-1, 1) / (2 * sigma**2))
        * torch.exp(-((at - x) ** 2) / (2 * sigma**2))
    )[None, None]


def centre_of_mass(images: Tensor) -> Tensor:
    """The bright spots' places (B, 2), x and y in pixels."""
    at = torch.arange(images.shape[-1]).float()
    mass = images.sum((1, 2, 3))
    return torch.stack(
        ((images * at).sum((1, 2, 3)) / mass, (images * at.view(-1, 1)).sum((1, 2, 3)) / mass), 1
    )


def strong_warp(count: int, seed: int = 0) -> Warp:
    generator = torch.Generator().manual_seed(seed)
    return random_warp(torch.zeros(count, 1, SIDE, SIDE), 40, 0.2, 0.1, 0.1, generator)


# Warps


def test_the_weights_of_a_warp_are_its_lookup() -> None:
    """One product of matrices gives what `grid_sample` does, borders included; gradients too."""
    warp = random_warp(torch.rand(6, 1, 28, 28), degrees=60, scale=0.3, shift=0.4, wave=0.2)
    maps = torch.rand(6, 3, 4, 7, requires_grad=True)
    weights = warp.weights(maps)
    assert torch.allclose(weights.sum(-1), torch.ones(6, 28), atol=1e-6)
    looked_up, multiplied = warp.apply(maps).flatten(2), maps.flatten(2) @ weights.mT
    assert torch.allclose(multiplied, looked_up, atol=1e-6)
    by_lookup, by_product = (
        torch.autograd.grad(moved.square().sum(), maps)[0] for moved in (looked_up, multiplied)
    )
    assert torch.allclose(by_product, by_lookup, atol=1e-5)


def test_the_identity_keeps_points_and_images() -> None:
    images = torch.rand(3, 2, 9, 9)
    points = cell_centres(images).expand(3, -1, -1)
    none = random_warp(images, 0, 0, 0, 0)
    for warp in (identity(3), none):
        assert torch.allclose(warp.forward(points), points, atol=1e-6)
        assert torch.allclose(warp.inverse(points), points, atol=1e-6)
        assert torch.allclose(warp.apply(images), images, atol=1e-5)


def test_forward_and_inverse_take_each_other_back() -> None:
    warp = strong_warp(20)
    points = torch.rand(20, 50, 2) * 2 - 1
    assert torch.allclose(warp.inverse(warp.forward(points)), points, atol=1e-5)
    assert torch.allclose(warp.forward(warp.inverse(points)), points, atol=1e-5)
    assert (warp.forward(points) - points).abs().amax((1, 2)).min() > 0.05
    assert (warp.inverse(points) - warp.forward(points)).abs().max() > 0.1


@pytest.mark.parametrize("side", [28, 33])
def test_a_spot_at_u_lands_at_g_of_u(side: int) -> None:
    """The directions of points and of pixels agree, x is x, and no half pixel is lost."""
    spots = [(8.0, 12.0), (14.0, 14.0), (18.0, 9.0)]
    images = torch.cat([bump(x, y, side) for x, y in spots])
    warp = strong_warp(3)
    targets = warp.forward(pixels_to_points(torch.tensor(spots), side).unsqueeze(1)).squeeze(1)
    expected = ((targets + 1) * side - 1) / 2
    assert (expected > 3).all() and (expected < side - 4).all()
    landed = centre_of_mass(warp.apply(images))
    # The waves bend a spot's flanks, so that its centre of mass is a little beside its peak.
    assert (landed - expected).abs().max() < 0.25
    assert (landed - torch.tensor(spots)).norm(dim=1).min() > 0.5
    backward = (
        (warp.inverse(pixels_to_points(torch.tensor(spots), side).unsqueeze(1)).squeeze(1) + 1) * side - 1
    ) / 2
    assert (landed - backward).norm(dim=1).min() > 1


def test_a_single_pixel_lands_exactly_under_a_whole_shift() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 5] = 1
    warp = Warp(torch.eye(2)[None], torch.tensor([[2 / 8 * -3, 2 / 8 * 1]]), torch.zeros(1, 2, 3))
    result = warp.apply(image)
    assert result[0, 0, 3, 2].item() == pytest.approx(1, abs=1e-5) and result.sum().item() == pytest.approx(
        1, abs=1e-4
    )


def test_a_quarter_turn_is_torchs() -> None:
    images = torch.rand(1, 3, 7, 7)
    # x to the right and y down: from x to y is clockwise, torch's rot90 of (columns, rows).
    assert torch.allclose(turn(90).apply(images), torch.rot90(images, 1, (3, 2)), atol=1e-5)


def test_a_feature_map_lies_on_its_image_without_an_offset() -> None:
    """Cell i of stride s is centred at pixel s · i + (s - 1) / 2."""
    stride, image = 4, torch.zeros(1, 1, 24, 24)
    centres = (cell_centres(F.avg_pool2d(image, stride)) + 1) * 24 / 2 - 0.5
    cells = torch.arange(6) * stride + (stride - 1) / 2
    assert torch.allclose(centres.view(6, 6, 2)[2, :, 0], cells) and torch.allclose(
        centres.view(6, 6, 2)[:, 2, 1], cells
    )
    # Pooling a warped smooth image is warping the pooled one; with corners aligned it would not be.
    image = bump(11, 12, 24, sigma=5.0)
    warp = Warp(turn(20).matrices, torch.tensor([[0.15, -0.1]]), torch.zeros(1, 2, 3))
    pooled = F.avg_pool2d(warp.apply(image), stride)
    error = (warp.apply(F.avg_pool2d(image, stride)) - pooled).abs().mean()
    sources = warp.inverse(cell_centres(pooled)[None]).view(1, 6, 6, 2)
    aligned = F.grid_sample(F.avg_pool2d(image, stride), sources, padding_mode="border", align_corners=True)
    assert error < 0.5 * (aligned - pooled).abs().mean()


def test_warps_are_each_images_own_and_keep_to_their_ranges() -> None:
    images = torch.zeros(500, 1, 8, 8)
    warp = random_warp(images, 15, 0.1, 0.1, 0.05)
    scales = torch.linalg.det(warp.matrices).sqrt()
    angles = torch.rad2deg(torch.atan2(warp.matrices[:, 1, 0], warp.matrices[:, 0, 0]))
    assert 0.9 <= scales.min() < 0.92 and 1.08 < scales.max() <= 1.1
    assert -15 <= angles.min() < -14 and 14 < angles.max() <= 15
    assert 0.19 < warp.shifts.abs().max() <= 0.2 and 0.09 < warp.waves[..., 0].abs().max() <= 0.1
    first, second = (random_warp(images, generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(first.matrices, second.matrices) and len(first.shifts.unique(dim=0)) == 500


# The dense loss


def loss_of(
    descriptors: Tensor, others: Tensor, warp: Warp, sharpness: float = 200.0, power: float = 0.5
) -> Tensor:
    cells = cell_centres(descriptors)
    targets = warp.forward(cells.expand(len(descriptors), -1, -1))
    p = correspondence(descriptors.flatten(2), others.flatten(2), sharpness)
    pixels = SIDE / 2
    return correspondence_loss(p, targets * pixels, cells * pixels, in_frame(targets), power)


def test_the_loss_is_its_definition() -> None:
    torch.manual_seed(0)
    descriptors, others, targets = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 4, 2)
    points, valid = torch.randn(5, 2), torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]).bool()
    images = []
    for b in range(2):
        losses = []
        for u in range(4):
            cosines = torch.stack(
                [F.cosine_similarity(descriptors[b, :, u], others[b, :, v], dim=0) for v in range(5)]
            )
            p = (7 * cosines).exp() / (7 * cosines).exp().sum()
            far = torch.stack([(targets[b, u] - points[v]).square().sum().sqrt() ** 0.5 for v in range(5)])
            losses.append((p * far).sum())
        images.append(torch.stack(losses)[valid[b]].mean())
    p = correspondence(descriptors, others, 7.0)
    loss = correspondence_loss(p, targets, points, valid, 0.5)
    assert loss.item() == pytest.approx((sum(images) / 2).item(), rel=1e-5)
    assert torch.allclose(p.sum(-1), torch.ones(2, 4))


def test_distinct_features_under_the_identity_cost_nothing() -> None:
    features = torch.eye(36).view(1, 36, 6, 6).repeat(2, 1, 1, 1)
    assert loss_of(features, features, identity(2)) < 1e-4
    # The wrong places, and the right ones in another order, do cost.
    assert loss_of(features, features.roll(1, 3), identity(2)) > 1


def test_features_that_move_with_the_image_cost_nothing_only_in_that_direction() -> None:
    features = torch.eye(36).view(1, 36, 6, 6)
    quarter = turn(90)
    assert loss_of(features, torch.rot90(features, 1, (3, 2)), quarter) < 2e-3
    assert loss_of(features, torch.rot90(features, -1, (3, 2)), quarter) > 1
    assert loss_of(features, features.mT, quarter) > 1


def test_constant_features_cost_the_mean_distance_of_a_uniform_guess() -> None:
    features, warp = torch.ones(3, 4, 6, 6), strong_warp(3)
    cells = cell_centres(features)
    targets = warp.forward(cells.expand(3, -1, -1))
    distances = (targets.unsqueeze(2) - cells).norm(dim=-1).mul(SIDE / 2).sqrt().mean(2)
    expected = mean_where(distances, in_frame(targets))
    assert (
        loss_of(features, features, warp).item() == pytest.approx(expected.item(), rel=1e-4) and expected > 2
    )
    assert map_loss(features.flatten(2), warp.apply(features).flatten(2), in_frame(targets)) < 1e-10


def test_points_out_of_the_frame_do_not_count() -> None:
    features = torch.eye(36).view(1, 36, 6, 6)
    away = Warp(torch.eye(2)[None], torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 3))
    valid = in_frame(away.forward(cell_centres(features)[None]))
    assert valid.view(6, 6)[:, :3].all() and not valid.view(6, 6)[:, 3:].any()
    moved = torch.zeros_like(features)
    moved[..., 3:] = features[..., :3]
    assert loss_of(features, moved, away) < 2e-3
    assert mean_where(torch.full((1, 4), torch.e), torch.zeros(1, 4).bool()) == 0


def test_length_of_descriptors_does_not_matter_and_the_gradient_reaches_both() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 4, 4).requires_grad_(), torch.randn(2, 5, 4, 4).requires_grad_()
    loss = loss_of(a, b, strong_warp(2), 5.0)
    assert torch.allclose(loss, loss_of(3 * a, b / 7, strong_warp(2), 5.0), atol=1e-5)
    loss.backward()
    assert a.grad is not None and b.grad is not None and a.grad.norm() > 0.01 and b.grad.norm() > 0.01


# The feature-map loss


class GroupConvolution(nn.Module):
    """A convolution whose kernel is the same after a quarter turn."""

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.randn(4, 2, 3, 3)
        self.kernel = sum((torch.rot90(kernel, k, (2, 3)) for k in range(4)), torch.zeros_like(kernel))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.kernel)


def everywhere(maps: Tensor) -> Tensor:
    return torch.ones(len(maps), maps.shape[2] * maps.shape[3], dtype=torch.bool)


def test_positive_controls_are_equivariant() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, 12, 12)
    circular = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
    zero_padded = nn.Conv2d(2, 4, 3, padding=1)

    def shift_error(net: nn.Module) -> float:
        shifted = net(images.roll((3, 5), (2, 3)))
        return map_loss(
            shifted.flatten(2), net(images).roll((3, 5), (2, 3)).flatten(2), everywhere(shifted)
        ).item()

    assert shift_error(circular) < 1e-5 < 1e-3 < shift_error(zero_padded)
    quarter = Warp(turn(90).matrices.repeat(3, 1, 1), torch.zeros(3, 2), torch.zeros(3, 2, 3))

    def turn_error(net: nn.Module) -> float:
        turned = net(quarter.apply(images))
        return map_loss(turned.flatten(2), quarter.apply(net(images)).flatten(2), everywhere(turned)).item()

    assert turn_error(GroupConvolution()) < 1e-5 < 1e-3 < turn_error(circular)


def test_a_convolution_commutes_with_whole_shifts_where_the_frame_shows_it() -> None:
    torch.manual_seed(0)
    images, net = torch.rand(2, 1, 12, 12), nn.Conv2d(1, 3, 1)
    warp = Warp(torch.eye(2).repeat(2, 1, 1), torch.tensor([[2 / 12 * 3, 0.0]] * 2), torch.zeros(2, 2, 3))
    maps = net(warp.apply(images))
    shown = in_frame(warp.inverse(cell_centres(maps).expand(2, -1, -1)))
    assert shown.view(2, 12, 12)[0].sum() == 12 * 9
    moved = torch.zeros_like(maps)
    moved[..., 3:] = net(images)[..., :9]
    assert map_loss(maps.flatten(2), moved.flatten(2), shown) < 1e-8
    assert map_loss(maps.flatten(2), moved.flatten(2), everywhere(maps)) > 1e-3


def test_the_hinge_and_the_covariance_see_a_collapse() -> None:
    torch.manual_seed(0)
    hinge, covariance = spread_losses(torch.ones(8, 5, 9))
    assert hinge.item() == pytest.approx(0.99, abs=1e-6) and covariance == 0
    spread = torch.randn(400, 5, 9)
    hinge, covariance = spread_losses(2 * spread)
    assert hinge == 0 and covariance < 0.02
    # One channel repeated: each of 5 · 4 pairs has covariance 1.
    hinge, covariance = spread_losses(spread[:, :1].repeat(1, 5, 1))
    assert hinge < 0.02 and covariance.item() == pytest.approx(4, rel=0.05)


# The method


def images_of(count: int, side: int = 12) -> Tensor:
    """Random blobs on a dark ground: things whose places can be told apart."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    coarse[:, :, (0, 4)] = coarse[..., (0, 4)] = 0
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).byte()


def signal_of(**settings: float) -> DenseEquivariance:
    torch.manual_seed(0)
    return DenseEquivariance(Encoder("small_resnet", 16, 2, (1, 12, 12), 0.3, 0.3), **settings)  # type: ignore[arg-type]


def trained(steps: int = 150, **settings: float) -> DenseEquivariance:
    signal = signal_of(**settings)
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        signal.loss(images_of(32))[0].backward()
        optimizer.step()
    return signal.eval()


@pytest.fixture(scope="module")
def learned() -> DenseEquivariance:
    return trained()


@pytest.mark.slow
def test_it_learns_to_match_better_than_every_baseline(learned: DenseEquivariance) -> None:
    torch.manual_seed(0)
    values = learned.objective(images_of(64))
    error = values.pop("match_error")
    floor = values.pop("match_error_nearest_cell")
    assert floor < error < 0.9 * min(values.values()), (error, values)
    # The match follows the image: descriptors of other images do not find the points.
    torch.manual_seed(0)
    first, losses = images_of(64), learned.loss(images_of(64))[1]
    assert losses["correspondence"] < signal_of().loss(first)[1]["correspondence"]


@pytest.mark.slow
def test_without_the_spread_the_feature_map_collapses_and_its_loss_does_not_see_it(
    learned: DenseEquivariance,
) -> None:
    """The ablation: map loss alone, no variance hinge."""

    def spread(signal: DenseEquivariance) -> tuple[float, float]:
        maps = signal.encoder.feature_map(images_of(64).float() / 255)
        return maps.std((0, 2, 3)).mean().item(), signal.loss(images_of(64))[1]["map"].item()

    collapsed = trained(map_weight=1e4, variance_weight=0, covariance_weight=0)
    std, loss = spread(collapsed)
    healthy_std, healthy_loss = spread(learned)
    assert std < 0.3 * healthy_std and loss < 0.1 * healthy_loss


@pytest.mark.slow
def test_a_pooled_descriptor_cannot_match(learned: DenseEquivariance) -> None:
    """Invariance trained by mistake: one descriptor for the whole image leaves a uniform guess."""
    torch.manual_seed(0)
    originals = images_of(16).float() / 255
    warp = random_warp(originals)
    maps = learned.encoder.feature_map(torch.cat((originals, warp.apply(originals))))
    sharp, pooled = (learned.describe(m) for m in (maps, maps.mean((2, 3), keepdim=True).expand_as(maps)))
    # Pixel shuffle alone still tells the parts of a cell apart.
    pooled = pooled.mean((2, 3), keepdim=True).expand_as(pooled)
    of_sharp, of_pooled = (loss_of(*d.chunk(2), warp, 20.0) for d in (sharp, pooled))
    uniform = loss_of(torch.ones(16, 2, *sharp.shape[2:]), torch.ones(16, 2, *sharp.shape[2:]), warp)
    assert of_pooled.item() == pytest.approx(uniform.item(), rel=1e-3) and of_sharp < 0.7 * uniform


def test_the_loss_at_init_is_near_that_of_a_uniform_guess() -> None:
    signal = signal_of(sharpness=0.01, rotation=0, scale=0, shift=0, wave=0)
    cells = cell_centres(torch.zeros(1, 1, 6, 6)) * 6
    expected = torch.cdist(cells, cells).sqrt().mean()
    assert signal.loss(images_of(8))[1]["correspondence"].item() == pytest.approx(expected.item(), rel=0.02)


def test_nearest_and_components() -> None:
    points, others = (
        torch.tensor([[[0.0, 5.0], [0.0, 5.0]]]),
        torch.tensor([[[4.0, 9.0, 1.0], [4.0, 9.0, 0.0]]]),
    )
    assert nearest(points, others).tolist() == [[2, 0]]
    torch.manual_seed(0)
    maps = torch.randn(4, 6, 5, 5) * torch.tensor([1.0, 9, 1, 1, 4, 1]).view(-1, 1, 1)
    components = principal_components(maps, 2)
    assert components.amin((0, 2, 3)).tolist() == [0, 0] and components.amax((0, 2, 3)).tolist() == [1, 1]
    for component, channel in ((0, 1), (1, 4)):
        both = torch.stack((components[:, component].flatten(), maps[:, channel].flatten()))
        assert both.corrcoef()[0, 1].abs() > 0.95


@pytest.mark.slow
def test_the_picture_puts_the_warped_image_together_from_matches(learned: DenseEquivariance) -> None:
    torch.manual_seed(0)
    picture = learned.picture(images_of(8))
    image, warped, _, _, together = picture
    assert F.mse_loss(together, warped) < 0.8 * F.mse_loss(image, warped)
    assert views.to_float(images_of(8)).equal(image)


# Several processes

WORKER = """
import sys, torch
from unlabeled.signals.equivariance.dense_equivariance import map_loss, spread_losses
from unlabeled.distributed import process_group, rank

with process_group():
    data = torch.load(sys.argv[1])
    mine = slice(rank() * 3, rank() * 3 + 3)
    weight = data["weight"].requires_grad_()
    maps, moved = (torch.einsum("cd,bdn->bcn", weight, data[name][mine]) for name in ("maps", "moved"))
    loss = map_loss(maps, moved, data["valid"][mine]) + sum(spread_losses(maps))
    loss.backward()
    torch.save({"loss": loss.detach(), "gradient": weight.grad}, f"{sys.argv[2]}/{rank()}.pt")
"""


@pytest.mark.slow
def test_two_processes_have_the_loss_of_the_joined_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {"maps": torch.randn(6, 4, 5), "moved": torch.randn(6, 4, 5), "weight": 0.3 * torch.randn(4, 4)}
    data["valid"] = torch.rand(6, 5) < 0.6
    torch.save(data, tmp_path / "data.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(str(tmp_path / "worker.py"), str(tmp_path / "data.pt"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    weight = data["weight"].requires_grad_()
    maps, moved = (torch.einsum("cd,bdn->bcn", weight, data[name]) for name in ("maps", "moved"))
    hinge, covariance = spread_losses(maps)
    loss = map_loss(maps, moved, data["valid"]) + hinge + covariance
    loss.backward()
    assert weight.grad is not None
    assert abs(sum(r["loss"] for r in ranks) / 2 - loss) < 1e-5
    assert torch.allclose(sum(r["gradient"] for r in ranks) / 2, weight.grad, atol=1e-5)
    alone = torch.stack([torch.stack(spread_losses(part)).sum() for part in maps.chunk(2)]).mean()
    assert (alone - hinge - covariance).abs() > 1e-3
