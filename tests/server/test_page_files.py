"""The page's files: which are served, how, and who may POST."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.test_access_control import ask, files
from tests.support.processes import ROOT, Server, dispatcher_server

DASHBOARD = ROOT / "dispatcher/server/dashboard"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Share one server between tests that change nothing of importance."""
    with dispatcher_server(*files(tmp_path_factory.mktemp("shared"))) as shared:
        yield shared


@pytest.mark.parametrize("path", ["/", *(f"/page/{file.name}" for file in DASHBOARD.iterdir())])
def test_every_file_has_its_type_and_a_policy_without_exceptions(server: Server, path: str) -> None:
    status, body, reply = ask(server, "GET", path, {})
    assert status == 200
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    expected = kinds.get(path.rpartition(".")[2], "text/html")
    assert (reply.headers["Content-Type"] or "").partition(";")[0] == expected
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    policy = reply.headers["Content-Security-Policy"] or ""
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert len(body) > 100


def test_the_page_has_no_script_and_no_style_of_its_own_and_names_nobody_else() -> None:
    for file in DASHBOARD.iterdir():
        text = file.read_text()
        known = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import", known), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|\bstyle=", text), file
    page = (DASHBOARD / "page.html").read_text()
    assert "<style" not in page
    assert re.findall(r"<script[^>]*>(.*?)</script>", page) == [""]
    assert not re.search(r"\son\w+=", page)


def test_every_module_that_is_imported_is_there() -> None:
    for file in DASHBOARD.glob("*.js"):
        for name in re.findall(r'from "\./([\w.]+)"', file.read_text()):
            assert (DASHBOARD / name).exists(), f"{file.name} imports {name}"


def test_a_browser_that_has_a_file_is_not_sent_it_again(server: Server) -> None:
    _, _, reply = ask(server, "GET", "/page/main.js", {})
    assert reply.headers["Cache-Control"] == "no-cache"
    tag = reply.headers["ETag"] or ""
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        status, body, _ = ask(server, "GET", "/page/main.js", {"If-None-Match": known})
        assert (status, body) == (304, b"")
    assert ask(server, "GET", "/page/main.js", {"If-None-Match": '"other"'})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/page/nothing.js",
            "/page/",
            "/page/../app.py",
            "/page/..%2fapp.py",
            "/page/%2e%2e/app.py",
        ),
        *("/page/..%5capp.py", "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/main.js%00"),
        "/page/dashboard/main.js",
    ],
)
def test_no_other_file_is_served(server: Server, path: str) -> None:
    for headers in ({}, server.headers):
        assert ask(server, "GET", path, headers)[0] in (401, 404)


# --- POSTs --------------------------------------------------------------------------------------

CALLS = ["/results", "/release", "/heartbeat", "/steps", "/work_timeout", "/max_failures"]
FOREIGN = {"Origin": "https://elsewhere.example"}


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "x", ""])
def test_a_post_that_a_form_could_send_is_refused(server: Server, path: str, kind: str) -> None:
    headers = {**server.admin_headers, "Content-Type": kind}
    status, said, reply = ask(server, "POST", path, headers, b"{}")
    assert status == 415
    assert "application/json" in said["message"]
    assert reply.headers["Connection"] == "close"


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"]
)
def test_json_is_taken(server: Server, kind: str) -> None:
    headers = {**server.headers, "Content-Type": kind, **FOREIGN}
    assert ask(server, "POST", "/release", headers, b'{"work_ids": []}')[0] == 200


def test_no_type_at_all_is_taken_from_an_older_client_but_not_from_a_browser(
    server: Server,
) -> None:
    body = b'{"work_ids": []}'
    assert ask(server, "POST", "/release", server.headers, body)[0] == 200
    assert ask(server, "POST", "/release", {**server.headers, **FOREIGN}, body)[0] == 415


def test_a_browser_that_asks_for_another_sites_page_is_not_told_yes(server: Server) -> None:
    asks = {
        **FOREIGN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    for headers in (asks, {**asks, **server.headers}):
        status, _, reply = ask(server, "OPTIONS", "/work_timeout", headers)
        assert status in (401, 405)
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_a_refused_post_changed_nothing(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path), "--no-auth") as server:
        body = json.dumps({"timeout": 5}).encode()
        assert ask(server, "POST", "/work_timeout", {"Content-Type": "text/plain"}, body)[0] == 415
        assert ask(server, "GET", "/status", {})[1]["work_timeout_s"] == 1200
