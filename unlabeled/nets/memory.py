"""A memory of the train images: what a net made of each when it last saw it, to compare a batch with all."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.distributed import gather


class MemoryBank(nn.Module):
    """A vector for each train image, of length 1 once the image was seen, 0 before.

    Takes 4 · count · dim bytes on every process and in every checkpoint: 31 MB for 60,000 images.

    Args:
        count: number of train images.
        dim: D, numbers per image.
        momentum: weight of what is remembered when an image is seen again; 0: only the last time counts.
    """

    def __init__(self, count: int, dim: int, momentum: float) -> None:
        super().__init__()
        # No buffer: DistributedDataParallel sends every buffer to all processes at every step.
        self.vectors = nn.Parameter(torch.zeros(count, dim), requires_grad=False)
        self.momentum = momentum
        self._seen: tuple[Tensor, Tensor] | None = None

    def recall(self, indices: Tensor, look: Callable[[], Tensor]) -> Tensor:
        """Return what is remembered of images, float (B, D); of one never seen, what `look` makes of it now.

        Random vectors in its place (Wu et al. 2018) would make the first epoch learn noise.

        Args:
            indices: int64 (B,), the images' numbers.
            look: returns embeddings (B, D) of another view of the batch.
        """
        remembered = self.vectors[indices]
        new = ~remembered.any(1)
        # All processes look where one must: their batch norm may be shared.
        if gather(new).any():
            with torch.no_grad():
                remembered = torch.where(new.unsqueeze(1), F.normalize(look().float(), dim=1), remembered)
        return remembered

    def draw(self, count: int) -> Tensor:
        """Return the numbers of `count` random images, int64 (K,), those of all where there are no more.

        All processes get the same ones, so that their losses average to that of the joined batch.
        """
        images, device = len(self.vectors), self.vectors.device
        if images <= count:
            return torch.arange(images, device=device)
        return gather(torch.randint(images, (count,), device=device))[:count]

    def negatives(self, indices: Tensor, own: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return what to tell a batch's images from: each other, and others that were seen before.

        Early on few images are in the memory, and nearly nothing but the batch is there to differ from.

        Args:
            indices: int64 (B,), the images' numbers.
            own: what is remembered of them, (B, D), as `recall` returns it.
            count: K, images drawn from the memory.

        Returns:
            Vectors (K + P · B, D), P processes, and bool (B, K + P · B): true where one is no negative, as the own
            image, one never seen, or one of the batch, which is there already.
        """
        drawn, batch = self.draw(count), gather(indices)
        vectors = self.vectors[drawn]
        none = torch.isin(drawn, batch) | ~vectors.any(1)
        same = torch.cat((none.expand(len(indices), -1), indices.unsqueeze(1) == batch), 1)
        return torch.cat((vectors, gather(own))), same

    def remember(self, indices: Tensor, embeddings: Tensor) -> None:
        """Keep embeddings (B, D) of a batch for `update`, which comes after the optimizer's step."""
        self._seen = indices, F.normalize(embeddings.detach().float(), dim=1)

    @torch.no_grad()
    def update(self) -> None:
        """Write what all processes kept: v becomes momentum · v + (1 - momentum) · z, at length 1."""
        if self._seen is None:
            return
        indices, embeddings = (gather(part) for part in self._seen)
        mixed = torch.lerp(embeddings, self.vectors[indices], self.momentum)
        self.vectors[indices] = F.normalize(mixed, dim=1)
        self._seen = None


def memory_logits(z: Tensor, own: Tensor, others: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Return instance discrimination as a classification over remembered images (Wu et al. 2018, equation 2).

    With all images as the others it is the softmax over the whole memory.

    Args:
        z: embeddings (B, D) of any length.
        own: what is remembered of each one's image, (B, D).
        others: what is remembered of images to tell it from, (K, D).
        same: bool (B, K), true where one of the others is no negative: the own image.

    Returns:
        Cosine similarities over temperature, float (B, 1 + K): the own image first, -inf where it comes again.
    """
    z = F.normalize(z, dim=1)
    positive = (z * own).sum(1, keepdim=True)
    negative = (z @ others.T).masked_fill(same, float("-inf"))
    return torch.cat((positive, negative), 1) / temperature


def memory_nce(
    z: Tensor, own: Tensor, others: Tensor, same: Tensor, temperature: float = 0.07
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of `memory_logits`, a mean over the batch, and the share of right answers."""
    logits = memory_logits(z, own, others, same, temperature)
    right = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return F.cross_entropy(logits, right), (logits.detach().argmax(1) == right).float().mean()
