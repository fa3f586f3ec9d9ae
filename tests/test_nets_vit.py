"""The small Vision Transformer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.errors import InputError
from unlabeled.export.models import ServedEncoder
from unlabeled.export.onnx import OnnxModel, onnx_bytes
from unlabeled.export.parity import torch_outputs
from unlabeled.nets.encoder import Encoder, average_pool
from unlabeled.nets.vit import VisionTransformer


def vit(shape: tuple[int, int, int] = (1, 28, 28)) -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(shape, dim=24, depth=2).eval()
    # Weights of a trained net's size: at their initial one, attention is near uniform.
    for block in net.blocks:
        torch.nn.init.normal_(block.attention.qkv.weight, std=0.3)
    return net


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "patch", "tokens"),
    [(8, 2, 16), (24, 2, 144), (28, 4, 49), (33, 4, 81), (64, 8, 64), (96, 8, 144)],
)
def test_the_patch_fits_the_image(size: int, patch: int, tokens: int) -> None:
    net = vit((3, size, size))
    cls, maps = net(images(2, 3, size, size))
    assert net.patch == patch and cls.shape == (2, 24) and maps.shape[2] * maps.shape[3] == tokens
    assert net.positions[0].numel() == tokens


def test_positions_are_their_own_interpolation_at_the_trained_size() -> None:
    net = vit()
    assert net.positions_at(7, 7) is net.positions
    # The interpolation itself, not only the way around it, is the identity there, and torch's elsewhere.
    for size in ((7, 8), (3, 7), (14, 5)):
        expected = F.interpolate(net.positions[None], size, mode="bicubic")[0]
        torch.testing.assert_close(net.positions_at(*size), expected)


def test_interpolated_positions_pass_their_gradient_on() -> None:
    net = vit()
    net.positions_at(3, 3).sum().backward()
    assert net.positions.grad is not None
    torch.testing.assert_close(net.positions.grad.sum(), torch.tensor(9.0 * 24))


def test_without_positions_a_permutation_of_patches_permutes_the_map() -> None:
    net = vit()
    torch.nn.init.zeros_(net.positions)
    x = images(2, 1, 28, 28)
    order = torch.randperm(49, generator=torch.Generator().manual_seed(2))
    patches = F.unfold(x, 4, stride=4)
    cls, maps = net(x)
    moved_cls, moved = net(F.fold(patches[..., order], (28, 28), 4, stride=4))
    torch.testing.assert_close(moved_cls, cls, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.flatten(2), maps.flatten(2)[..., order], atol=1e-4, rtol=1e-4)
    torch.nn.init.normal_(net.positions)
    with_positions = net(F.fold(patches[..., order], (28, 28), 4, stride=4))[0]
    assert (with_positions - net(x)[0]).abs().max() > 1e-2


def test_attention_rows_sum_to_one_and_mix_the_values() -> None:
    attention = vit().blocks[0].attention
    tokens = images(2, 10, 24)
    weights = attention.weights(tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 10))
    values = attention.queries_keys_values(tokens)[2]
    mixed = attention.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens), mixed, atol=1e-5, rtol=1e-5)


def test_the_attention_map_is_the_image_tokens_row_less_itself() -> None:
    net = vit()
    x = images(2, 1, 28, 20)
    maps = net.attention(x)
    assert maps.shape == (2, 3, 7, 5)
    tokens = net.blocks[0](net.embed(x)[0])
    last = net.blocks[1]
    weights = last.attention.weights(last.norm1(tokens))
    torch.testing.assert_close(maps.sum((2, 3)), 1 - weights[:, :, 0, 0])
    # Row 2, column 1 of the map is the token after two rows of five and one: not the transposed one.
    torch.testing.assert_close(maps[:, :, 2, 1], weights[:, :, 0, 1 + 2 * 5 + 1])


def test_an_image_of_no_whole_patches_is_filled_up_with_the_mean() -> None:
    net = vit()
    x = images(2, 1, 27, 26)
    torch.testing.assert_close(net(x), net(F.pad(x, (0, 2, 0, 1))))


def test_the_encoder_joins_the_image_token_with_the_pooled_map() -> None:
    encoder = Encoder("tiny_vit", 8, 2, (3, 33, 33), 0.3, 0.2).eval()
    x = torch.rand(2, 3, 33, 33)
    features, maps = encoder(x), encoder.feature_map(x)
    assert encoder.map_channels == 24 and maps.shape == (2, 24, 9, 9)
    assert features.shape == (2, encoder.feature_dim) == (2, 24 * 5)
    torch.testing.assert_close(features[:, 24:], average_pool(maps, 2).flatten(1))
    torch.testing.assert_close(features[:, :24], encoder.net((x - 0.3) / 0.2)[0])
    # Other sizes than it was built for: the small crops of DINO.
    assert encoder(x[..., :16, :16]).shape == features.shape


def test_the_width_of_64_is_the_tiny_vit_of_192() -> None:
    net = Encoder("tiny_vit", 64, 2, (1, 28, 28), 0.3, 0.2).net
    assert net.dim == 192 and len(net.blocks) == 6 and net.blocks[0].attention.heads == 3


def test_an_unknown_encoder_names_the_valid_ones() -> None:
    with pytest.raises(InputError, match="tiny_vit"):
        Encoder("tiny_vitt", 8, 2, (1, 8, 8), 0.3, 0.2)


@pytest.mark.parametrize("shape", [(3, 33, 33), pytest.param((1, 8, 8), marks=pytest.mark.slow)])
def test_onnx_equals_torch(shape: tuple[int, int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder("tiny_vit", 4, 2, shape, 0.3, 0.2)
    encoder.net.blocks = encoder.net.blocks[:2]  # Exporting takes seconds per block.
    served = ServedEncoder(encoder).eval()
    (tmp_path / "model.onnx").write_bytes(onnx_bytes(served))
    model = OnnxModel(tmp_path / "model.onnx", threads=1)
    for size in (shape, (shape[0], 21, 50)):
        pixels = np.random.default_rng(0).integers(0, 256, (5, *size)).astype(np.uint8)
        assert np.abs(torch_outputs(served, pixels) - model(pixels)).max() < 1e-5
