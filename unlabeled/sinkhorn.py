"""Balanced assignment by entropic optimal transport: every cluster gets equally many images."""

import torch
from torch import Tensor

from unlabeled.distributed import gather

ITERATIONS = 100
HALVINGS = 20
# Of labels, which are whole images: finer balance than theirs is not worth a pass.
LABEL_TOLERANCE = 1e-3


def balance(scores: Tensor, tolerance: float = 1e-9, start: Tensor | None = None) -> Tensor:
    """Return the potentials v (K,) for which softmax(scores + v) uses all clusters equally.

    softmax(scores + v) / N is what Sinkhorn-Knopp (Cuturi 2013) converges to: of all plans Q of N images and
    K clusters with rows of 1/N and columns of 1/K the one that maximises <Q, scores> + entropy(Q). The
    softmax keeps the rows; the columns are kept at the minimum of the smooth convex

        mean_n logsumexp_k(scores_nk + v_k) - mean_k v_k,

    whose gradient is the error of the columns. Scaling rows and columns in turn is coordinate descent on it,
    thousands of passes where the scores are sharp; Newton's method (Brauer et al. 2017) comes to the same
    plan in about ten. A pass takes N·K² operations: for K up to some hundreds.

    Args:
        scores: (N, K), of any real dtype, worked on in float64; λ log p in SeLa (Asano et al. 2020), where λ
            close to 0 gives the uniform plan and a large one all of an image to one cluster. Over several
            processes each gives its own images.
        tolerance: sum of |column - 1/K| to stop at; 100 steps are taken at the most.
        start: potentials (K,) of a similar problem.

    Returns:
        float64 (K,), of mean 0, the same on all processes.
    """
    scores = scores.double()
    k, images = scores.shape[1], _total(scores.new_tensor([len(scores)]))
    plan, identity = torch.empty_like(scores), torch.eye(k, dtype=scores.dtype, device=scores.device)

    def columns(v: Tensor) -> tuple[Tensor, Tensor]:
        """Write softmax(scores + v) into `plan`; return its columns' shares (K,) and the value to minimise."""
        torch.add(scores, v, out=plan)
        largest = plan.amax(1, keepdim=True)
        plan.sub_(largest).exp_()
        sums = plan.sum(1, keepdim=True)
        plan.div_(sums)
        means = _total(torch.cat((plan.sum(0), (sums.log() + largest).sum(0)))) / images
        return means[:-1], means[-1] - v.mean()

    v = scores.new_zeros(k) if start is None else start.double()
    shares, value = columns(v)
    for _ in range(ITERATIONS):
        gradient = shares - 1 / k
        error = gradient.abs().sum()
        if error <= tolerance:
            break
        hessian = shares.diag() - _total(plan.T @ plan) / images
        # A constant added to v changes nothing: 1/k gives that direction a curvature. The ridge gives one to
        # clusters that have no image yet.
        step = -torch.linalg.solve(hessian + 1 / k + (1e-3 * error / k + 1e-12) * identity, gradient)
        before, slope = value, gradient @ step
        for halving in range(HALVINGS):
            shares, value = columns(v + step / 2**halving)
            if value <= before + 1e-4 * slope / 2**halving:
                break
        v = v + step / 2**halving
    return v - v.mean()


def assign(logits: Tensor, sharpness: float, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return balanced labels of images, int64 (N,), and the potentials (K,) that they follow from.

    An image's label is the largest entry of its row of the plan. The plan's columns are equal, the counts of
    labels nearly so: the softer the plan, the less.

    Args:
        logits: (N, K); over several processes each gives its own images.
        sharpness: λ; larger values come closer to a plan of whole images, and take more passes.
        start: potentials of the last time.
    """
    scores = sharpness * logits.double().log_softmax(1)
    potentials = balance(scores, LABEL_TOLERANCE, start)
    return (scores + potentials).argmax(1), potentials


def _total(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    return gather(values.unsqueeze(0)).sum(0)
