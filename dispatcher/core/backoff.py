"""How long to wait before trying again."""

from __future__ import annotations

from random import Random


def delay_s(attempt: int, *, initial_s: float, max_s: float, rng: Random) -> float:
    """Return the seconds to wait before try number `attempt` + 1 (`attempt` counts from 1).

    Exponential with equal jitter: the upper bound doubles from `initial_s` to `max_s`, and the
    delay is drawn from the upper half of it, so that clients that failed together do not come
    back together and none comes back at once. (M. Brooker, "Exponential Backoff And Jitter",
    AWS Architecture Blog, 2015.)
    """
    bound = min(max_s, initial_s * 2.0 ** min(attempt - 1, 60))
    return bound * rng.uniform(0.5, 1.0)
