import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.errors import InputError
from unlabeled.export.models import ServedEncoder
from unlabeled.export.onnx import OnnxModel, onnx_bytes
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.pixel_cnn import GatedPixelCNN, RowConv
from unlabeled.signals.generative.pixelcnn import PixelCNN, mixture_log_probability, softmax_log_probability

HEADS = {"softmax": 0, "mixture": 3}


def signal_of(shape: tuple[int, int, int], random_head: bool = True, **settings: Any) -> PixelCNN:
    torch.manual_seed(0)
    signal = PixelCNN(Encoder("pixel_cnn", 6, 2, shape, 0.4, 0.3), **settings)
    if random_head:
        nn.init.normal_(signal.head.weight, std=0.5)
    return signal


def images_of(shape: tuple[int, int, int], count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)).byte()


def dependence(net: nn.Module, image: Tensor) -> Tensor:
    """Return bool (outputs, inputs), raster and then colour order: which inputs (1, C, H, W) move which outputs.

    The outputs are (1, ..., C, H, W), of any number of numbers for each position and colour.
    """
    colours = image.shape[1]
    jacobian = torch.func.jacrev(lambda x: net(x).unflatten(1, (-1, colours)).square().sum((0, 1)))(image)
    moved = jacobian.squeeze(3).permute(1, 2, 0, 4, 5, 3) != 0
    return moved.flatten(3).flatten(0, 2)


def all_before(count: int) -> Tensor:
    return torch.ones(count, count).tril(-1).bool()


class Logits(nn.Module):
    def __init__(self, signal: PixelCNN) -> None:
        super().__init__()
        self.signal = signal

    def forward(self, image: Tensor) -> Tensor:
        return self.signal.head(self.signal.encoder.feature_map(image))


