"""Learning rate over a run, as a pure function of the step: nothing to save, nothing to restore."""

import math
from typing import Literal


def learning_rate_share(
    step: int,
    steps: int,
    schedule: Literal["cosine", "linear", "constant"],
    warmup_share: float,
    cooldown_share: float,
) -> float:
    """Return the share of the peak learning rate at a step (0 to steps - 1), in (0, 1].

    It rises linearly over the first `warmup_share` of the steps and reaches 1 at their end. Then `cosine`
    falls over all that is left (Loshchilov & Hutter 2017), `linear` stays and falls over the last
    `cooldown_share`, `constant` stays. The last step is one step's fall above 0, so that no step is spent
    at rate 0.
    """
    warmup = round(warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    if schedule == "linear":
        cooldown = min(round(cooldown_share * steps), steps - warmup)
        return min(1.0, (steps - step) / (cooldown + 1))
    return 1.0
