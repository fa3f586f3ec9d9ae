"""The encoder's layers, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from unlabeled.nets.encoder import average_pool
from unlabeled.nets.pointwise import Pointwise


@pytest.mark.parametrize("shape", [(4, 4), (3, 3), (5, 7), (1, 2), (12, 9)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_average_pool_is_adaptive_average_pooling(shape: tuple[int, int], size: int) -> None:
    maps = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(average_pool(maps, size), F.adaptive_avg_pool2d(maps, size))


def test_a_gradient_flows_after_a_first_call_in_inference_mode() -> None:
    maps = torch.randn(2, 3, 3, 3)
    with torch.inference_mode():
        average_pool(maps, 2)
    maps.requires_grad_()
    average_pool(maps, 2).sum().backward()
    assert maps.grad is not None and torch.allclose(maps.grad.sum(), torch.tensor(24.0))


@pytest.mark.parametrize("channels_in", [2, 4, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_convolution_is_a_convolution_however_few_channels_come_in(
    channels_in: int, stride: int
) -> None:
    layer = Pointwise(channels_in, 8, stride).to(memory_format=torch.channels_last)
    x = torch.randn(16, channels_in, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    expected = F.conv2d(x.contiguous(), layer.weight.contiguous(), layer.bias, stride)
    found = layer(x)
    assert torch.allclose(found, expected, atol=1e-6)
    towards = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((answer * towards).sum(), x, retain_graph=True)[0] for answer in (found, expected)
    ]
    assert torch.allclose(*gradients, atol=1e-5)
