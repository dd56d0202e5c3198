"""The page in a real browser: what it shows, what it survives, and what never runs in it."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dispatcher.client import WorkClient
from dispatcher.models import HeartbeatRequest, ModelStats, WorkerStats
from dispatcher.server_file import read_server_file
from tests.dashboard.browser import PHONE, Tab, chromium
from tests.support.processes import Server, dispatcher_server, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.chromium

LINES = 200
Files = tuple[str | Path, ...]
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
BAD_ANSWER = {"error": "bad_answer", "message": "it is no good"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """Lend a tab; whatever a test does, the page must neither complain nor ask anybody else."""
    lent = Tab(browser)
    yield lent
    lent.close()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    lines = "".join(json.dumps({"q": f"question {n}"}) + "\n" for n in range(LINES))
    (tmp_path / "in.jsonl").write_text(lines)
    return ("--infile", tmp_path / "in.jsonl", "--outfile", tmp_path / "out.jsonl", "--retry", "1")


@pytest.fixture
def server(files: Files) -> Iterator[Server]:
    with dispatcher_server(*files) as running:
        yield running


def error_line(**error: object) -> str:
    return json.dumps({"__ERROR__": error})


def answer(client: WorkClient, count: int, result: str = '{"a": 1}') -> None:
    """Answer the next lines."""
    items = client.get_work(count).items
    for item in items:
        item.set_result(result)
    assert client.submit_results(items).count == len(items)


def has_text(selector: str, text: str) -> str:
    """Return the expression that is true once a part of the page has this text."""
    return f"document.querySelector({selector!r}).textContent.includes({text!r})"


def figure(page: Page, name: str) -> str:
    """Return the value that stands under a name."""
    cell = page.locator("#figures > div", has=page.locator("dt", has_text=name))
    return cell.locator(".value").inner_text()


# --- the token ----------------------------------------------------------------------------------


def test_the_token_is_asked_for_once_and_a_wrong_one_is_told(server: Server, tab: Tab) -> None:
    page = tab.open(server.url)
    page.get_by_label("Token of the run").fill("wrong-token-" + "w" * 30)
    page.keyboard.press("Enter")
    tab.wait_for(has_text("#ask-problem", "not this run's token"))
    assert any("401" in said for said in tab.complaints)
    tab.complaints.clear()  # the browser's own word on the refusal
    page.get_by_label("Token of the run").fill(server.token or "")
    page.keyboard.press("Enter")
    page.locator("#run").wait_for()
    page.reload()
    page.locator("#run").wait_for()
    assert not page.locator("#ask").is_visible()
    assert tab.complaints == []
    assert server.token not in page.content()


def test_a_server_that_wants_no_token_asks_for_none(files: Files, tab: Tab) -> None:
    with dispatcher_server(*files, "--no-auth") as server:
        page = tab.open(server.url)
        page.locator("#run").wait_for()
        assert not page.locator("#ask").is_visible()
        page.get_by_role("button", name="Work timeout").click()
        assert not page.get_by_label("Admin token").is_visible()
        page.get_by_label("Seconds").fill("5")
        page.keyboard.press("Enter")
        tab.wait_for(has_text("#settings", "5 s"))
    assert tab.complaints == []


# --- a run under way ----------------------------------------------------------------------------


def test_a_fresh_run_says_what_it_waits_for(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    assert page.get_by_role("heading", level=1, name="out.jsonl").is_visible()
    assert tab.text("#state") == "Running"
    assert tab.text("#state-says") == "Waiting for a first worker."
    assert "No estimate" in tab.text("#time-left")
    assert tab.complaints == []
    assert tab.hosts == {server.address}


def test_it_follows_the_run_without_being_loaded_again(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    page.evaluate("window.isTheSamePage = true")
    with server.client("node7-123-0a1b2c3d") as client:
        held = client.get_work(1).items  # the first line is slow
        answer(client, 30)
        tab.wait_for(has_text("#done-of", "30 of"))
        assert figure(page, "Waiting") == "30"
        assert "behind line 0" in tab.text("#figures")
        assert figure(page, "In flight") == "1"
        held[0].set_result('{"a": 1}')
        client.submit_results(held)
        tab.wait_for(has_text("#done-of", "31 of"))
        assert figure(page, "Waiting") == "0"
        answer(client, LINES)
        tab.wait_for(has_text("#state", "Complete"))
    assert tab.text("#percent") == "100.0"
    assert page.evaluate("window.isTheSamePage") is True
    assert page.title() == "100.0 % · out.jsonl"
    assert tab.calls.count("GET /") == 1
    assert tab.complaints == []


def test_rates_are_drawn_with_axes_and_told_in_words(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    with server.client("w") as client:
        answer(client, 50)
        tab.wait_for("document.querySelector('#items-chart .line').getAttribute('d').includes('L')")
    assert page.locator("#items-chart .axis .y").count() == 5
    label = page.locator("#items-chart svg").get_attribute("aria-label") or ""
    assert label.startswith("Items/s over time: now ")
    assert "highest" in tab.text("#items-chart .chart-sum")


def test_workers_are_listed_with_node_lines_backend_and_last_sign(server: Server, tab: Tab) -> None:
    with server.client("node7-123-0a1b2c3d") as client:
        stats = WorkerStats(completion_tokens=5, in_flight=3, models={"m": ModelStats(requests=9)})
        client.heartbeat(HeartbeatRequest("node7-123-0a1b2c3d", stats=stats))
        client.get_work(4)
        client.heartbeat(HeartbeatRequest("node8-9-0a1b2c3d", backend="down"))
        page = tab.open(server.url, server.token)
        rows = page.locator("#workers tbody tr")
        assert rows.count() == 2
        down, up = (rows.nth(place).inner_text().split() for place in (0, 1))
        assert down[:4] == ["node8-9-0a1b2c3d", "node8", "down", "0"]
        assert up[:5] == ["node7-123-0a1b2c3d", "node7", "up", "4", "3"]
        assert "1 model server down" in tab.text("#workers-say")
        assert page.locator("#models tbody th").inner_text() == "m"


# --- what went wrong ----------------------------------------------------------------------------


def test_a_failed_line_is_shown_with_its_cause_and_on_click_with_all_of_it(
    server: Server, tab: Tab
) -> None:
    page = tab.open(server.url, server.token)
    with server.client("node7-123-0a1b2c3d") as client:
        answer(client, 3)
        answer(client, 1, error_line(**BAD_ANSWER))
        tab.wait_for(has_text("#errors", "line 3"))
        assert figure(page, "Failed") == "1"
        assert page.locator("#causes tbody tr").inner_text().split() == [
            "bad_answer",
            "1",
            "100.0",
            "%",
        ]
        assert "it is no good" in tab.text("#errors")
        page.get_by_role("button", name="line 3").click()
        dialog = page.get_by_role("dialog", name="Line 3")
        dialog.get_by_role("heading", name="Input").wait_for()
        text = dialog.inner_text()
        assert "question 3" in text
        assert "error: bad_answer" in text
        assert "came from node7-123-0a1b2c3d" in text
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        focused = page.evaluate("document.activeElement.textContent")
        assert focused == "line 3"


def test_the_tries_of_a_line_out_of_reissues_are_told(files: Files, tab: Tab) -> None:
    with dispatcher_server(*files, "--max-retries", "1") as server, server.client() as client:
        page = tab.open(server.url, server.token)
        for _ in range(2):
            client.release_work([client.get_work(1).items[0].work_id])
        tab.wait_for(has_text("#causes", "max_retries_exceeded"))
        row = page.locator("#causes tbody tr")
        assert row.locator("td").last.inner_text() == "1"  # the server wrote it
        assert "charged" in tab.text("#again")
        page.get_by_label("Number of a line").fill("0")
        page.keyboard.press("Enter")
        tries = page.get_by_role("table", name="Its tries").locator("tbody tr")
        tries.first.wait_for()
        assert tries.count() == 2
        assert "released" in tries.first.inner_text()


def test_a_line_that_the_input_has_not_is_told_so(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    page.get_by_label("Number of a line").fill("777")
    page.keyboard.press("Enter")
    page.get_by_text("the input has no such line").wait_for()


def test_text_of_lines_answers_and_names_is_never_markup(tmp_path: Path, tab: Tab) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text((json.dumps({"q": EVIL}) + "\n") * 3)
    files = ("--infile", infile, "--outfile", tmp_path / "out.jsonl")
    with dispatcher_server(*files) as server, server.client(EVIL[:100]) as client:
        stats = WorkerStats(models={EVIL: ModelStats(requests=1)})
        client.heartbeat(HeartbeatRequest(EVIL[:100], stats=stats))
        page = tab.open(server.url, server.token)
        answer(client, 1, error_line(error="<img src=x>", message=EVIL))
        tab.wait_for(has_text("#errors", EVIL))
        page.get_by_role("button", name="line 0").click()
        page.get_by_role("heading", name="Input").wait_for()
        assert EVIL in tab.text("#item-body").replace('\\"', '"')
        assert EVIL in tab.text("#models")
        assert EVIL[:100] in tab.text("#workers")
        assert page.locator("script").count() == 1
        assert page.locator("#run img, dialog img").count() == 0
        assert "owned" not in page.title()
    assert tab.complaints == []


def test_nothing_but_the_files_of_the_page_may_run_in_it(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    page.evaluate("""() => {
        window.refused = [];
        addEventListener('securitypolicyviolation', (e) => refused.push(e.effectiveDirective));
        const script = document.createElement('script');
        try { script.textContent = "document.title = 'owned'"; } catch (e) { refused.push('type'); }
        try { document.body.innerHTML = 'x'; } catch (e) { refused.push('type'); }
        const image = document.createElement('img');
        image.src = 'http://elsewhere.invalid/';
        document.body.append(image);
        const style = document.createElement('style');
        style.textContent = 'body { display: none }';
        document.head.append(style);
    }""")
    tab.wait_for("window.refused.includes('img-src')")
    assert {"type", "style-src-elem"} <= set(page.evaluate("window.refused"))
    assert page.locator("#run").is_visible()


# --- a server that is away ----------------------------------------------------------------------


def test_it_survives_a_server_that_is_killed_and_started_again(files: Files, tab: Tab) -> None:
    with dispatcher_server(*files) as server, server.client("w") as client:
        answer(client, 10)
        page = tab.open(server.url, server.token)
        tab.wait_for(has_text("#done-of", "10 of"))
        server.process.signal(signal.SIGKILL)
        server.process.wait()
        tab.wait_for(has_text("#state", "No answer"))
        assert "does not answer since" in tab.text("#state-says")
        assert "10 of" in tab.text("#done-of")
        port = server.address.partition(":")[2]
    again = (*files, "--takeover", "--port", port)
    with dispatcher_server(*again) as server, server.client("w") as client:
        tab.wait_for(has_text("#state", "Running"))
        assert not page.locator("#ask").is_visible()
        answer(client, 10)
        tab.wait_for(has_text("#done-of", "20 of"))


# --- what changes the run -----------------------------------------------------------------------


def test_the_work_timeout_is_changed_with_the_admin_token_alone(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    admin_token = server.state_file.with_name("admin.token").read_text().strip()
    page.get_by_role("button", name="Work timeout").click()
    assert page.get_by_label("Seconds").input_value() == "1200"
    page.get_by_label("Seconds").fill("77")
    page.get_by_label("Admin token").fill(server.token or "")
    page.get_by_role("button", name="Set it").click()
    page.get_by_text("That is not the admin token of this run.").wait_for()
    page.get_by_label("Admin token").fill(admin_token)
    page.get_by_role("button", name="Set it").click()
    page.locator("#change").wait_for(state="hidden")
    tab.wait_for(has_text("#settings", "1 min 17 s"))
    assert "77 seconds" in (page.locator("#announcer").text_content() or "")
    # It is asked for once.
    page.get_by_role("button", name="Work timeout").click()
    assert not page.get_by_label("Admin token").is_visible()
    assert admin_token not in page.content()


def test_a_run_that_too_many_failed_lines_paused_goes_on_when_they_are_accepted(
    files: Files, tab: Tab
) -> None:
    with dispatcher_server(*files, "--max-failures", "0") as server:
        page = tab.open(server.url, server.token)
        with server.client("w") as client:
            answer(client, 1, error_line(**BAD_ANSWER))
        tab.wait_for(has_text("#state", "Paused"))
        assert "more than --max-failures 0 allows" in tab.text("#notices")
        page.get_by_role("button", name="Go on").click()
        admin_token = server.state_file.with_name("admin.token").read_text().strip()
        page.get_by_label("Admin token").fill(admin_token)
        page.get_by_role("button", name="Accept them and go on").click()
        tab.wait_for(has_text("#state", "Running"))


def test_a_copy_of_the_input_that_waits_for_room_is_noticed(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)

    def as_on_a_full_disk(route: Route) -> None:
        reply = route.fetch()
        told = reply.json()
        waits = {"bytes": 1, "share": 0.5, "problem": "the copy waits: make room"}
        told["status"] = {**told["status"], "copying": waits}
        route.fulfill(response=reply, json=told)

    page.route("**/overview*", as_on_a_full_disk)
    tab.wait_for(has_text("#notices", "the copy waits: make room"))
    page.unroute_all(behavior="wait")


def test_an_operator_pauses_the_run_and_lets_it_go_on(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    admin_token = server.state_file.with_name("admin.token").read_text().strip()
    page.get_by_role("button", name="Pause").click()
    dialog = page.get_by_role("dialog", name="Pause the run")
    dialog.get_by_label("Why").fill("the prompts have a typing error")
    dialog.get_by_label("Admin token").fill(admin_token)
    assert "Running" in tab.text("#state")
    dialog.get_by_role("button", name="Pause", exact=True).click()
    dialog.wait_for(state="hidden")
    tab.wait_for(has_text("#state", "Paused"))
    assert "Paused by an operator (the prompts have a typing error)" in tab.text("#notices")
    with server.client("w") as client:
        assert client.get_work(1).items == []
        page.get_by_role("button", name="Go on").click()
        page.get_by_role("dialog").get_by_role("button", name="Go on", exact=True).click()
        tab.wait_for(has_text("#state", "Running"))
        assert len(client.get_work(1).items) == 1


def test_a_server_that_is_drained_takes_results_and_ends(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    admin_token = server.state_file.with_name("admin.token").read_text().strip()
    with server.client("w") as client:
        (item,) = client.get_work(1).items
        page.get_by_role("button", name="Drain").click()
        page.get_by_label("Admin token").fill(admin_token)
        page.get_by_role("button", name="Drain", exact=True).click()
        tab.wait_for(has_text("#state", "Draining"))
        assert client.get_work(1).items == []
        item.set_result('{"a": 1}')
        assert client.submit_results([item]).count == 1
    assert server.process.wait(deadline_s=30) == 3
    tab.wait_for(has_text("#state", "No answer"))


def test_the_page_of_a_run_on_this_machine_sees_its_end(tmp_path: Path, browser: Browser) -> None:
    infile, state_dir = tmp_path / "in.jsonl", tmp_path / "out.jsonl.dispatch"
    infile.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 30)
    command = ["-m", "dispatcher.cli", "run", "--task", "examples/chat_task.py:ChatTask"]
    command += ["--input", str(infile), "--output", str(tmp_path / "out.jsonl"), "--workers", "2"]
    command += ["--backend", "fake", "--fakellm-args=--latency-s 0.4"]
    watching = Tab(browser)
    with running(sys.executable, *command) as run:
        run.wait_for_line(re.compile("to watch it, open "))
        found = read_server_file(state_dir)
        watching.open(found.url, found.token)
        assert run.wait(60) == 0, run.output
        watching.wait_for(has_text("#state", "Complete"))
        assert "30 of 30 lines" in watching.text("#run")
    watching.close()


def test_a_server_that_does_not_know_a_change_is_told_kindly(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    page.route("**/drain", lambda route: route.fulfill(status=404, json={"message": "Not Found"}))
    page.get_by_role("button", name="Drain").click()
    page.get_by_label("Admin token").fill("the-admin-token")
    page.get_by_role("button", name="Drain", exact=True).click()
    page.get_by_text("This server does not know that call").wait_for()


# --- for everybody ------------------------------------------------------------------------------


def test_on_a_phone_nothing_is_wider_than_the_screen(server: Server, browser: Browser) -> None:
    phone = Tab(browser, viewport=PHONE)
    with server.client("a-worker-with-a-very-long-name-" + "x" * 90) as client:
        answer(client, 3, error_line(error="e" * 60, message="m" * 200))
        stats = WorkerStats(models={"organisation/" + "m" * 60: ModelStats(requests=10**9)})
        client.heartbeat(HeartbeatRequest("node7-123-0a1b2c3d", stats=stats))
        page = phone.open(server.url, server.token)
        page.locator(".settings summary").click()
        widths = "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
        assert page.evaluate(widths) == [360, 360, 360]
        page.get_by_role("button", name="line 0").click()
        page.get_by_role("heading", name="Input").wait_for()
        box = page.locator("#item").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    phone.close()


def test_the_keyboard_reaches_everything(server: Server, tab: Tab) -> None:
    with server.client("w") as client:
        answer(client, 1, error_line(**BAD_ANSWER))
        page = tab.open(server.url, server.token)
        page.get_by_role("button", name="line 0").wait_for()
        reached: list[str] = []
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate(
                    "(document.activeElement.textContent || document.activeElement.id).trim()"
                )
            )
        for name in ("To the run", "Pause…", "Work timeout…", "Drain…", "line 0", "Look at line"):
            assert name in reached
        assert any(name.startswith("Workers, those") for name in reached)  # the table, to scroll it
        assert any("Settings of the run" in name for name in reached)


def test_a_selection_and_the_focus_stay_while_it_is_brought_up_to_date(
    server: Server, tab: Tab
) -> None:
    with server.client("w") as client:
        answer(client, 1, error_line(**BAD_ANSWER))
        page = tab.open(server.url, server.token)
        page.get_by_role("button", name="line 0").focus()
        page.evaluate(
            "getSelection().selectAllChildren(document.querySelector('#errors .message'))"
        )
        answer(client, 5, error_line(**BAD_ANSWER))
        tab.wait_for(has_text("#errors", "line 5"))
        assert page.evaluate("document.activeElement.textContent") == "line 0"
        assert page.evaluate("String(getSelection())") == "it is no good"


def test_points_errors_and_workers_on_the_page_are_bounded(server: Server, tab: Tab) -> None:
    page = tab.open(server.url, server.token)
    kept = page.evaluate("""async () => {
        const { Series } = await import('./page/series.js');
        const series = new Series();
        for (let i = 0; i < 5000; i += 1) {
            series.take([{ every_s: 5, keep: 120, new: [[0, 1, 0, 1]] }], i * 5000);
        }
        return series.levels.get(5).length;
    }""")
    assert kept == 120
    with server.client("w") as client:
        answer(client, 90, error_line(**BAD_ANSWER))
        tab.wait_for(has_text("#errors", "line 89"))
        assert page.locator("#errors li").count() == 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_whoever_sees_or_hears_it_otherwise_gets_it_all_too(
    server: Server, browser: Browser, scheme: str
) -> None:
    """By axe-core: names, roles, landmarks, contrast."""
    from axe_playwright_python.sync_playwright import Axe

    tab = Tab(browser, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    with server.client("node7-123-0a1b2c3d") as client:
        stats = WorkerStats(models={"m": ModelStats(requests=9)})
        client.heartbeat(HeartbeatRequest("node7-123-0a1b2c3d", backend="down", stats=stats))
        answer(client, 3, error_line(**BAD_ANSWER))
        page = tab.page
        page.goto(server.url)
        found = Axe().run(page).response["violations"]
        tab.open(server.url, server.token)
        page.locator(".settings summary").click()
        page.get_by_role("button", name="line 0").wait_for()
        found += Axe().run(page).response["violations"]
        page.get_by_role("button", name="line 0").click()
        page.get_by_role("heading", name="Input").wait_for()
        found += Axe().run(page).response["violations"]
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Work timeout").click()
        found += Axe().run(page).response["violations"]
    tab.close()
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
