"""How long a request takes."""

import time
from collections.abc import Callable

import numpy as np


def milliseconds(
    infer: Callable[[np.ndarray], np.ndarray], images: np.ndarray, requests: int, warm_up: int = 0
) -> np.ndarray:
    """Return the milliseconds of requests with the same images, one at a time, float64 (requests,).

    Args:
        infer: sends a request and waits for its answer.
        images: uint8 (B, C, H, W).
        warm_up: requests before them that are not counted.
    """
    times = np.empty(warm_up + requests)
    for number in range(len(times)):
        started = time.perf_counter()
        infer(images)
        times[number] = time.perf_counter() - started
    return 1e3 * times[warm_up:]
