"""How the learning rate rises and falls: functions from a step to a factor on the highest rate.

Sources: warm-up and inverse square root: Vaswani et al. 2017, §5.3, scaled so that the peak is 1; cosine: Loshchilov &
Hutter 2017, "SGDR", §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minillm.errors import ConfigError

Schedule = Callable[[int], float]
"""Step (from 0) → factor in [0, 1]."""


def inverse_sqrt(warmup_steps: int) -> Schedule:
    """Linear to 1 at the end of the warm-up, then 1/√step."""
    if warmup_steps < 1:
        raise ConfigError(f"warmup_steps must be at least 1, not {warmup_steps}")
    return lambda step: min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))


def cosine(steps: int, warmup_steps: int, lowest: float = 0.0) -> Schedule:
    """Linear to 1 at the end of the warm-up, then half a cosine down to `lowest` at the last step."""
    if not 0 <= warmup_steps < steps:
        raise ConfigError(f"{warmup_steps} steps of warm-up do not fit into {steps} steps: choose 0 to {steps - 1}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min((step - warmup_steps + 1) / (steps - warmup_steps), 1.0)
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2

    return factor


def cosines(*parts: tuple[int, float, int]) -> Schedule:
    """One cosine after another, each from its own peak to a twentieth of it (Loshchilov & Hutter 2017, §3: restarts).

    Args:
        parts: for each, its steps, its peak as a share of the highest rate, and its steps of warm-up (cut
            to a tenth of its steps).

    Raises:
        ConfigError: no part has any steps.
    """
    factors = [(steps, peak, cosine(steps, min(warmup, steps // 10), 0.05)) for steps, peak, warmup in parts if steps]
    if not factors:
        raise ConfigError("no part of the schedule has any steps: give one that has")

    def factor(step: int) -> float:
        for steps, peak, schedule in factors[:-1]:
            if step < steps:
                return peak * schedule(step)
            step -= steps
        _, peak, schedule = factors[-1]
        return peak * schedule(step)

    return factor
