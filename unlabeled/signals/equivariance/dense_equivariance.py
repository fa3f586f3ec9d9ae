"""Dense equivariance: features move with the image (Thewlis et al. 2017, NeurIPS)."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.distributed import gather
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.signal import Signal

Share = Annotated[float, Field(ge=0, le=0.5)]


def mean_where(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over the images of each one's mean of values (B, N) where `valid`, bool (B, N).

    Means of the images first, so that the mean over processes is that of the joined batch.
    """
    return ((values * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()


def correspondence(descriptors: Tensor, others: Tensor, sharpness: float) -> Tensor:
    """Return p(v | u), float32 (B, N, M): which of M points v of another image is each of N points u.

    Args:
        descriptors, others: (B, D, N) and (B, D, M), of any length.
        sharpness: factor of their cosines in the softmax over v.
    """
    cosines = F.normalize(descriptors.float(), dim=1).mT @ F.normalize(others.float(), dim=1)
    return (sharpness * cosines).softmax(-1)


def correspondence_loss(p: Tensor, targets: Tensor, points: Tensor, valid: Tensor, power: float) -> Tensor:
    """Return the mean over points u of Σ_v ‖v − g(u)‖^power p(v | u) (Thewlis et al. 2017, equation 5).

    Args:
        p: p(v | u), float (B, N, M).
        targets: g(u), float (B, N, 2), in pixels.
        points: the points v, float (M, 2), in pixels.
        valid: bool (B, N), which g(u) lie in the frame.
    """
    # By matrix products a distance of 0 would come out as rounding error, which the power below 1 magnifies.
    places = points.expand(len(targets), -1, -1)
    distances = torch.cdist(targets, places, compute_mode="donot_use_mm_for_euclid_dist")
    return mean_where((p * distances**power).sum(-1), valid)


def map_loss(maps: Tensor, moved: Tensor, valid: Tensor) -> Tensor:
    """Return ‖f(πx) − πf(x)‖², the mean over channels and over the cells where `valid`.

    Args:
        maps: f(πx), float (B, C, N).
        moved: πf(x), float (B, C, N).
        valid: bool (B, N), which cells hold what lay in the frame.
    """
    return mean_where((maps.float() - moved.float()).square().mean(1), valid)


def spread_losses(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return what keeps features from collapse: VICReg's variance hinge and covariance (Bardes et al. 2022).

    The hinge is the mean over channels of max(0, 1 - std): 1 for constant maps, which `map_loss` alone would
    be content with. The covariance is the sum of the squared covariances of two channels over C: it keeps
    channels from repeating each other. Both over all cells and images of all processes.

    Args:
        maps: float (B, C, N).
    """
    features = gather(maps.float()).transpose(1, 2).flatten(0, 1)
    covariance = features.T.cov()
    variances = covariance.diagonal()
    hinge = F.relu(1 - (variances + 1e-4).sqrt()).mean()
    return hinge, (covariance.square().sum() - variances.square().sum()) / len(variances)


class DenseEquivariance(Signal):
    """Descriptors of points that are found again after a warp, on feature maps that follow it.

    A 1x1 convolution reads the descriptors of `upsampling`² points from each cell of the encoder's map. The
    warps are stronger than the paper's: under mild ones a net does well by taking every point to have stayed,
    as its zero padding tells it where it is. The feature-map loss is weighted as VICReg's, which it then is,
    cell by cell.
    """

    family = "equivariance"
    equation = "f(pi(x)) = pi'(f(x))"
    paper = "Thewlis et al. 2017, Unsupervised Learning of Object Frames by Dense Equivariant Image Labelling"
    training_defaults: ClassVar[dict[str, Any]] = {"batch_size": 128}
    picture_rows = (
        "image",
        "warped",
        "descriptors",
        "descriptors of the warped",
        "warped, put together from matches",
    )

    def __init__(
        self,
        encoder: Encoder,
        descriptor_dim: Annotated[int, Field(ge=2, description="numbers in a descriptor")] = 16,
        upsampling: Annotated[
            int, Field(ge=1, le=8, description="descriptors per cell of the feature map, along each axis")
        ] = 2,
        points: Annotated[int, Field(ge=1, description="points of each image to find again, at most")] = 64,
        sharpness: Annotated[float, Field(gt=0, description="factor of the cosines in the softmax")] = 20.0,
        power: Annotated[float, Field(gt=0, description="of the distance in pixels")] = 0.5,
        map_weight: Annotated[float, Field(ge=0, description="of the feature-map loss")] = 25.0,
        variance_weight: Annotated[
            float, Field(ge=0, description="of the feature map's variance hinge; 0 lets it collapse")
        ] = 25.0,
        covariance_weight: Annotated[
            float, Field(ge=0, description="of the covariance of the feature map's channels")
        ] = 1.0,
        rotation: Annotated[float, Field(ge=0, le=180, description="largest turn, degrees")] = 30.0,
        scale: Annotated[Share, Field(description="largest relative change of size")] = 0.25,
        shift: Annotated[Share, Field(description="largest shift, share of the side")] = 0.25,
        wave: Annotated[Share, Field(description="largest amplitude of the waves, share of the side")] = 0.1,
        brightness: Annotated[float, Field(ge=0, le=1, description="largest relative change")] = 0.4,
        contrast: Annotated[float, Field(ge=0, le=1, description="largest relative change")] = 0.4,
    ) -> None:
        super().__init__(encoder)
        self.head = nn.Conv2d(encoder.map_channels, descriptor_dim * upsampling**2, 1)
        self.upsampling, self.points, self.sharpness, self.power = upsampling, points, sharpness, power
        self.map_weight = map_weight
        self.spread_weights = variance_weight, covariance_weight
        self.warp: dict[str, Any] = {"degrees": rotation, "scale": scale, "shift": shift, "wave": wave}
        self.color = (brightness, contrast, 0.0, 0.0)
        # A point's coordinates go from -1 to 1.
        self.pixels = encoder.image_shape[1] / 2

    def describe(self, maps: Tensor) -> Tensor:
        """Return the descriptors (B, descriptor_dim, r · h, r · w) of feature maps (B, map_channels, h, w)."""
        return F.pixel_shuffle(self.head(maps), self.upsampling)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        originals = views.to_float(images)
        warp = views.random_warp(originals, **self.warp)
        pair = views.random_color(torch.cat((originals, warp.apply(originals))), *self.color)
        maps = self.encoder.feature_map(pair)
        descriptors, others = self.describe(maps).chunk(2)
        cells = views.cell_centres(descriptors)
        looked_for, points = descriptors.flatten(2), cells
        if self.points < len(cells):
            chosen = torch.randperm(len(cells), device=images.device)[: self.points]
            looked_for, points = looked_for[..., chosen], cells[chosen]
        targets = warp.forward(points.expand(len(images), -1, -1))
        p = correspondence(looked_for, others.flatten(2), self.sharpness)
        matching = correspondence_loss(
            p, targets * self.pixels, cells * self.pixels, views.in_frame(targets), self.power
        )
        original_maps, warped_maps = maps.flatten(2).chunk(2)
        moved = original_maps.float() @ warp.weights(maps).mT
        sources = warp.inverse(views.cell_centres(maps).expand(len(images), -1, -1))
        difference = map_loss(warped_maps, moved, views.in_frame(sources))
        hinge, covariance = spread_losses(maps.flatten(2))
        loss = matching + self.map_weight * difference
        loss = loss + self.spread_weights[0] * hinge + self.spread_weights[1] * covariance
        return loss, {
            "correspondence": matching,
            "map": difference,
            "variance_hinge": hinge,
            "covariance": covariance,
        }

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how far, in pixels, the nearest descriptor lies from where the warp brought the point.

        Beside it stand who takes every point to have stayed, who goes by the colour of the point, the same
        net at random init, and the nearest cell to the true place, which no match of cells can beat.
        """
        originals = views.to_float(images)
        warp = views.random_warp(originals, **self.warp)
        pair = torch.cat((originals, warp.apply(originals)))
        descriptors = self.describe(self.encoder.feature_map(pair))
        cells = views.cell_centres(descriptors).expand(len(images), -1, -1)
        targets = warp.forward(cells)

        def error(found: Tensor) -> Tensor:
            distances = self.pixels * torch.linalg.vector_norm(found - targets, dim=-1)
            return mean_where(distances, views.in_frame(targets))

        def matched(descriptors: Tensor) -> Tensor:
            return error(cells[0][nearest(*descriptors.flatten(2).chunk(2))])

        encoder = Encoder(**self.encoder.settings)
        dim = self.head.out_channels // self.upsampling**2
        untrained = type(self)(encoder, dim, self.upsampling).to(pair.device).train()
        random = untrained.describe(untrained.encoder.feature_map(pair))
        return {
            "match_error": matched(F.normalize(descriptors, dim=1)),
            "match_error_stayed": error(cells),
            "match_error_colour": matched(F.interpolate(pair, descriptors.shape[-2:], mode="bilinear")),
            "match_error_random_init": matched(F.normalize(random, dim=1)),
            "match_error_nearest_cell": error(cells[0][torch.cdist(targets, cells).argmin(-1)]),
        }

    def picture(self, images: Tensor) -> Tensor:
        originals = views.to_float(images[:8])
        warp = views.random_warp(originals, **self.warp)
        warped = warp.apply(originals)
        descriptors = F.normalize(
            self.describe(self.encoder.feature_map(torch.cat((originals, warped)))), dim=1
        )
        colors = F.interpolate(principal_components(descriptors, images.shape[1]), images.shape[2:])
        ours, others = descriptors.chunk(2)
        # Where in the image each cell of the warped one is found; between the cells' centres interpolated.
        sources = views.cell_centres(ours)[nearest(others.flatten(2), ours.flatten(2))]
        sources = sources.mT.unflatten(2, ours.shape[-2:])
        grid = F.interpolate(sources, images.shape[2:], mode="bilinear").permute(0, 2, 3, 1)
        put_together = F.grid_sample(originals, grid, padding_mode="border", align_corners=False)
        return torch.stack((originals, warped, *colors.chunk(2), put_together))


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return which of `others`, float (B, D, M), is nearest to each of `points`, (B, D, N): int64 (B, N)."""
    return torch.cdist(points.mT, others.mT).argmin(-1)


def principal_components(maps: Tensor, count: int) -> Tensor:
    """Return the first components (B, count, h, w) of maps (B, D, h, w) over all cells, brought to [0, 1]."""
    cells = maps.float().movedim(1, -1)
    cells = cells - cells.mean((0, 1, 2))
    directions = torch.linalg.eigh(cells.flatten(0, 2).T.cov()).eigenvectors.flip(1)[:, :count]
    components = (cells @ directions).movedim(-1, 1)
    low, high = components.amin((0, 2, 3), keepdim=True), components.amax((0, 2, 3), keepdim=True)
    return (components - low) / (high - low).clamp(min=1e-6)
