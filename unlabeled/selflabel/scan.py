"""SCAN: an image and its neighbours fall into one cluster, and every cluster is used (Van Gansbeke et al. 2020)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled import progress
from unlabeled.data.batches import evenly_spread
from unlabeled.features import accelerator
from unlabeled.parameters import SelfLabel
from unlabeled.selflabel.consensus import consensus
from unlabeled.selflabel.neighbours import mine_neighbours, principal_axes

AXES = 128
JUDGED_IMAGES = 20_000


def scan_loss(anchors: Tensor, neighbours: Tensor, entropy_weight: float) -> Tensor:
    """Return -mean log <p, p'> + entropy_weight * sum_c mean(p)_c log mean(p)_c, of each head: float (H,).

    The mean over images in the second term, which keeps all clusters in use, is taken of the anchors alone.

    Args:
        anchors, neighbours: logits, float (B, H, K), of images and of a neighbour of each.
        entropy_weight: lambda.
    """
    log_p, log_q = F.log_softmax(anchors, -1), F.log_softmax(neighbours, -1)
    agreement = torch.logsumexp(log_p + log_q, -1).mean(0)
    # A cluster that no image falls into has the limit of x log x, 0, and no gradient.
    usage = log_p.exp().mean(0).clamp(min=1e-12)
    return entropy_weight * (usage * usage.log()).sum(-1) - agreement


def fit_scan(
    z: np.ndarray, k: int, parameters: SelfLabel, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Fit SCAN's clustering heads on frozen features and return their consensus.

    Args:
        z: standardised features, float32 (N, D), N at least 2.

    Returns:
        weight, float32 (K, D), and bias, float32 (K,), of the logits; of each head its loss and the share of
        images on which it agrees with the head of lowest loss.
    """
    weights, biases, assignments, losses = fit_heads(z, k, parameters, seed)
    weight, bias, agreements = consensus(weights, biases, assignments, losses)
    return weight, bias, {"head_losses": losses.tolist(), "head_agreements": agreements.tolist()}


def fit_heads(
    z: np.ndarray, k: int, parameters: SelfLabel, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mine neighbours, train heads on them, and judge each by its loss.

    Both on the first 128 principal components: exact there, at a third of the cost. A small set has fewer
    neighbours, at most half of what a cluster of average size holds.

    Returns:
        Weights, float32 (H, K, D), and biases, float32 (H, K), on `z`; clusters of the images, int64 (N, H);
        losses, float64 (H,).
    """
    features = torch.from_numpy(z).to(accelerator())
    axes = principal_axes(features, AXES)
    x = features @ axes
    neighbours = mine_neighbours(x, max(1, min(parameters.neighbours, len(x) // (2 * k))))
    weight, bias = train_heads(x, neighbours, k, parameters, seed)
    assignments = torch.stack([(x @ w.T + b).argmax(1) for w, b in zip(weight, bias)], 1)
    losses = head_losses(x, neighbours, weight, bias, parameters.entropy_weight)
    return (weight @ axes.T).cpu().numpy(), bias.cpu().numpy(), assignments.cpu().numpy(), losses


def train_heads(
    x: Tensor, neighbours: Tensor, k: int, parameters: SelfLabel, seed: int
) -> tuple[Tensor, Tensor]:
    """Train independent linear heads at once on features (N, D): weight (H, K, D) and bias (H, K).

    Adam from small weights, at a rate that falls linearly from one high enough to leave poor optima: with a
    tenth of it, far fewer heads reach the lowest losses.

    Args:
        neighbours: int64 (N, n), as `mine_neighbours` gives them.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, batch = parameters.heads, min(parameters.batch_size, len(x))
    weight = torch.randn(x.shape[1], heads * k, generator=generator) * (0.1 / x.shape[1] ** 0.5)
    weight = weight.to(x.device).requires_grad_()
    bias = torch.zeros(heads * k, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], parameters.learning_rate, betas=(0.9, 0.99), fused=True)
    for step in range(parameters.steps):
        optimizer.param_groups[0]["lr"] = parameters.learning_rate * (1 - step / parameters.steps)
        anchors = torch.randint(len(x), (batch,), generator=generator)
        drawn = neighbours[anchors, torch.randint(neighbours.shape[1], (batch,), generator=generator)]
        logits = x[torch.cat((anchors.to(x.device), drawn))] @ weight + bias
        own, partners = logits.view(2, batch, heads, k)
        loss = scan_loss(own, partners, parameters.entropy_weight)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        progress.report(step + 1, parameters.steps, f"steps, {heads} heads", loss=loss.min().item())
    return weight.detach().T.reshape(heads, k, -1), bias.detach().view(heads, k)


@torch.no_grad()
def head_losses(
    x: Tensor, neighbours: Tensor, weight: Tensor, bias: Tensor, entropy_weight: float
) -> np.ndarray:
    """Return SCAN's loss of each head over all neighbours of 20,000 evenly spread images: float64 (H,)."""
    judged = torch.from_numpy(evenly_spread(np.arange(len(x)), JUDGED_IMAGES)).to(x.device)
    losses = []
    for w, b in zip(weight, bias):
        logits = (x @ w.T + b).unsqueeze(1)
        parts = [scan_loss(logits[judged], logits[column], entropy_weight) for column in neighbours[judged].T]
        losses.append(torch.cat(parts).double().mean().item())
    return np.array(losses)
