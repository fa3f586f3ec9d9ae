"""The encoder's pooling, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from unlabeled.nets.encoder import average_pool


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
