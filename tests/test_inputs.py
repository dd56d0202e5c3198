"""Inputs of every kind: a run over each is killed, resumed and complete."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dispatcher.storage.files import Files
from dispatcher.storage.run_state import load_run_file
from tests.faults.oracle import Ledger
from tests.support.kinds import save_data_set, write_gzip, write_parquet, write_zstd
from tests.support.processes import ROOT, Process, kill_tree, running, wait_until

pytestmark = pytest.mark.slow

LINES = 40
TERM = ("--lease-term", "1")  # what a killed worker held is handed out again so soon
TASK = """
from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask


class Ask(GeneratorTask):
    def task_generator(self):
        yield Request({"messages": [{"role": "user", "content": str(self.data["id"])}]})
        return {"id": self.data["id"], "word": self.data["word"]}
"""
RUN = (sys.executable, "-m", "dispatcher.cli", "run")
SERVER = (sys.executable, "-m", "dispatcher.server")
INTERMEDIATE = (
    "journal",
    "input.spool",
    "input.partial",
    "input.origin",
    "input.sums",
    "owners",
    "spool",
)
HOLD = """
# Python runs this at its start: the readers of compressed files wait in the middle.
import time
from pathlib import Path

from dispatcher.storage.inputs import growing
from dispatcher.storage.inputs.compressed import CompressedReader

growing.FIRST_AFTER_S = growing.EVERY_S = 0.0
whole = CompressedReader.blocks


def held(self, stop):
    text = b"".join(whole(self, stop))
    middle = text.index(b'{"id": 25')
    yield text[: middle + 5]
    go_on = Path(__file__).with_name("go-on")
    while not go_on.exists():
        stop.check()
        time.sleep(0.02)
    if go_on.read_text() == "damaged":
        raise self._refuse("cut off")
    yield text[middle + 5 :]


