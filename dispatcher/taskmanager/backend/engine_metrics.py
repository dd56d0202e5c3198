"""What vLLM tells at `/metrics`, from 0.6 on; several engines behind one page are added up.

Read here by hand, because the page has hundreds of lines and is asked for every second:
prometheus_client's parser takes 16 ms for one, this 0.2 ms (`tests/bench/auto_workers.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from dispatcher.core.saturation import EngineLoad

_PREFIX = "vllm:"
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_PREEMPTIONS = "vllm:num_preemptions_total"
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # the second before 0.10
# What moves only when the engine works. A request that merely arrives moves none of them.
_PROGRESS = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:request_success_total",
    _PREEMPTIONS,
    *_KV_USAGE,
)
_WANTED = frozenset((_RUNNING, _WAITING, *_PROGRESS))


def engine_load(page: str) -> EngineLoad | None:
    """Return the state of the engine; None when the page does not tell it."""
    found = _read(page)
    if _RUNNING not in found or _WAITING not in found:
        return None
    usages = [usage for name in _KV_USAGE for usage in found.get(name, ())]
    return EngineLoad(
        running=_total(found, _RUNNING),
        waiting=_total(found, _WAITING),
        # Of several engines the fullest: it is the one that will preempt.
        kv_usage=max(usages, default=None),
        preemptions=_total(found, _PREEMPTIONS),
    )


def progress_mark(page: str) -> Hashable | None:
    """Return what changes whenever the engine did any work; None when the page does not tell.

    To be compared with another mark of the same engine, and for nothing else.
    """
    found = _read(page)
    mark = tuple(tuple(found.get(name, ())) for name in _PROGRESS)
    return mark if any(mark) else None


def _total(found: dict[str, list[float]], name: str) -> int:
    return int(sum(found.get(name, ())))


def _read(page: str) -> dict[str, list[float]]:
    """Return the values that are wanted here by the name of the metric, one for each label set."""
    found: dict[str, list[float]] = {}
    for line in page.splitlines():
        if not line.startswith(_PREFIX):
            continue
        name, brace, rest = line.partition("{")
        if brace:
            # A label's value may hold anything, a closing brace too; what follows cannot.
            rest = rest.rpartition("}")[2]
        else:
            name, _, rest = line.partition(" ")
        if name in _WANTED and (value := _number(rest)) is not None:
            found.setdefault(name, []).append(value)
    return found


def _number(text: str) -> float | None:
    """Return a sample's value, which a time stamp may follow; None for NaN and infinities."""
    try:
        value = float(text.split(maxsplit=1)[0])
    except (ValueError, IndexError):
        return None
    return value if math.isfinite(value) else None
