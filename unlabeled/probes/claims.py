"""What the ablation's cells say: the grid, its noise, and the paper's claims answered (Chen et al. 2020, section 3)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

# Linear accuracy on ImageNet, per cent: row the first transform, column the second (figure 5).
PUBLISHED = {
    "crop": (33.1, 33.9, 56.3, 46.0, 39.9, 35.0, 30.2),
    "cutout": (32.2, 25.6, 33.9, 40.0, 26.5, 25.2, 22.4),
    "color": (55.8, 35.5, 18.8, 21.0, 11.4, 16.5, 20.8),
    "sobel": (46.2, 40.6, 20.9, 4.0, 9.3, 6.2, 4.2),
    "noise": (38.8, 25.8, 7.5, 7.6, 9.8, 9.8, 9.6),
    "blur": (35.1, 25.2, 16.6, 5.8, 9.7, 2.6, 6.7),
    "rotate": (30.0, 22.5, 20.7, 4.3, 9.7, 6.5, 2.6),
}
CONFIDENCE = 0.95
# Seeds that agree by luck do not make measurements exact.
LEAST_NOISE = 1e-3


def summarise(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the cells of `unlabeled.probes.ablation.measure` say together.

    The accuracies are measured ones, so the best of many is flattered by the choice; a cell is its mean over seeds.

    Returns:
        - transforms: T names, in the order of the grid.
        - linear, contrastive_accuracy: T rows of T cells; row the first transform, column the second, the diagonal
          one alone. row_means: of linear.
        - untrained: linear accuracy of the untrained net.
        - noise: std of one measurement over seeds, degrees_of_freedom, and seeds (that a cell is the mean of).
        - claims: no_single_suffices, best_pair, order_matters, contrastive_accuracy_misleads. Each has `answer`
          (yes, no, or unclear where the noise allows both) and the numbers it rests on; `standard_errors`: the
          difference over its standard error.
        - published: Spearman's rho of the grid and the paper's; None where all cells are equal.
    """
    measured: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        measured[tuple(cell["transforms"])].append(cell)
    names = [name for name in PUBLISHED if (name,) in measured]
    seeds = min(len(some) for some in measured.values())

    def mean(key: str, *transforms: str) -> float:
        # A cell that was repeated for the noise alone counts with the seeds that all cells have.
        return float(np.mean([cell[key] for cell in measured[transforms][:seeds]]))

    def matrix(key: str) -> np.ndarray:
        return np.array([[mean(key, *dict.fromkeys((a, b))) for b in names] for a in names])

    linear, contrastive = matrix("linear"), matrix("contrastive_accuracy")
    noise, freedom = _noise(measured, "linear")
    error = noise / seeds**0.5
    contrastive_error = _noise(measured, "contrastive_accuracy")[0] / seeds**0.5
    return {
        "transforms": names,
        "linear": linear.tolist(),
        "contrastive_accuracy": contrastive.tolist(),
        "row_means": linear.mean(1).tolist(),
        "untrained": mean("linear"),
        "noise": {"std": noise, "degrees_of_freedom": freedom, "seeds": seeds},
        "claims": {
            "no_single_suffices": _no_single_suffices(names, linear, error, freedom),
            "best_pair": _best_pair(names, linear, error, freedom),
            "order_matters": _order_matters(names, linear, error, freedom),
            "contrastive_accuracy_misleads": _contrastive_accuracy_misleads(
                linear, contrastive, contrastive_error, freedom
            ),
        },
        "published": _published(names, linear),
    }


