"""A small Vision Transformer: patches as tokens, and a token for the whole image (Dosovitskiy et al. 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention of tokens (B, T, dim), with several heads (Vaswani et al. 2017)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def queries_keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, heads, T, dim / heads)."""
        joined = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return joined[0], joined[1], joined[2]

    def weights(self, tokens: Tensor) -> Tensor:
        """Return how much each token takes from each, (B, heads, T, T); rows sum to 1."""
        queries, keys, _ = self.queries_keys_values(tokens)
        return (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.queries_keys_values(tokens))
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each behind its layer norm and beside a residual (pre-norm)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """A pre-norm Vision Transformer with learned positions; images of any size, also of no whole patches.

    Attributes:
        patch: side of a patch, pixels: the smallest power of two that leaves at most 12 x 12 of them.
        dim: numbers in a token.
        positions: (dim, h, w), one for each patch of the images that it is built for.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], dim: int = 192, depth: int = 6, heads: int = 3
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.dim = dim
        self.patch = 2
        while self.patch * 12 < max(height, width):
            self.patch *= 2
        self.patches = nn.Conv2d(channels, dim, self.patch, self.patch)
        self.cls = nn.Parameter(torch.empty(dim))
        self.positions = nn.Parameter(torch.empty(dim, -(-height // self.patch), -(-width // self.patch)))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for weight in (self.cls, self.positions, *(layer.weight for layer in linear)):
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in linear:
            nn.init.zeros_(layer.bias)

    def positions_at(self, rows: int, columns: int) -> Tensor:
        """Return the positions of a map of another size, (dim, rows, columns), interpolated (bicubic)."""
        height, width = self.positions.shape[1:]
        if (rows, columns) == (height, width):
            return self.positions
        # Bicubic interpolation is separable. As matrix products its gradient is deterministic on a GPU.
        vertical, horizontal = (
            _bicubic(self.positions, height, rows),
            _bicubic(self.positions, width, columns),
        )
        return vertical @ self.positions @ horizontal.T

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens before the first block, (B, 1 + h w, dim), the whole image's first; and (h, w)."""
        rows, columns = images.shape[-2:]
        # Normalised images have mean 0: what is missing of the last patches is of the mean colour.
        maps = self.patches(F.pad(images, (0, -columns % self.patch, 0, -rows % self.patch)))
        size = maps.shape[2], maps.shape[3]
        tokens = (maps + self.positions_at(*size)).flatten(2).mT
        # `len` would fix the batch in an exported graph.
        return torch.cat((self.cls.expand(tokens.shape[0], 1, -1), tokens), 1), size

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the token of the whole image, (B, dim), and the map of the patches' tokens, (B, dim, h, w).

        Args:
            images: normalised float (B, C, H, W).
        """
        tokens, size = self.embed(images)
        tokens = self.norm(self.blocks(tokens))
        return tokens[:, 0], tokens[:, 1:].mT.unflatten(2, size)

    def attention(self, images: Tensor) -> Tensor:
        """Return what the whole image's token takes from each patch in the last block, (B, heads, h, w).

        Each map sums to 1 less what the token takes from itself.
        """
        tokens, size = self.embed(images)
        tokens = self.blocks[:-1](tokens)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attention.weights(last.norm1(tokens))[:, :, 0, 1:].unflatten(2, size)


def _bicubic(like: Tensor, n: int, size: int) -> Tensor:
    """Return the weights (size, n) that bring n positions to `size`."""
    each = torch.eye(n, dtype=like.dtype, device=like.device).view(1, n, n, 1)
    return F.interpolate(each, (size, 1), mode="bicubic")[0, :, :, 0].T
