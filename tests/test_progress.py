"""How a run goes, in figures and lines."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from dispatcher.progress import (
    LineDisplay,
    LiveDisplay,
    line_of,
    make_display,
    model_lines,
    rows_of,
)
from dispatcher.run_facts import Rates, causes_text, clock, facts_of, facts_of_summary


def status(done: int = 0, total: int = 100, **fields: Any) -> dict[str, Any]:
    return {
        "done": done,
        "failed": 0,
        "issued": 0,
        "total": total,
        "total_is_exact": True,
        "next_work_id": 1,
        "completion_tokens": 0,
        "output_error": None,
        **fields,
    }


def facts(status: dict[str, Any], rates: Rates) -> str:
    return line_of(facts_of(status, rates), status.get("models"))


def rates_of(*samples: tuple[float, int, int]) -> Rates:
    rates = Rates()
    for sample in samples:
        rates.add(*sample)
    return rates


def test_a_copy_of_the_input_that_waits_for_room_is_in_the_line_and_in_the_live_view() -> None:
    waits = {"copying": {"bytes": 1, "share": 0.5, "problem": "the copy waits: no room"}}
    assert "the copy waits: no room" in facts(status(5, **waits), Rates())
    assert ("input", "the copy waits: no room") in rows_of(facts_of(status(5, **waits), Rates()))
    assert "copy" not in facts(status(5, copying=None), Rates())


# --- a pause ------------------------------------------------------------------------------------

WHY = "paused by an operator (a look)"
PAUSED = {"state": "paused", "paused": {"message": WHY}}


def test_a_pause_is_in_the_line_and_in_the_live_view() -> None:
    assert WHY in facts(status(5, **PAUSED), Rates())
    stream = io.StringIO()
    display = LiveDisplay(stream)
    display.show(status(5, **PAUSED), 0.0)
    display.close()
    assert WHY in stream.getvalue()


def test_a_pause_and_its_end_are_shown_at_once_and_once() -> None:
    stream = io.StringIO()
    display = LineDisplay(stream)
    for now, how in enumerate(({}, PAUSED, PAUSED, {}, {})):
        display.show(status(5, **how), float(now))
    assert [WHY in line for line in stream.getvalue().splitlines()] == [False, True, False]


def test_a_run_that_is_paused_before_it_begins_does_not_wait_for_task_managers() -> None:
    stream = io.StringIO()
    display = LineDisplay(stream)
    for _ in range(2):
        display.show(status(next_work_id=0, **PAUSED), 0.0)
    assert stream.getvalue() == f"{WHY}\n"
    live = io.StringIO()
    view = LiveDisplay(live)
    view.show(status(next_work_id=0, **PAUSED), 0.0)
    view.close()
    assert WHY in live.getvalue()
    assert "task manager" not in live.getvalue()


# --- rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [[], [(5.0, 100, 1000)]])
def test_without_two_samples_there_is_no_rate(samples: list[tuple[float, int, int]]) -> None:
    assert rates_of(*samples).per_second() == (0.0, 0.0)


def test_a_rate_is_what_was_added_over_the_time_it_took() -> None:
    rates = rates_of((100.0, 50, 1000), (102.0, 60, 1500), (104.0, 90, 1800))
    assert rates.per_second() == (10.0, 200.0)


def test_only_the_last_half_minute_counts() -> None:
    rates = rates_of(*((float(second), 1000 if second else 0, 0) for second in range(60)))
    assert rates.per_second() == (0.0, 0.0)  # the burst at the beginning is forgotten


def test_after_a_long_pause_there_is_still_a_rate() -> None:
    rates = rates_of((0.0, 0, 0), (1.0, 0, 0), (1000.0, 999, 0))
    assert rates.per_second() == (1.0, 0.0)


def test_two_samples_of_one_moment_divide_nothing_by_zero() -> None:
    assert rates_of((1.0, 5, 5), (1.0, 5, 5)).per_second() == (0.0, 0.0)


def test_tokens_that_left_with_their_worker_are_no_negative_rate() -> None:
    assert rates_of((0.0, 0, 1000), (10.0, 10, 400)).per_second() == (1.0, 0)


# --- facts --------------------------------------------------------------------------------------


def test_a_run_at_its_beginning_says_little() -> None:
    assert facts(status(), Rates()) == "0 done, 0 in flight, 0.0 items/s"


def test_a_run_under_way_says_all_that_matters() -> None:
    rates = rates_of((0.0, 0, 0), (10.0, 20, 5000))
    errors = {"timeout": 1, "bad_answer": 2}
    now = status(20, 140, failed=3, issued=8, errors=errors, workers=4, pending=7, waiting_for=13)

    assert facts(now, rates) == (
        "20 done, 3 with errors (bad_answer 2, timeout 1), 8 in flight, 2.0 items/s, "
        "500 tokens/s, 4 workers, 1:00 left at the pace of the last 0:10, "
        "7 results wait behind line 13"
    )


def test_what_the_server_says_of_pace_and_time_left_is_what_is_told() -> None:
    """Its page shows the same figures."""
    rates = rates_of((0.0, 0, 0), (10.0, 20, 5000))
    told = {"rate": {"items_per_s": 7.0, "tokens_per_s": 0.0, "over_s": 30.0}}
    told["time_left"] = {"seconds": 90.0, "items_per_s": 5.0, "over_s": 300.0}
    text = facts(status(20, 140, **told), rates)
    assert "7.0 items/s, 1:30 left at the pace of the last 5:00" in text
    assert "left" not in facts(status(20, 140, time_left=None), rates)


def test_a_window_that_holds_lines_back_is_told() -> None:
    text = facts(status(pending=7, waiting_for=13, blocked_by_window=True), Rates())
    assert "behind line 13; no new line before it is done (--window)" in text


def test_causes_are_told_the_most_frequent_first_and_none_is_lost() -> None:
    assert causes_text({"b": 1, "a": 1, "c": 5}, 9) == "c 5, a 1, b 1, 2 of other kinds"
    assert causes_text({}, 0) == ""


def test_status_and_summary_of_a_complete_run_are_told_alike() -> None:
    errors = {"bad_answer": 7, "timeout": 1}
    from_status = facts_of(status(100, failed=8, errors=errors, state="complete"), Rates())
    from_summary = facts_of_summary({"done": 100, "failed": 8, "errors": errors})
    assert from_status == from_summary


def test_a_run_at_its_end_has_no_time_left() -> None:
    rates = rates_of((0.0, 0, 0), (10.0, 20, 0))
    assert "left" not in facts(status(20, 20), rates)
    assert "left" not in facts(status(20, 18), rates)  # a guess that was too low


def test_a_paused_output_is_told() -> None:
    text = facts(status(output_error="no space left"), Rates())
    assert text.endswith("output paused: no space left")


def model(**fields: Any) -> dict[str, Any]:
    counts = {"requests": 0, "errors": 0, "prompt_tokens": 0, "completion_tokens": 0}
    return {**counts, "in_flight": 0, "limit": 64, "ttft_s": None, "latency_s": None, **fields}


def test_one_model_adds_nothing_to_the_facts() -> None:
    assert facts(status(models={"m": model()}), Rates()) == facts(status(), Rates())


def test_of_a_few_models_the_facts_show_how_full_each_is() -> None:
    models = {
        "org/generator": model(in_flight=12),
        "a-judge-with-a-very-long-name": model(in_flight=3, limit=8),
    }
    assert "in flight, 0.0 items/s, requests generator 12/64 a-judge-with-a-v 3/8" in facts(
        status(models=models), Rates()
    )


def test_many_models_do_not_fit_into_the_facts() -> None:
    models = {f"model-{number}": model() for number in range(4)}
    assert facts(status(models=models), Rates()) == facts(status(), Rates())


# --- a line a model -----------------------------------------------------------------------------


def test_each_model_has_a_line_with_what_was_asked_of_it_and_how_fast_it_was() -> None:
    generator = model(
        requests=5000,
        prompt_tokens=120_000,
        completion_tokens=640_000,
        errors=2,
        latency_s={"p50": 0.312, "p95": 1.5, "mean": 0.4},
        ttft_s={"p50": 0.05, "p95": 0.1, "mean": 0.06},
    )
    assert model_lines({"models": {"generator": generator, "judge": model(requests=3)}}) == [
        "generator: 5000 requests, 120000 tokens in, 640000 out, 2 errors, "
        "latency p50 0.312 s p95 1.5 s, first token p50 0.05 s p95 0.1 s",
        "judge: 3 requests, 0 tokens in, 0 out",
    ]


def test_a_summary_without_times_has_a_line_too() -> None:
    counts = {"requests": 1, "errors": 0, "prompt_tokens": 2, "completion_tokens": 3}
    assert model_lines({"models": {"m": counts}}) == ["m: 1 requests, 2 tokens in, 3 out"]


def test_an_older_server_tells_of_no_models() -> None:
    assert model_lines(status()) == []


# --- durations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (3723.2, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_a_duration_reads_like_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


# --- displays -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_view_and_a_file_gets_lines() -> None:
    live = make_display(Terminal())
    assert isinstance(live, LiveDisplay)
    live.close()
    assert isinstance(make_display(io.StringIO()), LineDisplay)


def test_a_line_comes_at_once_and_then_once_a_minute() -> None:
    stream = io.StringIO()
    display = LineDisplay(stream)
    for second in range(0, 151, 5):
        display.show(status(second, 1000), 1000 + second)
    display.close()

    lines = stream.getvalue().splitlines()
    assert [re.search(r": (\d+) done", line)[1] for line in lines] == ["0", "60", "120"]  # type: ignore[index]
    assert lines[0] == "of 1000 lines: 0 done, 0 in flight, 0.0 items/s"
    assert "1.0 items/s" in lines[1]


def test_while_nobody_has_asked_for_work_it_says_once_what_it_waits_for() -> None:
    stream = io.StringIO()
    display = LineDisplay(stream)
    for second in range(60):
        display.show(status(next_work_id=0), second)
    display.show(status(1), 60.0)

    waiting, working = stream.getvalue().splitlines()
    assert waiting == "waiting for a task manager to be ready"
    assert working.startswith("of 100 lines: 1 done")


def test_a_total_that_is_a_guess_is_called_one() -> None:
    stream = io.StringIO()
    LineDisplay(stream).show(status(total_is_exact=False), 0.0)
    assert stream.getvalue().startswith("of about 100 lines: ")


def test_a_note_is_a_line_of_its_own() -> None:
    stream = io.StringIO()
    LineDisplay(stream).note("the server [7] ended")
    assert stream.getvalue() == "the server [7] ended\n"


def shown(**fields: Any) -> str:
    """Return what a live view leaves on the terminal, without its colours."""
    stream = Terminal()
    display = LiveDisplay(stream)
    try:
        display.console.width = 200
        display.show(status(25, **fields), 0.0)
        display.note("a note with [brackets] in it")
    finally:
        display.close()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_a_live_view_shows_how_far_it_is_with_the_facts() -> None:
    left = {"seconds": 75.0, "items_per_s": 1.0, "over_s": 300.0}
    text = shown(failed=3, errors={"bad_answer": 3}, workers=4, time_left=left)
    assert "25%" in text
    assert "25 of 100 lines" in text
    assert re.search(r"errors +3: bad_answer 3", text)
    assert re.search(r"workers +4", text)
    assert re.search(r"time left +1:15, at the pace of the last 5:00", text)


def test_one_worker_is_not_several() -> None:
    assert facts(status(workers=1), Rates()).endswith("1 worker")
    assert facts(status(workers=2), Rates()).endswith("2 workers")


def test_a_note_goes_above_the_view_as_it_is() -> None:
    assert "a note with [brackets] in it" in shown()


@pytest.mark.parametrize("error", ["cannot write /data/[run]/out", "cannot write [/data]"])
def test_a_live_view_shows_an_output_error_as_it_is(error: str) -> None:
    assert error in shown(output_error=error)


def test_a_live_view_of_an_empty_input_is_no_division_by_zero() -> None:
    stream = Terminal()
    display = LiveDisplay(stream)
    display.show(status(0, 0), 0.0)
    display.close()
