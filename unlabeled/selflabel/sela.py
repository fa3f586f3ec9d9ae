"""SeLa: labels by balanced optimal transport, heads that learn them, in turn (Asano et al. 2020)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled import progress
from unlabeled.features import accelerator
from unlabeled.parameters import SelfLabel
from unlabeled.selflabel.kmeans import fit_kmeans
from unlabeled.sinkhorn import assign

# λ of the paper's ImageNet runs.
SHARPNESS = 25.0
IMAGES, START_IMAGES = 20_000, 5_000
EPOCHS, BATCH, RATE = 10, 512, 1e-2
# Features that a look at an image shows, on average: what a random crop is to an image.
SHOWN = 25


def fit_sela(
    z: np.ndarray, k: int, parameters: SelfLabel, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Fit linear heads to their own balanced labels, which are assigned anew before each pass over the images.

    Two things differ from the paper, where the net below the heads learns too. Random first labels would
    stay: in hundreds of dimensions a linear head learns nearly any labels (Fashion-MNIST: accuracy 0.33
    instead of 0.66). So each head starts as k-means on images of its own. And the views are made of
    features, of which a look shows 25: a label has to follow from any few of them.

    The head of lowest loss is kept, the one whose labels the features tell best (Fashion-MNIST, two encoders,
    five fits of 20 heads: 0.66, where the heads' mean is 0.63 and the best one's 0.70).

    Equal clusters are all that keeps the images from having one label. Of classes of very unequal size they
    split the large ones and join the small ones.

    Args:
        z: standardised features, float32 (N, D), N at least `k`; beyond 20,000 images the heads are trained
            on as many random ones.
        parameters: `heads` and k-means' `iterations` count.

    Returns:
        weight, float32 (K, D), and bias, float32 (K,), of the kept head's logits, whose largest entries are
        its balanced labels; each head's loss over the last pass, in nats, and the kept one's.
    """
    rng, device = np.random.default_rng(seed), accelerator()
    z = z[np.sort(rng.choice(len(z), min(len(z), IMAGES), replace=False))]
    generator = torch.Generator(device).manual_seed(seed)
    images, share = torch.from_numpy(z).to(device), min(1.0, SHOWN / z.shape[1])
    weight, bias = (part.to(device).requires_grad_() for part in starts(z, k, parameters, seed))
    optimizer = torch.optim.Adam([weight, bias], RATE)
    labels = torch.empty(len(z), parameters.heads, dtype=torch.int64, device=device)
    potentials: list[Tensor | None] = [None] * parameters.heads
    losses = torch.zeros(parameters.heads, device=device)

    def reassign(head: int) -> Tensor:
        with torch.no_grad():
            logits = torch.addmm(bias[head], images, weight[head].T)
        labels[:, head], found = assign(logits, SHARPNESS, potentials[head])
        potentials[head] = found
        return found

    for epoch in range(EPOCHS):
        for head in range(parameters.heads):
            reassign(head)
        losses.zero_()
        batches = torch.randperm(len(z), generator=generator, device=device).split(BATCH)
        for number, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - (epoch + number / len(batches)) / EPOCHS)
            seen = torch.empty(len(batch), z.shape[1], device=device).bernoulli_(share, generator=generator)
            logits = torch.einsum("nd,hkd->nkh", seen * images[batch] / share, weight) + bias.T
            loss = F.cross_entropy(logits, labels[batch], reduction="none").sum(0)
            optimizer.zero_grad()
            (loss.sum() / len(batch)).backward()
            optimizer.step()
            losses += loss.detach() / len(z)
        progress.report(epoch + 1, EPOCHS, "passes", loss=float(losses.min()))
    kept = int(losses.argmin())
    balanced = bias[kept] + reassign(kept) / SHARPNESS
    values = {"loss": float(losses[kept]), "head_losses": losses.tolist()}
    return weight[kept].detach().cpu().numpy(), balanced.detach().float().cpu().numpy(), values


def starts(z: np.ndarray, k: int, parameters: SelfLabel, seed: int) -> tuple[Tensor, Tensor]:
    """Return the heads' first weights (H, K, D) and biases (H, K): k-means, each on images of its own, 5,000 or K."""
    rng, once = np.random.default_rng(seed), parameters.model_copy(update={"restarts": 1})
    heads = []
    for head in range(parameters.heads):
        drawn = z[rng.choice(len(z), min(len(z), max(START_IMAGES, k)), replace=False)]
        heads.append(fit_kmeans(drawn, k, once, seed + head)[:2])
    weights, biases = zip(*heads, strict=True)
    return torch.from_numpy(np.stack(weights)), torch.from_numpy(np.stack(biases))
