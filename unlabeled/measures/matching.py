"""Which of a batch's images lie together, by cosine similarity."""

from torch import Tensor
from torch.nn import functional as F


def nearest(features: Tensor, count: int) -> Tensor:
    """Return the others of the batch that lie nearest to each, nearest first.

    Args:
        features: float (B, D).
        count: how many; where the batch has fewer others, each comes last itself, again and again.

    Returns:
        Numbers of rows, int64 (B, count).
    """
    features = F.normalize(features.float(), dim=1)
    cosines = (features @ features.T).fill_diagonal_(-2)
    order = cosines.argsort(1, descending=True)[:, :count]
    return F.pad(order.float(), (0, count - order.shape[1]), "replicate").long()


def match_accuracy(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the share of the queries (B, D) that lie nearer to the key of their own row than to any other."""
    cosines = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T
    return (cosines.argmax(1) == cosines.new_tensor(range(len(cosines)))).float().mean()
