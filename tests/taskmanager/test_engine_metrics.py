"""What is read from an engine's /metrics page."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dispatcher.core.saturation import EngineLoad
from dispatcher.taskmanager.backend.engine_metrics import engine_load, progress_mark

OLD_PAGE = """\
# HELP vllm:num_requests_running Number of requests currently running on GPU.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 3.0
# TYPE vllm:num_requests_swapped gauge
vllm:num_requests_swapped{model_name="m"} 9.0
vllm:num_requests_waiting{model_name="m"} 2.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.25
vllm:cpu_cache_usage_perc{model_name="m"} 0.75
vllm:num_preemptions_total{model_name="m"} 7.0
vllm:prompt_tokens_total{model_name="m"} 1.2e+06
vllm:generation_tokens_total{model_name="m"} 54321.0
vllm:generation_tokens_created{model_name="m"} 1.7e+09
"""


class Page:
    """vLLM's metrics as vLLM makes them, for some engines behind one server."""

    def __init__(self, engines: int = 1) -> None:
        self.registry = CollectorRegistry()
        names = ["model_name", "engine"]
        self.engines = range(engines)
        self.gauges = {
            name: Gauge(f"vllm:{name}", "text", names, registry=self.registry)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        self.counters = {
            name: Counter(f"vllm:{name}", "text", names, registry=self.registry)
            for name in ("num_preemptions", "prompt_tokens", "generation_tokens")
        }
        self.success = Counter(
            "vllm:request_success", "text", [*names, "finished_reason"], registry=self.registry
        )
        self.by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason", "t", [*names, "reason"], registry=self.registry
        )
        self.steps = Histogram(
            "vllm:iteration_tokens_total", "text", names, registry=self.registry, buckets=[1, 8, 64]
        )
        for engine in self.engines:
            for metric in (*self.gauges.values(), *self.counters.values(), self.steps):
                metric.labels("m", str(engine))
            self.by_reason.labels("m", str(engine), "capacity").set(99)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def test_the_load_of_a_current_vllm_is_read() -> None:
    page = Page()
    page.gauges["num_requests_running"].labels("m", "0").set(17)
    page.gauges["num_requests_waiting"].labels("m", "0").set(4)
    page.gauges["kv_cache_usage_perc"].labels("m", "0").set(0.5)
    page.counters["num_preemptions"].labels("m", "0").inc(6)
    assert engine_load(page.text()) == EngineLoad(17, 4, 0.5, 6)


def test_the_load_of_an_old_vllm_is_read() -> None:
    assert engine_load(OLD_PAGE) == EngineLoad(3, 2, 0.25, 7)


def test_engines_are_added_up_and_the_fullest_cache_counts() -> None:
    page = Page(engines=3)
    for engine in page.engines:
        page.gauges["num_requests_running"].labels("m", str(engine)).set(10 + engine)
        page.gauges["num_requests_waiting"].labels("m", str(engine)).set(engine)
        page.gauges["kv_cache_usage_perc"].labels("m", str(engine)).set([0.1, 0.9, 0.2][engine])
        page.counters["num_preemptions"].labels("m", str(engine)).inc(engine)
    assert engine_load(page.text()) == EngineLoad(33, 3, 0.9, 3)


def test_an_engine_that_tells_neither_cache_nor_preemptions_is_understood() -> None:
    page = 'vllm:num_requests_running{model_name="m"} 3\nvllm:num_requests_waiting 0\n'
    assert engine_load(page) == EngineLoad(3, 0, None, 0)


@pytest.mark.parametrize("label", ["a } 5", "a{b}", 'with \\" quote } 7', "a b  c"])
def test_a_label_may_hold_anything(label: str) -> None:
    page = "".join(
        f'vllm:num_requests_{name}{{model_name="{label}"}} 12 1700000000000\n'
        for name in ("running", "waiting")
    )
    assert engine_load(page) == EngineLoad(12, 12)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "", "twelve"])
def test_what_is_no_number_is_as_if_it_were_not_there(value: str) -> None:
    assert engine_load(OLD_PAGE + f"vllm:num_requests_running {value}\n") == engine_load(OLD_PAGE)
    assert engine_load(f"vllm:num_requests_waiting 1\nvllm:num_requests_running {value}\n") is None


@pytest.mark.parametrize(
    "page",
    ["", "<html>404 Not Found</html>", "# TYPE x gauge\nx 1\n", "vllm:num_requests_running 1\n"],
)
def test_a_page_of_something_else_tells_no_load(page: str) -> None:
    assert engine_load(page) is None


def test_a_page_without_counters_has_no_mark() -> None:
    assert progress_mark("<html></html>") is None
    assert progress_mark("vllm:num_requests_running 1\n") is None


@pytest.mark.parametrize("name", ["num_preemptions", "prompt_tokens", "generation_tokens"])
def test_any_counter_that_moves_in_any_engine_changes_the_mark(name: str) -> None:
    page = Page(engines=2)
    before = progress_mark(page.text())
    page.counters[name].labels("m", "1").inc()
    assert before is not None
    assert len({before, progress_mark(page.text())}) == 2


def test_steps_and_finished_requests_and_the_cache_change_the_mark() -> None:
    page = Page()
    marks = [progress_mark(page.text())]
    page.steps.labels("m", "0").observe(0)  # a step of which no request got a token
    marks.append(progress_mark(page.text()))
    page.success.labels("m", "0", "abort").inc()
    marks.append(progress_mark(page.text()))
    page.gauges["kv_cache_usage_perc"].labels("m", "0").set(0.001)  # a long prompt, in parts
    marks.append(progress_mark(page.text()))
    assert len(set(marks)) == 4


def test_requests_that_arrive_at_a_hung_engine_do_not_change_the_mark() -> None:
    page = Page()
    before = progress_mark(page.text())
    page.gauges["num_requests_running"].labels("m", "0").inc()
    page.gauges["num_requests_waiting"].labels("m", "0").inc()
    assert progress_mark(page.text()) == before
