"""A run of which 8 % fail: the page, `dispatcher watch` and the summary tell the same of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from dispatcher.models import WorkItem
from tests.dashboard.browser import Tab, chromium
from tests.support.processes import dispatcher_server, running

pytestmark = pytest.mark.chromium

LINES = 100
BY_KIND = {"timeout": 5, "bad_answer": 2, "max_retries_exceeded": 1}
CAUSES = "timeout 5, bad_answer 2, max_retries_exceeded 1"


def answer(item: WorkItem) -> str:
    """Return the result of a line; line 0 is never answered, and the next seven fail."""
    if item.work_id >= 8:
        return '{"ok": true}'
    kind = "timeout" if item.work_id < 6 else "bad_answer"
    return json.dumps({"__ERROR__": {"error": kind, "message": "m"}})


def test_page_watch_and_summary_agree_on_numbers_and_causes(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"n": 1}\n' * LINES)
    files = ("--infile", tmp_path / "in.jsonl", "--outfile", tmp_path / "out.jsonl")
    limits = ("--max-retries", "0", "--retry", "1")
    with (
        chromium() as browser,
        dispatcher_server(*files, *limits) as server,
        server.client("node1-5-0a1b2c3d") as client,
        running(
            *(sys.executable, "-m", "dispatcher.cli", "watch", server.at, "--every", "0.1")
        ) as watch,
    ):
        tab = Tab(browser)
        tab.open(server.url, server.token)
        client.release_work([client.get_work(1).items[0].work_id])
        items = client.get_work(LINES).items
        for item in items:
            item.set_result(answer(item))
        client.submit_results(items[:60])
        watch.wait_for_line(re.compile(rf"of (about )?{LINES} lines: \d+ done"))
        client.submit_results(items[60:])
        tab.wait_for("document.querySelector('#state').textContent === 'Complete'")
        assert watch.wait() == 0
        causes = {
            cells[0]: int(cells[1])
            for row in tab.page.locator("#causes tbody tr").all()
            if (cells := row.inner_text().split())
        }
        done = tab.text("#done-of")
        figures = tab.text("#figures")
        charged = tab.text("#again > div:first-child .value")
    summary = yaml.safe_load((tmp_path / "out.jsonl.dispatch" / "run.yaml").read_text())["summary"]

    assert (summary["done"], summary["failed"], summary["errors"]) == (LINES, 8, BY_KIND)
    assert (summary["charged"], summary["tombstones"]) == (1, {"max_retries_exceeded": 1})
    assert f"the run is complete: {LINES} lines, 8 with errors" in watch.output
    assert f"errors: {CAUSES}" in watch.output
    assert (done, charged) == ("100 of 100 lines", "1")
    assert re.search(r"Failed\s+8\s+8\.0 % of those finished", figures)
    assert causes == BY_KIND
    assert list(causes) == re.findall(r"(\w+) \d+", CAUSES)  # in the same order, too
