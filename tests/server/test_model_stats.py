"""What workers count of their models' requests: added up in /status, /metrics and run.yaml."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.config import RunSettings
from dispatcher.core.worker_totals import MAX_RUN_MODELS, WorkerTotals, models_in_status
from dispatcher.models import (
    LATENCY_BOUNDS_S,
    MAX_MODEL_NAME,
    MAX_MODELS,
    HeartbeatRequest,
    Histogram,
    ModelStats,
    ResultItem,
    WorkerStats,
)
from dispatcher.service import DispatchService
from tests.support.serving import Peer, Running, head, run

BUCKETS = len(LATENCY_BOUNDS_S) + 1


def histogram(*counts: int, total: float = 0.0) -> Histogram:
    """Return one with these counts in its first buckets."""
    return Histogram([*counts, *[0] * (BUCKETS - len(counts))], total)


def worker(**models: ModelStats) -> WorkerStats:
    return WorkerStats(models=models)


# --- adding up ----------------------------------------------------------------------------------


def test_totals_are_added_up_by_model_over_workers() -> None:
    totals = WorkerTotals()
    totals.note("a", worker(big=ModelStats(requests=3, in_flight=1, limit=8)))
    totals.note("b", worker(big=ModelStats(requests=4, in_flight=2, limit=8), small=ModelStats()))

    models = totals.total({"a", "b"}).models

    assert models["big"] == ModelStats(requests=7, in_flight=3, limit=16)
    assert set(models) == {"big", "small"}


def test_the_newest_totals_of_a_worker_replace_the_older_ones() -> None:
    totals = WorkerTotals()
    for requests in (3, 5):
        stats = worker(m=ModelStats(requests=requests, latency=histogram(requests)))
        totals.note("a", stats)
    assert totals.total({"a"}).models["m"] == ModelStats(requests=5, latency=histogram(5))


def test_what_departed_workers_counted_stays_but_not_their_requests_in_flight() -> None:
    def stats(seconds: float) -> WorkerStats:
        one = ModelStats(
            **dict.fromkeys(
                ("requests", "errors", "retried", "overloads", "restarts", "in_flight", "limit"), 2
            ),
            prompt_tokens=10,
            completion_tokens=20,
            ttft=histogram(1, 1, total=0.03),
            latency=histogram(0, 2, total=0.04),
        )
        return WorkerStats(2, 10, 20, 5, 1, 4, seconds, {"m": one})

    totals = WorkerTotals()
    totals.note("a", stats(7.0))
    totals.note("b", stats(3.0))
    together = msgspec.to_builtins(totals.total({"a", "b"}))
    totals.forget_all_but({"b"})
    totals.forget_all_but({"b"})
    later = totals.total({"b"})

    assert (later.in_flight, later.models["m"].in_flight, later.models["m"].limit) == (5, 2, 2)
    later.in_flight, later.models["m"].in_flight, later.models["m"].limit = 10, 4, 4
    assert msgspec.to_builtins(later) == together
    assert (later.slow_steps, later.longest_step_s, later.requests) == (8, 7.0, 4)


def test_a_worker_that_vanished_has_no_requests_in_flight() -> None:
    totals = WorkerTotals()
    totals.note("a", WorkerStats(requests=9, in_flight=4))
    assert (totals.total(set()).in_flight, totals.total(set()).requests) == (0, 9)


def test_beyond_so_many_models_a_run_adds_the_further_ones_up() -> None:
    totals = WorkerTotals()
    for number in range(MAX_RUN_MODELS + 50):
        totals.note(f"w{number}", worker(**{f"model-{number}": ModelStats(requests=1)}))
    models = totals.total(set()).models

    assert len(models) == MAX_RUN_MODELS + 1
    assert models["other"].requests == 50


def test_a_model_is_counted_under_the_same_name_for_ever() -> None:
    """Otherwise a counter would shrink, which Prometheus takes for a restart."""
    totals = WorkerTotals()
    for number in range(MAX_RUN_MODELS):
        totals.note("early", worker(**{f"model-{number}": ModelStats(requests=1)}))
    for requests in (5, 9):
        totals.note("late", worker(late=ModelStats(requests=requests)))
        totals.forget_all_but({"late"})
        assert totals.total(set()).models["other"].requests == requests


def test_the_times_of_a_model_are_told_in_seconds_with_three_digits() -> None:
    stats = ModelStats(latency=histogram(0, 0, 0, 0, 100, total=31.23456))
    shown = models_in_status({"m": stats})["m"]

    assert shown["ttft_s"] is None
    assert shown["latency_s"] == {"p50": 0.175, "p95": 0.242, "p99": 0.248, "mean": 0.312}


# --- over HTTP ----------------------------------------------------------------------------------


class Client:
    """A worker that sends one call after the other over one connection."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def beat(self, stats: Any, worker: str = "w") -> tuple[int, Any]:
        body = msgspec.json.encode({"worker": worker, "stats": stats})
        self._peer.send(head("POST", "/heartbeat", f"Content-Length: {len(body)}") + body)
        status, _, answer = await self._peer.reply()
        return status, answer

    async def get(self, path: str) -> Any:
        self._peer.send(head("GET", path))
        status, _, answer = await self._peer.reply()
        assert status == 200, answer
        return answer