@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 5, 7), (3, 4, 4)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_value_depends_on_all_before_it_and_on_none_after(
    shape: tuple[int, int, int], trained: bool
) -> None:
    signal = signal_of(shape, components=2)
    if trained:
        # Masks hold after the weights have moved.
        optimizer = torch.optim.AdamW(signal.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            signal.loss(images_of(shape))[0].backward()
            optimizer.step()
    image = torch.rand(1, *shape, dtype=torch.float64)
    moved = dependence(Logits(signal.double()), image)
    assert torch.equal(moved, all_before(image.numel()))


def test_a_mask_that_shows_the_pixel_itself_is_found() -> None:
    signal = signal_of((3, 4, 4), components=2)
    net = signal.encoder.net
    assert isinstance(net, GatedPixelCNN)
    net.horizontal[0] = RowConv(3, 6, 3, 3, same=True)
    moved = dependence(Logits(signal.double()), torch.rand(1, 3, 4, 4, dtype=torch.float64))
    assert moved.diagonal().all() and not moved.triu(1).any()


def test_without_the_shift_down_the_row_itself_is_seen() -> None:
    signal = signal_of((1, 5, 5), components=2)
    net = signal.encoder.net
    assert isinstance(net, GatedPixelCNN)
    net.vertical[0] = nn.Conv2d(1, 12, (3, 7), padding=(2, 3))
    moved = dependence(Logits(signal.double()), torch.rand(1, 1, 5, 5, dtype=torch.float64))
    assert moved.triu(1).any()


def test_masked_convolutions_on_each_other_would_have_a_blind_spot() -> None:
    """What the two stacks are for: a single stack of 3x3 masks never sees far to the upper right."""

    class Stack(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for seen in (4, 5, 5, 5, 5, 5):
                mask = (torch.arange(9) < seen).double().view(1, 1, 3, 3)
                x = F.conv2d(x, mask, padding=1)
            return x

    moved = dependence(Stack(), torch.rand(1, 1, 6, 6, dtype=torch.float64))
    assert not moved.triu().any() and not torch.equal(moved, all_before(36))


def test_colour_masks_of_a_pixel() -> None:
    """Red sees nothing of its pixel, green red, blue red and green; after the first layer also itself."""
    for same in (False, True):
        mask = RowConv(6, 6, 1, 3, same).mask[:, :, 0]
        order = torch.arange(6) % 3
        assert torch.equal(mask[..., 1] == 1, order[:, None] > order - int(same))
        assert (mask[..., 0] == 1).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("levels", "colours"), [(2, 1), (4, 1), (2, 3)])
def test_the_probabilities_of_all_images_sum_to_1(levels: int, colours: int, head: str) -> None:
    signal = signal_of((colours, 2, 2), levels=levels, components=HEADS[head])
    every = torch.tensor(list(itertools.product(range(levels), repeat=4 * colours)))
    images = (every * 256 // levels).byte().view(-1, colours, 2, 2)
    values = signal.quantised(images)
    assert torch.equal(values.flatten(1), every)
    with torch.no_grad():
        scores = signal.score(values).flatten(1).sum(1)
    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert scores.std() > 0.1


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_a_mixture_sums_to_1_whatever_its_parameters(levels: int) -> None:
    torch.manual_seed(0)
    parameters = torch.randn(64, 1, 3, 10) * torch.tensor([1.0, 2.0, 4.0]).view(3, 1)
    parameters = parameters.flatten(2).requires_grad_()
    values = torch.arange(levels).expand(64, -1)
    log_probabilities = mixture_log_probability(parameters, values, levels)
    assert log_probabilities.shape == (64, levels) and log_probabilities.isfinite().all()
    assert torch.allclose(log_probabilities.exp().sum(1), torch.ones(64), atol=1e-4)
    log_probabilities.sum().backward()
    assert parameters.grad is not None and parameters.grad.isfinite().all()


def test_a_mixture_is_the_difference_of_distribution_functions() -> None:
    torch.manual_seed(0)
    shares, means, log_scales = (
        torch.randn(5, 4).double(),
        torch.randn(5, 4).double(),
        torch.randn(5, 4).double() - 2,
    )
    edges = torch.cat((torch.tensor([-1e9]), torch.linspace(0, 1, 256)[:-1] + 1 / 510, torch.tensor([1e9])))
    distribution = ((edges.double()[:, None, None] - means) / log_scales.exp()).sigmoid()
    expected = (distribution.diff(dim=0) * shares.softmax(1)).sum(2).T
    parameters = torch.cat((shares, means, log_scales), 1).unsqueeze(1)
    found = mixture_log_probability(parameters, torch.arange(256).expand(5, -1), 256).exp()
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_far_from_all_means_a_mixture_still_has_a_slope() -> None:
    """A difference of two sigmoids would be 0 there, its logarithm infinite, and the gradient lost."""
    parameters = torch.tensor([[0.0, 1.0, -7.0]]).requires_grad_()
    far = mixture_log_probability(parameters, torch.tensor([10]), 256)
    far.sum().backward()
    assert far.isfinite().all() and far < -1000
    assert parameters.grad is not None and parameters.grad[0, 1] < 0


def test_the_softmax_is_cross_entropy() -> None:
    logits, values = torch.randn(3, 5, 16), torch.randint(0, 16, (3, 5))
    expected = -F.cross_entropy(logits.flatten(0, 1), values.flatten())
    assert torch.allclose(softmax_log_probability(logits, values).mean(), expected)


@pytest.mark.parametrize("levels", [4, 16, 256])
@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 9, 9)])
def test_the_loss_starts_at_the_bits_of_no_knowledge(shape: tuple[int, int, int], levels: int) -> None:
    images = images_of(shape, 32)
    softmax = signal_of(shape, False, levels=levels, components=0)
    assert softmax.loss(images)[0].item() == pytest.approx(math.log2(levels), abs=1e-5)
    mixture = signal_of(shape, False, levels=levels)
    assert mixture.loss(images)[0].item() == pytest.approx(math.log2(levels), abs=0.15)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 10, 5)])
def test_drawing_uses_the_conditionals_of_scoring(
    shape: tuple[int, int, int], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows and columns beyond the net's reach are left out in drawing, and nothing changes by it."""
    signal = signal_of(shape, components=HEADS[head], levels=16).eval()
    used: list[Tensor] = []
    drawn = signal.drawn
    monkeypatch.setattr(signal, "drawn", lambda outputs: used.append(outputs) or drawn(outputs))
    values = signal.draw(torch.zeros(2, *shape, dtype=torch.int64), 0, shape[1])
    with torch.no_grad():
        outputs = signal.outputs(signal.encoder.feature_map(values / 15))
    assert torch.allclose(torch.stack(used, 1), outputs.flatten(1, 3), atol=1e-5)
    assert values.max() <= 15 and (values[0] != values[1]).any()


def test_drawing_follows_the_probabilities() -> None:
    signal = signal_of((1, 4, 4), components=0, levels=4)
    outputs = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, 4)
    shares = torch.bincount(signal.drawn(outputs)) / 20_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02)