def _noise(measured: Mapping[tuple[str, ...], Sequence[Mapping[str, Any]]], key: str) -> tuple[float, int]:
    """Return the standard deviation over seeds, pooled over the trained cells, and its degrees of freedom."""
    repeated = [[cell[key] for cell in some] for names, some in measured.items() if names and len(some) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    squares = sum(np.var(values) * len(values) for values in repeated)
    return max(LEAST_NOISE, float(np.sqrt(squares / freedom))), freedom


def _answer(standard_errors: float, freedom: int, candidates: int = 1, rivals: int = 1) -> str:
    """Return yes or no where a two-sided t test tells a difference from 0, else unclear.

    The difference is that of the best of some candidates from the best of some rivals. Who is the best of many is
    so by luck too, and asks for more to win (Bonferroni): candidates for a yes, rivals for a no.
    """
    error = (1 - CONFIDENCE) / 2
    if standard_errors >= stats.t.isf(error / candidates, freedom):
        return "yes"
    return "no" if standard_errors <= -stats.t.isf(error / rivals, freedom) else "unclear"


def _no_single_suffices(
    names: Sequence[str], linear: np.ndarray, error: float, freedom: int
) -> dict[str, Any]:
    """Compare the best of all pairs, each order a pair of its own, with the best of the transforms alone."""
    singles = len(names)
    single = int(linear.diagonal().argmax())
    first, second = _best_of(linear - np.diag(np.full(len(names), np.inf)))
    difference = linear[first, second] - linear[single, single]
    standard_errors = difference / (error * 2**0.5)
    return {
        "answer": _answer(standard_errors, freedom, candidates=singles * (singles - 1), rivals=singles),
        "single": names[single],
        "single_linear": float(linear[single, single]),
        "pair": [names[first], names[second]],
        "pair_linear": float(linear[first, second]),
        "difference": float(difference),
        "standard_errors": float(standard_errors),
    }


def _best_of(values: np.ndarray) -> tuple[int, int]:
    row, column = np.unravel_index(values.argmax(), values.shape)
    return int(row), int(column)


def _best_pair(names: Sequence[str], linear: np.ndarray, error: float, freedom: int) -> dict[str, Any]:
    """Rank the pairs, each the mean of its two orders: is crop with color the best of them, as in the paper?"""
    both = {
        (a, b): float(linear[i, j] + linear[j, i]) / 2 for (i, a), (j, b) in combinations(enumerate(names), 2)
    }
    ranking = sorted(both, key=lambda pair: -both[pair])
    claimed = ("crop", "color")
    result: dict[str, Any] = {
        "answer": "unclear",
        "ranking": [{"pair": list(pair), "linear": both[pair]} for pair in ranking],
    }
    rivals = [pair for pair in ranking if pair != claimed]
    if claimed in both and rivals:
        # The error of a mean of two orders is error / √2, of a difference of two such means it is error.
        difference = both[claimed] - both[rivals[0]]
        result |= {
            "answer": _answer(difference / error, freedom, rivals=len(rivals)),
            "difference": difference,
            "standard_errors": difference / error,
        }
    return result


def _order_matters(names: Sequence[str], linear: np.ndarray, error: float, freedom: int) -> dict[str, Any]:
    """Compare the spread between the two orders of a pair with the noise, by an F test."""
    first, second = np.triu_indices(len(names), 1)
    differences = linear[first, second] - linear[second, first]
    spread = float(np.sqrt(np.mean(differences**2) / 2))
    p_value = float(stats.f.sf((spread / error) ** 2, len(differences), freedom))
    largest = int(np.abs(differences).argmax())
    order = [names[first[largest]], names[second[largest]]]
    return {
        "answer": "yes" if p_value < 1 - CONFIDENCE else "unclear",
        "spread": spread,
        "p_value": p_value,
        "largest": order if differences[largest] > 0 else order[::-1],
        "largest_difference": float(abs(differences[largest])),
    }


def _contrastive_accuracy_misleads(
    linear: np.ndarray, contrastive: np.ndarray, error: float, freedom: int
) -> dict[str, Any]:
    """Compare the contrastive accuracy of the half of the cells with the worse features with the others'."""
    order = linear.ravel().argsort()
    worse, better = (
        contrastive.ravel()[order[: len(order) // 2]],
        contrastive.ravel()[order[len(order) // 2 :]],
    )
    # Two orders of a pair are two measurements, one transform alone is one.
    standard_errors = (worse.mean() - better.mean()) / (error * (1 / len(worse) + 1 / len(better)) ** 0.5)
    return {
        "answer": _answer(standard_errors, freedom),
        "standard_errors": float(standard_errors),
        "worse_half": float(worse.mean()),
        "better_half": float(better.mean()),
        "correlation": _rank_correlation(linear, contrastive),
    }


def _published(names: Sequence[str], linear: np.ndarray) -> float | None:
    """Return the rank correlation of the grid with the paper's."""
    columns = [list(PUBLISHED).index(name) for name in names]
    theirs = np.array([[PUBLISHED[name][column] for column in columns] for name in names])
    return _rank_correlation(theirs, linear)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's rho over all cells; None where all cells of one are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a.ravel(), b.ravel()).statistic)


def sentences(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each claim in words: what the paper claims, the answer, and the numbers that it rests on."""
    claims, noise = summary["claims"], summary["noise"]
    single, pair = claims["no_single_suffices"], claims["best_pair"]
    order, misleads = claims["order_matters"], claims["contrastive_accuracy_misleads"]
    found = [
        (
            "No single transform suffices",
            single["answer"],
            f"The best pair, {' then '.join(single['pair'])}, gives {single['pair_linear']:.1%}; the best one alone, "
            f"{single['single']}, {single['single_linear']:.1%}: {100 * single['difference']:+.1f} points, "
            f"{single['standard_errors']:+.1f} standard errors.",
        ),
        (
            "Crop with color is the best pair",
            pair["answer"],
            "Means of both orders: "
            + ", ".join(f"{' + '.join(entry['pair'])} {entry['linear']:.1%}" for entry in pair["ranking"][:3])
            + (
                f"; crop + color against the best other: {100 * pair['difference']:+.1f} points, "
                f"{pair['standard_errors']:+.1f} standard errors."
                if "difference" in pair
                else "."
            ),
        ),
        (
            "The order of two transforms matters",
            order["answer"],
            f"The two orders of a pair spread by {100 * order['spread']:.2f} points, seeds by "
            f"{100 * noise['std'] / noise['seeds'] ** 0.5:.2f} (F test: p = {order['p_value']:.2g}); the largest "
            f"difference is {100 * order['largest_difference']:.1f} points, for {' then '.join(order['largest'])}.",
        ),
        (
            "The contrastive accuracy stays high where the features are bad",
            misleads["answer"],
            f"It is {misleads['worse_half']:.1%} in the half of the cells with the worse features and "
            f"{misleads['better_half']:.1%} in the other"
            + (
                "."
                if misleads["correlation"] is None
                else f"; rank correlation with the linear accuracy {misleads['correlation']:+.2f}."
            ),
        ),
    ]
    return found
