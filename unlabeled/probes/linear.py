"""The linear probe: multinomial logistic regression on standardised frozen features."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from unlabeled import progress
from unlabeled.features import Standardisation

GRID = tuple(10.0**power for power in range(-4, 5))
TUNING_IMAGES = 10_000


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of plain features: the standardisation is folded into it.

    Attributes:
        weight: float32 (C, D).
        bias: float32 (C,).
        regularisation: scikit-learn's C, the inverse strength of the L2 penalty on the standardised weights.
    """

    weight: np.ndarray
    bias: np.ndarray
    regularisation: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the most probable class of features (N, D), int64 (N,)."""
        return (features @ self.weight.T + self.bias).argmax(1)


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    fit: np.ndarray,
    held_out: np.ndarray,
    iterations: int = 200,
    refit: bool = True,
) -> LinearProbe:
    """Fit a linear probe by L-BFGS, with the penalty that does best on the held-out part.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), 0 to classes - 1 at `fit` and `held_out`, with two different ones at `fit`.
        classes: number of classes; one without an image is never predicted.
        fit, held_out: disjoint positions in the N. With nothing held out C is 1.
        iterations: of L-BFGS per fit, at most.
        refit: the probe is fitted on both parts in the end; otherwise the held-out part stays unseen.
    """
    regularisation = choose_regularisation(features, labels, fit, held_out, iterations)
    chosen = np.union1d(fit, held_out) if refit else fit
    standardise = Standardisation(features[chosen])
    model = LogisticRegression(C=regularisation, max_iter=iterations, tol=1e-6)
    _fit(model, standardise(features[chosen]), labels[chosen])

    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        # scikit-learn gives the log odds of the second class: half of them for it, half against the first.
        coefficients, intercepts = (
            np.outer([-0.5, 0.5], coefficients),
            np.outer([-0.5, 0.5], intercepts)[:, 0],
        )
    # The logits of the known classes sum to 0: -30 never wins, and is finite where fine-tuning starts.
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, intercepts.min() - 30.0)
    weight[model.classes_], bias[model.classes_] = coefficients, intercepts
    weight /= standardise.scale
    bias -= weight @ standardise.mean
    return LinearProbe(weight.astype(np.float32), bias.astype(np.float32), regularisation)


def choose_regularisation(
    features: np.ndarray, labels: np.ndarray, fit: np.ndarray, held_out: np.ndarray, iterations: int
) -> float:
    """Return the C, of the powers of ten from 1e-4 to 1e4, with the lowest held-out cross-entropy.

    Cross-entropy, because accuracy on few images ties and jumps. Fitted on at most 20,000 images of the
    other part, from strong to weak penalty, each fit starting from the last; two values in a row that are not
    better than the best end the search.
    """
    if len(held_out) == 0:
        return 1.0
    fit = fit[:: max(1, len(fit) // TUNING_IMAGES)]
    standardise = Standardisation(features[fit])
    x, held_out_x = standardise(features[fit]), standardise(features[held_out])
    model = LogisticRegression(max_iter=iterations, warm_start=True)
    best, lowest, since = GRID[0], math.inf, 0
    for number, regularisation in enumerate(GRID, 1):
        model.C = regularisation
        _fit(model, x, labels[fit])
        right = model.classes_ == labels[held_out, None]
        cross_entropy = -float(np.log(model.predict_proba(held_out_x)[right].clip(1e-12)).mean())
        progress.report(number, len(GRID), "fits", cross_entropy=cross_entropy)
        since += 1
        if cross_entropy < lowest:
            best, lowest, since = regularisation, cross_entropy, 0
        if since == 2:
            break
    return best


def _fit(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> None:
    # On these narrow matrices threads of BLAS gain little, and where others use the cores they spin: 5 x slower.
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `iterations` is a budget
        model.fit(x, y)
