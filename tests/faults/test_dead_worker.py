"""How soon others get the work of a worker that died."""

from __future__ import annotations

import time
from pathlib import Path

from dispatcher.models import HeartbeatRequest
from tests.faults.oracle import input_line
from tests.support.processes import dispatcher_server

TERM_S = 2.0


def test_a_dead_workers_items_are_with_another_worker_within_twice_the_lease_term(
    tmp_path: Path,
) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    infile.write_text("".join(input_line(number) + "\n" for number in range(8)))
    files = ("--infile", infile, "--outfile", outfile, "--lease-term", str(TERM_S))
    with (
        dispatcher_server(*files) as server,
        server.client("dies") as dies,
        server.client("lives") as lives,
    ):
        dies.heartbeat(HeartbeatRequest("dies"))
        lives.heartbeat(HeartbeatRequest("lives"))
        held = {item.lease: 1 for item in dies.get_work(8).items}
        assert len(held) == 8
        dies.heartbeat(HeartbeatRequest("dies", held))  # all of them run; then silence
        died_at = time.monotonic()

        got: set[int] = set()
        while len(got) < 8:
            lives.heartbeat(HeartbeatRequest("lives"))
            got |= {item.work_id for item in lives.get_work(8, wait_s=TERM_S / 4).items}
            assert time.monotonic() - died_at < 2 * TERM_S

        assert server.client().status()["charged"] == 0