def test_drawing_keeps_the_rows_above() -> None:
    signal = signal_of((1, 8, 8))
    values = signal.quantised(images_of((1, 8, 8)))
    drawn = signal.draw(values, 5, 8)
    assert torch.equal(drawn[:, :, :5], values[:, :, :5]) and (drawn[:, :, 5:] != values[:, :, 5:]).any()


def test_an_images_bits_do_not_depend_on_the_batch() -> None:
    """Statistics of a batch would tell of pixels to come."""
    signal = signal_of((3, 8, 8)).train()
    values = signal.quantised(images_of((3, 8, 8)))
    assert torch.allclose(signal.score(values)[:1], signal.score(values[:1]), atol=1e-5)


def test_levels_cut_the_pixels_evenly() -> None:
    every = torch.arange(256).byte().view(1, 1, 16, 16)
    for levels in (2, 16, 256):
        counts = torch.bincount(signal_of((1, 16, 16), levels=levels).quantised(every).flatten())
        assert counts.tolist() == [256 // levels] * levels


def test_the_objective_stands_beside_histogram_and_uniform() -> None:
    signal = signal_of((1, 8, 8), False, levels=4, components=0)
    dark = images_of((1, 8, 8), 50) // 2
    signal.prepare(dark, 50)
    objective = signal.objective(dark)
    assert objective["bits_per_dim_uniform"] == 2 == round(objective["bits_per_dim"].item(), 5)
    # Two levels of four, equally often.
    assert objective["bits_per_dim_histogram"].item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("head", HEADS)
def test_it_overfits_one_batch(head: str) -> None:
    signal = signal_of((1, 8, 8), False, components=HEADS[head], levels=16)
    ramps = (torch.arange(64).view(1, 1, 8, 8) * torch.arange(1, 5).view(4, 1, 1, 1)).byte()
    optimizer = torch.optim.AdamW(signal.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = signal.loss(ramps)
        loss.backward()
        optimizer.step()
    assert loss < 0.35 * 4


def test_shuffled_pixels_cost_what_their_histogram_does() -> None:
    """Nothing but the order is left out: what it has learned of neighbours is worth nothing then."""
    signal = signal_of((1, 8, 8), False, components=0, levels=16)
    rows = torch.randint(0, 16, (16, 1, 8, 1), generator=torch.Generator().manual_seed(1)).expand(-1, 1, 8, 8)
    optimizer = torch.optim.AdamW(signal.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = signal.loss((rows * 16).byte())[0]
        loss.backward()
        optimizer.step()
    shuffled = rows.flatten(1)[:, torch.randperm(64)].view_as(rows)
    assert loss < 2 and signal.loss((shuffled * 16).byte())[0] > 4


def test_another_encoder_is_refused() -> None:
    with pytest.raises(InputError, match="pixel_cnn"):
        PixelCNN(Encoder("small_resnet", 8, 2, (1, 8, 8), 0.5, 0.3))
    with pytest.raises(InputError, match="pixel_cnn"):
        Encoder("pixelcnn", 8, 2, (1, 8, 8), 0.5, 0.3)


@pytest.mark.slow
def test_its_encoder_is_served_as_onnx(tmp_path: Path) -> None:
    shape = (3, 9, 9)
    torch.manual_seed(0)
    served = ServedEncoder(Encoder("pixel_cnn", 8, 2, shape, 0.4, 0.3)).eval()
    (tmp_path / "model.onnx").write_bytes(onnx_bytes(served))
    images = images_of(shape)
    with torch.no_grad():
        expected = served(images)
    found = torch.from_numpy(OnnxModel(tmp_path / "model.onnx", 1)(images.numpy()))
    assert torch.allclose(found, expected, atol=1e-5) and expected.std() > 0.01
