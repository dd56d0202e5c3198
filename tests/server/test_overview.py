"""GET /overview: what the page gets at each look."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from dispatcher.models import HeartbeatRequest, WorkerStats
from dispatcher.server.overview import MOST_WORKERS, node_of
from dispatcher.server.shown_settings import HIDDEN, shown_settings
from tests.server.test_access_control import ask, files
from tests.support.processes import Server, dispatcher_server, wait_until


def overview(server: Server, since: str | None = None) -> dict[str, Any]:
    query = f"?since={since}" if since is not None else ""
    status, found, _ = ask(server, "GET", f"/overview{query}", server.headers)
    assert status == 200, found
    return dict(found)


def test_it_holds_the_status_and_what_else_a_page_shows(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server, server.client("n1-7-0123abcd") as client:
        client.get_work(2)
        client.heartbeat(
            HeartbeatRequest("n2-8-0123abcd", backend="down", stats=WorkerStats(in_flight=4))
        )
        found = overview(server)
        status = ask(server, "GET", "/status", server.headers)[1]
        assert found["status"].keys() == status.keys()
        assert found["status"]["issued"] == 2
        down, silent = found["workers"]["listed"]  # the one with a problem first
        assert (down["node"], down["backend"], down["requests_in_flight"]) == ("n2", "down", 4)
        assert (silent["in_flight"], silent["backend"]) == (2, "unknown")
        assert found["workers"]["in_flight_without_name"] == 0
        assert found["errors"] == {"latest": [], "line_of_kind": {}}
        assert found["settings"]["files"]["output"].endswith("out.jsonl")
        assert server.token is not None
        assert server.token not in json.dumps(found)


def test_a_second_look_gets_only_what_is_new_and_another_epoch_everything(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        wait_until(lambda: overview(server)["points"][0]["new"], "a first point", 20)
        first = overview(server)
        assert re.fullmatch(r"1\.\d+", first["next"])
        again = overview(server, first["next"])
        assert "settings" not in again
        assert again["points"][0]["new"] == []
        before = overview(server, "0.99999")  # of a server before this one
        assert before["points"][0]["new"]
        assert "settings" in before


@pytest.mark.parametrize("since", ["", "1", "x.y", "1.2.3", "9" * 400, "-1.0", "1.%D9%A3"])
def test_what_is_no_earlier_reply_is_refused(tmp_path: Path, since: str) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        assert ask(server, "GET", f"/overview?since={since}", server.headers)[0] == 400


def test_failures_are_known_by_kind_after_a_restart(tmp_path: Path) -> None:
    arguments = files(tmp_path)
    with dispatcher_server(*arguments) as server, server.client("w") as client:
        items = client.get_work(2).items
        items[1].set_result('{"__ERROR__": {"error": "bad", "message": "why"}}')
        client.submit_results(items[1:])
        (failed,) = overview(server)["errors"]["latest"]
        assert (failed["line"], failed["kind"], failed["message"]) == (1, "bad", "why")
        server.process.signal(signal.SIGKILL)
        server.process.wait()
    with dispatcher_server(*arguments, "--takeover") as server:
        assert overview(server)["errors"] == {"latest": [], "line_of_kind": {"bad": 1}}


def test_of_very_many_workers_not_all_are_sent_and_their_number_is_told(tmp_path: Path) -> None:
    count = MOST_WORKERS + 25
    with dispatcher_server(*files(tmp_path)) as server, server.client() as client:
        for number in range(count):
            state = "down" if number == count - 1 else "up"
            client.heartbeat(HeartbeatRequest(f"w{number:05}", backend=state))
        workers = overview(server)["workers"]
        assert workers["count"] == count
        assert len(workers["listed"]) == MOST_WORKERS
        assert workers["listed"][0]["name"] == f"w{count - 1:05}"  # it has a problem


def test_many_pages_at_once_are_answered_with_the_same_figures(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        times = {overview(server)["time"] for _ in range(10)}
        assert len(times) < 10


@pytest.mark.parametrize(
    ("worker", "node"),
    [
        ("gpu-node-07-4123-9f3a02bc", "gpu-node-07"),
        ("a.b.c-1-00000000", "a.b.c"),
        ("mine", None),
        ("-1-00000000", None),
        ("x-1-0000000g", None),
    ],
)
def test_the_node_is_in_the_names_that_task_managers_give_themselves(
    worker: str, node: str | None
) -> None:
    assert node_of(worker) == node


# --- settings -----------------------------------------------------------------------------------

SECRET = "sk-" + "a1B2" * 8


def shown(options: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
    task = {"spec": "t.py:T", "args": args}
    return shown_settings({"command": {"options": options or {}, "task": task}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", "x"),
        ("HF_TOKEN", "x"),
        ("password", "x"),
        ("judge", SECRET),
        ("judge", "hf_abcdefghijklmno"),
        ("url", "https://me:pw@host/v1"),
        ("salt", "9f3a02bc" * 5),
        ("nested", {"deep": [SECRET]}),
        ("nested", {"secret": "x"}),
    ],
)
def test_what_looks_like_a_secret_is_hidden(name: str, value: Any) -> None:
    text = json.dumps(shown(**{name: value})["task_args"])
    assert HIDDEN in text
    assert SECRET not in text
    assert '"x"' not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("max_tokens", 512),
        ("max_completion_tokens", 512),
        ("model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B-Instruct-AWQ"),
        ("style", "short and plain, as for a child"),
        ("index", "/data/a-very-long-directory-name-2024/with/parts"),
        ("url", "http://host:8000/v1"),
    ],
)
def test_what_is_none_is_shown_as_it_is(name: str, value: Any) -> None:
    assert shown(**{name: value})["task_args"] == {name: value}


def test_a_secret_in_a_command_line_is_hidden_and_the_rest_of_it_stays() -> None:
    options = {"vllm_extra_args": "--dtype half --api-key=abc --hf-token 'd e' --seed 1"}
    text = shown(options)["options"]["vllm_extra_args"]
    assert text == "--dtype half --api-key=hidden --hf-token hidden --seed 1"
    assert shown({"api_key_env": "MY_KEY"})["options"] == {"api_key_env": "MY_KEY"}
    assert shown({"task_arg": [f"k={SECRET}"]})["options"] == {}
