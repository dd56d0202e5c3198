"""What /metrics tells, and that its names are those Prometheus recommends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dispatcher.core.buckets import Buckets
from dispatcher.models import ModelStats
from tests.server.test_model_stats import Client, on_a_server, worker

UNITS = ("seconds", "bytes")
NOT_BASE_UNITS = re.compile(
    r"_(s|ms|us|milliseconds|microseconds|minutes|hours|kb|kib|mb|mib|gib|percent|count|sum)$"
)
LABELS = {"result", "kind", "reason", "state", "call", "model", "le", "run", "version", "by"}
MOST_SERIES = 500


async def families(client: Client) -> list[Any]:
    return list(text_string_to_metric_families((await client.get("/metrics")).decode()))


def problems_of(families: list[Any], text: str) -> list[str]:
    """Return what a lint finds; promtool's rules, as far as they concern what we expose."""
    found = []
    names = [family.name for family in families]
    found += [f"{name} is there twice" for name in {n for n in names if names.count(n) > 1}]
    for family in families:
        ours = family.name.startswith("dispatcher_")
        if not ours and not family.name.startswith("process_"):
            found.append(f"{family.name} has not the prefix dispatcher_")
        if not family.documentation.strip():
            found.append(f"{family.name} has no HELP")
        if family.type == "unknown":
            found.append(f"{family.name} has no TYPE")
        if not ours:
            continue
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", family.name):
            found.append(f"{family.name} is not in snake case")
        if NOT_BASE_UNITS.search(family.name):
            found.append(f"{family.name} is not in base units, or ends like a part of a histogram")
        is_total = f"# TYPE {family.name}_total counter" in text
        if (family.type == "counter") != is_total:
            found.append(f"{family.name} of type {family.type}: only counters end with _total")
        if family.type == "gauge" and family.name.endswith("_total"):
            found.append(f"{family.name} is a gauge")
        for word in UNITS:
            if word in family.name.split("_") and not family.name.endswith(word):
                found.append(f"{family.name} has its unit {word} not at its end")
        for label in {name for sample in family.samples for name in sample.labels} - LABELS:
            found.append(f"{family.name} has the label {label}, which nothing bounds")
    return found


def test_the_names_units_and_labels_are_those_that_prometheus_recommends(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        await client.beat(worker(m=ModelStats(requests=1)))
        await client.get("/work?batch_size=1")
        text = (await client.get("/metrics")).decode()
        assert problems_of(list(text_string_to_metric_families(text)), text) == []

    on_a_server(tmp_path, scenario)


def test_the_lint_finds_what_it_should() -> None:
    text = (
        "# HELP dispatcher_wait_ms x\n# TYPE dispatcher_wait_ms gauge\ndispatcher_wait_ms 1\n"
        '# HELP dispatcher_held x\n# TYPE dispatcher_held gauge\ndispatcher_held{worker="w"} 1\n'
        "# TYPE dispatcher_seconds_spent gauge\ndispatcher_seconds_spent 1\n"
        "# HELP things x\n# TYPE things gauge\nthings 1\n"
    )
    found = "\n".join(problems_of(list(text_string_to_metric_families(text)), text))
    for said in ("wait_ms is not in base", "label worker", "has no HELP", "unit seconds", "prefix"):
        assert said in found


def test_many_workers_do_not_make_many_series(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        for number in range(200):
            await client.beat(worker(m=ModelStats(requests=1)), f"worker-{number}")
        samples = [sample for family in await families(client) for sample in family.samples]
        assert len(samples) < MOST_SERIES
        assert not any("worker-" in value for s in samples for value in s.labels.values())

    on_a_server(tmp_path, scenario)


def test_a_scrape_tells_of_queue_calls_batches_and_the_journal(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        await client.get("/work?batch_size=2")
        values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in await families(client)
            for sample in family.samples
        }
        assert values["dispatcher_items_leased",] == 2
        assert values["dispatcher_items_expected",] == 3
        assert values["dispatcher_work_batch_items_count",] == 1
        assert values["dispatcher_work_batch_items_sum",] == 2
        assert values["dispatcher_call_duration_seconds_count", "work"] == 1
        assert values["dispatcher_journal_sync_duration_seconds_count",] >= 1
        assert values["dispatcher_journal_commit_size_bytes_sum",] > 0
        assert values["dispatcher_output_paused",] == 0

    on_a_server(tmp_path, scenario)


def test_a_value_on_a_bound_counts_below_it_and_one_above_all_counts_too() -> None:
    buckets = Buckets((1, 2.5))
    for value in (1, 1.5, 2.5, 9):
        buckets.observe(value)
    assert buckets.cumulative() == [("1.0", 1), ("2.5", 3), ("+Inf", 4)]
    assert buckets.total == 14.0