CompressedReader.blocks = held
"""


def rows() -> list[dict[str, object]]:
    return [{"id": number, "word": f"word {number}"} for number in range(LINES)]


def lines() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows())


class Run:
    """The files of a run, and commands on it."""

    def __init__(self, directory: Path, *source: str | Path) -> None:
        self.directory = directory
        self.source = source
        (directory / "my_task.py").write_text(TASK)
        self.outfile = directory / "out.jsonl"
        self.state_dir = directory / "out.jsonl.dispatch"
        self.calls = directory / "calls.jsonl"

    def begin(self, latency_s: float = 0.3) -> Process:
        fake = f"--fakellm-args=--latency-s {latency_s} --call-log {self.calls}"
        files = [*self.source, "--output", "out.jsonl", "--task", "my_task.py:Ask"]
        return self._start(
            *RUN, "--input", *files, "--backend", "fake", "--workers", "4", *TERM, fake
        )

    def resume(self) -> Process:
        return self._start(*RUN, "--resume", self.state_dir)

    def _start(self, *command: str | Path) -> Process:
        # Standard input is what the shell finds in `pipe`, if there is one.
        script = 'if [ -p pipe ]; then exec "$@" < pipe; else exec "$@"; fi'
        env = {
            "PYTHONPATH": f"{self.directory / 'hold'}:{ROOT}",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.directory / "hf"),
        }
        return Process("sh", "-c", script, "sh", *command, cwd=self.directory, env=env)

    @property
    def written(self) -> list[bytes]:
        if not self.outfile.exists():
            return []
        return self.outfile.read_bytes().splitlines(keepends=True)

    def asked(self) -> Counter[str]:
        calls = map(json.loads, self.calls.read_text().splitlines())
        return Counter(call["prompt"] for call in calls if call["event"] == "call")

    def killed_in_the_middle(self) -> list[bytes]:
        process = self.begin()
        try:
            wait_until(lambda: len(self.written) >= 12, "some lines", deadline_s=90)
        finally:
            kill_tree(process)
        assert 12 <= len(self.written) < LINES, process.output
        return [line for line in self.written if line.endswith(b"\n")]

    def check_complete(self, before: list[bytes]) -> None:
        ledger = Ledger(0, accepted={n: line.decode().strip() for n, line in enumerate(before)})
        asked = [json.dumps(row) for row in rows()]
        assert ledger.problems(asked, self.outfile.read_bytes()) == []
        assert [json.loads(line) for line in self.written] == rows()
        calls = self.asked()
        assert {str(n): calls[str(n)] for n in range(len(before))} == dict.fromkeys(
            map(str, range(len(before))), 1
        )
        assert not [name for name in INTERMEDIATE if (self.state_dir / name).exists()]
        assert not list(self.state_dir.glob(".*"))


def ended(process: Process, deadline_s: float = 90) -> tuple[int, str]:
    try:
        return process.wait(deadline_s), process.output
    finally:
        process.kill()


def gzip_file(directory: Path) -> list[str]:
    return [write_gzip(directory, lines()).name]


def zstd_file(directory: Path) -> list[str]:
    return [write_zstd(directory, lines()).name]


def parquet_file(directory: Path) -> list[str]:
    return [write_parquet(directory / "in.parquet", rows()).name]


def parquet_directory(directory: Path) -> list[str]:
    (data := directory / "data").mkdir()
    write_parquet(data / "part-0.parquet", rows()[:20])
    write_parquet(data / "part-1.parquet", rows()[20:])
    return [data.name]


def saved_data_set(directory: Path) -> list[str]:
    return [save_data_set(directory / "set", train=rows(), test=rows()[:2]).name]


def streamed_data_set(directory: Path) -> list[str]:
    (files := directory / "files").mkdir()
    (files / "train.jsonl").write_bytes(lines())
    (files / "test.jsonl").write_bytes(lines()[:300])
    return ["hf:./files", "--input-split", "train", "--input-streaming"]


KINDS: list[Callable[[Path], list[str]]] = [
    gzip_file,
    zstd_file,
    parquet_file,
    parquet_directory,
    saved_data_set,
    streamed_data_set,
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_run_is_killed_resumed_and_complete(
    make: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    run = Run(tmp_path, *make(tmp_path))
    before = run.killed_in_the_middle()

    code, output = ended(run.resume())

    assert code == 0, output
    run.check_complete(before)
    run_file = load_run_file(run.state_dir, Files())
    assert run_file is not None
    assert run_file["fingerprint"]["kind"] == run_file["input_kind"] != "lines"


@pytest.mark.parametrize("make", [gzip_file, zstd_file], ids=lambda make: make.__name__)
def test_lines_are_answered_before_the_copy_is_whole_and_after_a_kill_too(
    make: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    (hold := tmp_path / "hold").mkdir()
    (hold / "sitecustomize.py").write_text(HOLD)
    run = Run(tmp_path, *make(tmp_path))
    before = run.killed_in_the_middle()
    assert is_copied_in_part(run)
    assert len(before) < 25

    process = run.resume()
    try:
        wait_until(lambda: len(run.written) == 25, "all lines so far", deadline_s=90)
        assert is_copied_in_part(run)
        (hold / "go-on").touch()
        code, output = ended(process)
    finally:
        kill_tree(process)

    assert code == 0, output
    run.check_complete(before)
    run_file = load_run_file(run.state_dir, Files())
    assert run_file is not None
    assert run_file["fingerprint"]["size"] == len(lines())


def test_a_signal_ends_a_run_whose_input_is_still_copied_and_it_goes_on(tmp_path: Path) -> None:
    (hold := tmp_path / "hold").mkdir()
    (hold / "sitecustomize.py").write_text(HOLD)
    run = Run(tmp_path, *gzip_file(tmp_path))
    process = run.begin(latency_s=0.05)
    try:
        wait_until(lambda: len(run.written) == 25, "all lines so far", deadline_s=90)
        process.signal(signal.SIGINT)
        assert process.wait(30) == 3, process.output
    finally:
        kill_tree(process)
    before = run.written
    assert "Traceback" not in process.output

    (hold / "go-on").touch()
    code, output = ended(run.resume())
    assert code == 0, output
    run.check_complete(before)


def alone(run: Run, hold: Path) -> Process:
    """Start file mode over the run's files."""
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--backend", "fake"]
    command += ["--task", str(run.directory / "my_task.py:Ask"), "--input", str(run.source[0])]
    env = {"PYTHONPATH": f"{hold}:{ROOT}"}
    return Process(*command, "--output", run.outfile, cwd=run.directory, env=env)


