"""Stratified subsets of labelled images: nested, and the same for every method."""

import numpy as np


def stratified_order(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return, for each class, the positions of its images in a random order that `seed` decides."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def label_subset(labels: np.ndarray, share: float, seed: int, least: int = 4) -> np.ndarray:
    """Return sorted positions of a stratified share of the images, int64.

    Every class gives the share of its images (rounded), but `least` of them if it has as many. With the same
    seed a smaller share is a subset of a larger one.

    Args:
        labels: int (N,).
        share: above 0, up to 1.
    """
    chosen = [order[: max(least, round(share * len(order)))] for order in stratified_order(labels, seed)]
    return np.sort(np.concatenate(chosen))


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into those to fit on and a stratified share held out, both sorted int64.

    A class gives at least one image (rounded up), and keeps at least one to fit on: a class of one gives
    none, so nothing may be held out of a tiny set.
    """
    given = [
        order[: min(int(np.ceil(share * len(order))), len(order) - 1)]
        for order in stratified_order(labels, seed)
    ]
    held_out = np.sort(np.concatenate([np.empty(0, np.int64), *given]))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
