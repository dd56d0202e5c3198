"""The history of lines that needed more than one attempt."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from dispatcher.core.events import Ended, Past
from dispatcher.storage.files import Files
from dispatcher.storage.history import HistoryFile

FIRST = Past(7, "ok", "node2", [Ended(1, "node1", "charged", "work_timeout")])
SECOND = Past(9, "task_exception", "", [Ended(1, "node1", "crashed", 'it said "no"\n', solo=True)])


def lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def test_each_line_tells_its_attempts_and_how_it_ended(tmp_path: Path) -> None:
    history = HistoryFile(tmp_path / "history.jsonl", Files())

    history.append([FIRST])
    history.append([SECOND])
    history.close()

    assert lines(tmp_path / "history.jsonl") == [
        {
            "work_id": 7,
            "outcome": "ok",
            "worker": "node2",
            "attempts": [
                {
                    "attempt": 1,
                    "worker": "node1",
                    "kind": "charged",
                    "reason": "work_timeout",
                    "solo": False,
                }
            ],
        },
        {
            "work_id": 9,
            "outcome": "task_exception",
            "worker": "",
            "attempts": [
                {
                    "attempt": 1,
                    "worker": "node1",
                    "kind": "crashed",
                    "reason": 'it said "no"\n',
                    "solo": True,
                }
            ],
        },
    ]


def test_a_process_goes_on_behind_the_half_line_of_one_that_died(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"work_id": 1}\n{"work_id": 2, "outc')

    history = HistoryFile(path, Files())
    history.append([FIRST])
    history.close()

    first, torn, last = path.read_text().splitlines()
    assert json.loads(first) == {"work_id": 1}
    assert torn == '{"work_id": 2, "outc'
    assert json.loads(last)["work_id"] == 7


def test_nothing_is_created_before_there_is_something_to_tell(tmp_path: Path) -> None:
    HistoryFile(tmp_path / "history.jsonl", Files()).close()

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_callers_to_judge(tmp_path: Path) -> None:
    class Full(Files):
        def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(OSError, match="no space"):
        HistoryFile(tmp_path / "history.jsonl", Full()).append([FIRST])