def test_file_mode_answers_lines_before_the_copy_is_whole(tmp_path: Path) -> None:
    (hold := tmp_path / "hold").mkdir()
    (hold / "sitecustomize.py").write_text(HOLD)
    run = Run(tmp_path, *gzip_file(tmp_path))
    process = alone(run, hold)
    try:
        wait_until(lambda: len(run.written) == 25, "all lines so far", deadline_s=90)
        assert is_copied_in_part(run)
        (hold / "go-on").touch()
        assert process.wait(60) == 0, process.output
    finally:
        kill_tree(process)
    assert [json.loads(line) for line in run.written] == rows()


@pytest.mark.parametrize("mode", ["dispatcher run", "dispatcher-task-run"])
def test_an_input_that_is_damaged_behind_its_first_lines_stops_the_run_in_a_sentence(
    mode: str, tmp_path: Path
) -> None:
    (hold := tmp_path / "hold").mkdir()
    (hold / "sitecustomize.py").write_text(HOLD)
    run = Run(tmp_path, *gzip_file(tmp_path))
    process = run.begin(latency_s=0.0) if mode == "dispatcher run" else alone(run, hold)
    try:
        wait_until(lambda: len(run.written) == 25, "all lines so far", deadline_s=90)
        (hold / "go-on").write_text("damaged")
        code, output = ended(process)
    finally:
        kill_tree(process)
    assert code == (1 if mode == "dispatcher run" else 2), output
    said = [line for line in output.splitlines() if line.startswith(f"{mode}: ")]
    assert len(said) == 1, output
    assert "in.jsonl.gz is cut off, after" in said[0]
    assert "a new run with another output" in said[0]
    assert "Traceback" not in output
    assert len(run.written) == 25


def is_copied_in_part(run: Run) -> bool:
    return partial_size(run) > 0 and not (run.state_dir / "input.spool").exists()


def test_a_complete_run_is_left_as_it_is_and_copies_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, *gzip_file(tmp_path))
    assert ended(run.begin(latency_s=0))[0] == 0
    written = run.outfile.stat().st_mtime_ns

    code, output = ended(run.begin())

    assert code == 0, output
    assert f"complete: {LINES} lines" in output
    assert run.outfile.stat().st_mtime_ns == written
    assert not (run.state_dir / "input.spool").exists()


