"""How long a request takes."""

import time
from collections.abc import Callable, Sequence

import numpy as np


def milliseconds(
    infer: Callable[[np.ndarray], np.ndarray], shape: Sequence[int], requests: int, warm_up: int = 0
) -> np.ndarray:
    """Return the milliseconds of requests with random images, one at a time, float64 (requests,).

    Each request has other images: a response cache would answer the same ones without the model.

    Args:
        infer: sends a request and waits for its answer.
        shape: (B, C, H, W) of a request's images, uint8.
        warm_up: requests before them that are not counted.
    """
    random, times = np.random.default_rng(), np.empty(warm_up + requests)
    for number in range(len(times)):
        images = random.integers(0, 256, shape, np.uint8)
        started = time.perf_counter()
        infer(images)
        times[number] = time.perf_counter() - started
    return 1e3 * times[warm_up:]
