"""Who starts a run is told where its page is, and where its token is, but not the token."""

from __future__ import annotations

from pathlib import Path

from dispatcher.server_file import read_server_file
from tests.server.test_access_control import files
from tests.support.processes import dispatcher_server, run_python, wait_until


def test_a_server_says_where_its_page_is_and_where_the_token_is(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        said = f"open {server.url}/ in a browser; the token it asks for is in {server.state_file}"
        wait_until(lambda: said in server.process.output, "the page's URL")
        assert server.token is not None
        assert server.token not in server.process.output


def test_a_server_that_wants_no_token_names_none(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path), "--no-auth") as server:
        said = f"open {server.url}/ in a browser\n"
        wait_until(lambda: said in server.process.output, "the page's URL")


def test_dispatcher_run_says_it_too(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 3)
    command = ["--task", "examples/chat_task.py:ChatTask", "--input", str(infile)]
    command += ["--output", str(tmp_path / "out.jsonl"), "--backend", "fake"]
    code, output = run_python("-m", "dispatcher.cli", "run", *command, deadline_s=60)
    assert code == 0, output
    state_file = tmp_path / "out.jsonl.dispatch" / "server.json"
    assert "to watch it, open http://127.0.0.1:" in output
    assert f"the token it asks for is in {state_file}" in output
    token = read_server_file(state_file).token
    assert token is not None
    assert token not in output