def test_a_run_over_standard_input_is_killed_resumed_and_complete(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    run = Run(tmp_path, "-")
    threading.Thread(target=pipe.write_bytes, args=(lines(),), daemon=True).start()
    before = run.killed_in_the_middle()
    pipe.unlink()

    code, output = ended(run.resume())

    assert code == 0, output
    run.check_complete(before)
    run_file = load_run_file(run.state_dir, Files())
    assert run_file is not None
    assert run_file["command"]["options"]["input"] == "-"
    for complete, has_new_input in ((run.begin, True), (run.resume, False)):
        code, output = ended(complete())
        assert code == 0, output
        assert ("standard input was not read" in output) is has_new_input


def test_standard_input_that_was_not_copied_whole_is_asked_for_again(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    run = Run(tmp_path, "-")
    process = run.begin(latency_s=0)
    with pipe.open("wb", buffering=0) as writer:
        writer.write(lines()[:300])
        wait_until(lambda: partial_size(run) == 300, "the copying", 60)
        kill_tree(process)
    assert partial_size(run) == 300
    pipe.unlink()
    code, output = ended(run.resume())
    assert code == 2
    assert "before all of standard input was copied" in output
    assert not run.written

    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(lines(),), daemon=True).start()
    code, output = ended(run.begin(latency_s=0))
    assert code == 0, output
    run.check_complete([])


def test_compressed_standard_input_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    run = Run(tmp_path, "-")
    for content in (gzip.compress(lines()), lines()):
        process = run.begin(latency_s=0)
        threading.Thread(target=feed, args=(pipe, content), daemon=True).start()
        code, output = ended(process)
        if content != lines():
            assert (code, run.written) == (2, []), output
            assert "zcat FILE | ..." in output
            assert "Traceback" not in output
    assert code == 0, output  # nothing stands in the way of the same command with lines
    run.check_complete([])


def feed(pipe: Path, content: bytes) -> None:
    with suppress(BrokenPipeError):
        pipe.write_bytes(content)


def partial_size(run: Run) -> int:
    path = run.state_dir / "input.partial"
    return path.stat().st_size if path.exists() else -1


def test_a_start_that_was_killed_while_it_copied_begins_the_copy_again(tmp_path: Path) -> None:
    run = Run(tmp_path, *gzip_file(tmp_path))
    run.state_dir.mkdir()
    (run.state_dir / "input.partial").write_bytes(lines()[:300])
    code, output = ended(run.begin(latency_s=0))
    assert code == 0, output
    run.check_complete([])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_whose_pipe_is_silent(
    number: signal.Signals, tmp_path: Path
) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    out = tmp_path / "out.jsonl"
    state = tmp_path / "out.jsonl.dispatch"
    with running(*SERVER, "--infile", pipe, "--outfile", out, "--port", "0") as server:
        wait_until((state / "input.partial").exists, "the copying", 30)
        server.signal(number)
        assert server.wait(15) == 3, server.output
        assert f"dispatcher-server --resume {state}" in server.output
        assert "Traceback" not in server.output
    assert not (state / "input.partial").exists()

    threading.Thread(target=pipe.write_bytes, args=(lines(),), daemon=True).start()
    with running(*SERVER, "--infile", pipe, "--outfile", out, "--port", "0") as server:
        server.wait_for_line(re.compile(r"run \S+ at"))  # nothing stands in its way


def test_ctrl_c_ends_a_local_run_and_file_mode_whose_pipe_is_silent(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "silent")
    run = Run(tmp_path, pipe.name)
    local = run.begin()
    try:
        wait_until(lambda: partial_size(run) == 0, "the copying", 60)
        local.signal(signal.SIGINT)
        assert local.wait(20) == 3, local.output
    finally:
        kill_tree(local)
    assert partial_size(run) == -1
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--backend", "fake"]
    command += ["--task", str(tmp_path / "my_task.py:Ask"), "--state", str(tmp_path / "other")]
    files = ["--input", str(pipe), "--output", str(tmp_path / "other.jsonl")]
    with running(*command, *files) as alone:
        wait_until((tmp_path / "other" / "input.partial").exists, "the copying", 60)
        alone.signal(signal.SIGINT)
        assert alone.wait(20) == 3, alone.output
        assert "Traceback" not in alone.output
    assert not (tmp_path / "other" / "input.partial").exists()


def test_a_changed_original_is_refused_when_a_run_goes_on_or_is_complete(tmp_path: Path) -> None:
    run = Run(tmp_path, *gzip_file(tmp_path))
    run.killed_in_the_middle()
    write_gzip(tmp_path, lines() + b'{"id": 40, "word": "more"}\n')
    code, output = ended(run.resume())
    assert code == 1, output
    assert "in.jsonl.gz is not the one this run began with: its size" in output

    gzip_file(tmp_path)
    code, output = ended(run.resume())
    assert code == 0, output
    write_gzip(tmp_path, lines()[:-1])
    code, output = ended(run.begin())
    assert code == 1, output
    assert "is not the one this run began with" in output


def test_a_damaged_input_is_refused_in_a_sentence_and_nothing_is_begun(tmp_path: Path) -> None:
    (name,) = gzip_file(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-30])
    run = Run(tmp_path, name)
    code, output = ended(run.begin())
    assert code == 2, output
    said = [line for line in output.splitlines() if line.startswith("dispatcher run: ")]
    assert len(said) == 1, output
    assert str(path) in said[0]
    assert "could be read" in said[0]
    assert "Traceback" not in output
    assert not run.outfile.exists()