def on_a_server(directory: Path, scenario: Callable[[Client], Awaitable[None]]) -> None:
    async def whole(server: Running) -> None:
        peer = await server.connect()
        try:
            await scenario(Client(peer))
        finally:
            peer.close()

    run(directory, whole)


def test_status_tells_of_each_model(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        one = ModelStats(
            requests=4,
            errors=1,
            retried=2,
            overloads=3,
            prompt_tokens=40,
            completion_tokens=400,
            in_flight=5,
            limit=64,
            restarts=1,
            ttft=histogram(4, total=0.02),
            latency=histogram(0, 0, 4, total=0.16),
        )
        stats = WorkerStats(slow_steps=2, longest_step_s=1.5, models={"org/m": one})
        assert (await client.beat(stats))[0] == 200
        assert (await client.beat(worker(judge=ModelStats(requests=1)), "v"))[0] == 200
        status = await client.get("/status")

        assert status["models"]["org/m"] == {
            "requests": 4,
            "errors": 1,
            "retried": 2,
            "overloads": 3,
            "prompt_tokens": 40,
            "completion_tokens": 400,
            "in_flight": 5,
            "limit": 64,
            "restarts": 1,
            "ttft_s": {"p50": 0.005, "p95": 0.0095, "p99": 0.0099, "mean": 0.005},
            "latency_s": {"p50": 0.0375, "p95": 0.0488, "p99": 0.0498, "mean": 0.04},
        }
        assert status["models"]["judge"]["latency_s"] is None
        assert (status["slow_steps"], status["longest_step_s"]) == (2, 1.5)

    on_a_server(tmp_path, scenario)


def test_before_any_worker_speaks_there_are_no_models(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        status = await client.get("/status")
        assert (status["models"], status["slow_steps"], status["longest_step_s"]) == ({}, 0, 0.0)

    on_a_server(tmp_path, scenario)


def test_a_scrape_has_counters_gauges_and_histograms_by_model(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        one = ModelStats(
            requests=7,
            errors=1,
            retried=2,
            overloads=3,
            prompt_tokens=40,
            completion_tokens=400,
            in_flight=5,
            limit=64,
            restarts=6,
            latency=histogram(0, 2, 4, *[0] * 13, 1, total=700.25),
        )
        name = 'org/"m"'
        await client.beat(WorkerStats(slow_steps=2, longest_step_s=1.5, models={name: one}))
        text = (await client.get("/metrics")).decode()
        samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

        def value(name_: str, **labels: str) -> float:
            labels = {"model": name, **labels}
            return samples[(f"dispatcher_model_{name_}", *sorted(labels.items()))]

        assert value("requests_total") == 7
        assert value("errors_total") == 1
        assert value("retries_total") == 2
        assert value("overloads_total") == 3
        assert value("tokens_total", kind="prompt") == 40
        assert value("tokens_total", kind="completion") == 400
        assert value("requests_in_flight") == 5
        assert value("requests_limit") == 64
        assert value("engine_restarts_total") == 6
        bucket = "request_duration_seconds_bucket"
        assert value(bucket, le="0.01") == 0
        assert value(bucket, le="0.025") == 2
        assert value(bucket, le="0.05") == value(bucket, le="600.0") == 6
        assert value(bucket, le="+Inf") == value("request_duration_seconds_count") == 7
        assert value("request_duration_seconds_sum") == 700.25
        assert samples["dispatcher_slow_steps_total",] == 2
        assert samples["dispatcher_longest_step_seconds",] == 1.5
        assert not any("first_token_seconds_bucket" in key[0] for key in samples)

    on_a_server(tmp_path, scenario)


def test_the_largest_heartbeat_that_is_allowed_is_taken(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        most = (1 << 53) - 1
        times = Histogram([most] * BUCKETS, float(1 << 52))
        full = ModelStats(*(most,) * 9, times, times)
        names = [f"{number:02}{'x' * (MAX_MODEL_NAME - 2)}" for number in range(MAX_MODELS)]
        for number in range(8):
            assert (await client.beat(worker(**dict.fromkeys(names, full)), f"w{number}"))[0] == 200
        assert len((await client.get("/status"))["models"]) == MAX_MODELS
        assert await client.get("/metrics")

    on_a_server(tmp_path, scenario)


COUNTS = [1] * BUCKETS
BAD_MODELS: dict[str, Any] = {
    "too many": {f"m{number}": {} for number in range(MAX_MODELS + 1)},
    "no name": {"": {}},
    "a name that is too long": {"x" * (MAX_MODEL_NAME + 1): {}},
    "a name of two lines": {"a\nb": {}},
    "a negative count": {"m": {"requests": -1}},
    "a count that nobody reaches": {"m": {"prompt_tokens": 1 << 53}},
    "a count that is none": {"m": {"errors": 1.5}},
    "a negative limit": {"m": {"limit": -1}},
    "too few buckets": {"m": {"ttft": {"counts": COUNTS[1:]}}},
    "too many buckets": {"m": {"latency": {"counts": [*COUNTS, 0]}}},
    "a negative bucket": {"m": {"latency": {"counts": [-1, *COUNTS[1:]]}}},
    "a bucket that nobody fills": {"m": {"latency": {"counts": [1 << 53, *COUNTS[1:]]}}},
    "a negative sum": {"m": {"latency": {"counts": COUNTS, "total": -0.5}}},
    "a sum beyond all time": {"m": {"ttft": {"counts": COUNTS, "total": 1e300}}},
    "a list": [],
    "a number for a model": {"m": 1},
}


@pytest.mark.parametrize("models", BAD_MODELS.values(), ids=BAD_MODELS)
def test_counts_that_cannot_be_are_refused_with_a_sentence(tmp_path: Path, models: Any) -> None:
    async def scenario(client: Client) -> None:
        status, answer = await client.beat({"requests": 5, "models": models})
        assert status == 400, answer
        assert answer["message"]
        assert (await client.get("/status"))["requests"] == 0  # nothing of it was taken

    on_a_server(tmp_path, scenario)


@pytest.mark.parametrize("stats", [{"slow_steps": -1}, {"longest_step_s": -0.1}])
def test_steps_that_cannot_be_are_refused(tmp_path: Path, stats: Any) -> None:
    async def scenario(client: Client) -> None:
        assert (await client.beat(stats))[0] == 400

    on_a_server(tmp_path, scenario)


# --- run.yaml -----------------------------------------------------------------------------------


def completed_run(directory: Path, *, before: WorkerStats, after: WorkerStats | None) -> Any:
    """Run a file of one line; return the models of the summary, as long as the server runs
    and once it ended. `after` is what the worker says when it knows that all is done."""
    infile = directory / "in.jsonl"
    infile.write_text("{}\n")
    settings = RunSettings(infile, directory / "out.jsonl", directory / "state")

    def models() -> Any:
        content = yaml.safe_load((settings.state_dir / "run.yaml").read_text())
        return content["summary"].get("models")

    async def whole() -> Any:
        service = DispatchService(settings)
        await service.start()
        await service.heartbeat(HeartbeatRequest("w", stats=before))
        (item,) = (await service.get_work("w", 1)).items
        await service.submit([ResultItem(item.work_id, "1", item.run, item.lease)])
        await asyncio.wait_for(service.finished.wait(), 5)
        running = models()
        if after is not None:
            await service.heartbeat(HeartbeatRequest("w", stats=after))
        await service.close()
        again = DispatchService(settings)
        await again.start()
        late = worker(m=ModelStats(requests=999))
        await again.heartbeat(HeartbeatRequest("late", stats=late))
        await again.close()
        return running, models()

    return asyncio.run(whole())


def test_the_summary_of_a_run_holds_what_its_models_did(tmp_path: Path) -> None:
    counts = {"requests": 8, "errors": 1, "prompt_tokens": 40, "completion_tokens": 400}
    stats = msgspec.convert({**counts, "in_flight": 1, "limit": 64}, ModelStats)
    stats.latency = histogram(0, 0, 0, 0, 100, total=25.0)
    running, ended = completed_run(tmp_path, before=worker(m=stats), after=None)

    times = {"p50": 0.175, "p95": 0.242, "mean": 0.25}
    assert running == ended == {"m": {**counts, "latency_s": times}}


def test_what_a_worker_says_last_is_in_the_summary_too(tmp_path: Path) -> None:
    running, ended = completed_run(
        tmp_path, before=WorkerStats(), after=worker(m=ModelStats(requests=3))
    )
    assert running is None
    assert ended["m"]["requests"] == 3
    assert json.loads(json.dumps(ended)) == ended


def test_without_counts_by_model_the_summary_has_none(tmp_path: Path) -> None:
    assert completed_run(tmp_path, before=WorkerStats(requests=5), after=None) == (None, None)
