"""A model server as a child process: what it says last, and that it never outlives its owner."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.process import ServerProcess
from tests.support.processes import running, wait_until
from tests.taskmanager.doubles import run, until

START_S = 10.0
"""Above what a start takes on a busy machine, so that only a hang reaches it."""

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("pids", os.getpid(), child.pid, "end", flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""
OWNER = """
import asyncio, sys
from pathlib import Path
from dispatcher.taskmanager.backend.process import ServerProcess

async def main():
    log = Path(sys.argv[1])
    process = ServerProcess("it", [sys.executable, "-c", sys.argv[2]], log, {})
    await process.start()
    match = await process.wait_for_line(r"pids (\\d+) (\\d+) end", 10)
    print("server", *match.groups(), flush=True)
    await process.wait()

asyncio.run(main())
"""


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that only waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


@asynccontextmanager
async def started(
    log: Path, *code: str, env: dict[str, str] | None = None
) -> AsyncIterator[ServerProcess]:
    """Run Python code as a server, and end it."""
    process = ServerProcess("the engine", [sys.executable, "-c", *code], log, env or {})
    await process.start()
    try:
        yield process
    finally:
        await process.stop(0.1)


def test_it_waits_for_the_line_that_says_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "import time; print('serving at http://x:81', flush=True); time.sleep(60)"
        async with started(tmp_path / "a" / "it.log", code) as process:
            match = await process.wait_for_line(r"serving at (http\S+)", START_S)
            assert match[1] == "http://x:81"
            assert process.exit_code is None

    run(scenario(), START_S)


def test_a_server_that_ends_before_it_is_ready_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "import sys; [print('line', n) for n in range(50)]; sys.exit('no GPU is free')"
        async with started(tmp_path / "it.log", code) as process:
            with pytest.raises(BackendError) as caught:
                await process.wait_for_line("never said", START_S)

            text = str(caught.value)
            assert text.startswith("the engine ended with exit code 1; its log ")
            assert str(tmp_path / "it.log") in text
            assert text.endswith("no GPU is free")
            assert "line 49" in text
            assert "line 29\n" not in text  # the last lines, not all of them

    run(scenario(), START_S)


def test_the_last_lines_are_the_last_ones_however_long_the_log_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "print(('x' * 99 + '\\n') * 20_000); print('the real reason'); raise SystemExit(3)"
        async with started(tmp_path / "it.log", code) as process:
            assert await process.wait() == 3
            with pytest.raises(BackendError, match="the real reason"):
                process.check_alive()

    run(scenario(), START_S)


def test_lines_that_tell_nothing_do_not_hide_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "print('the real reason'); [print('leaked', n) for n in range(99)]; print('bye')"
        command = [sys.executable, "-c", code]
        process = ServerProcess("it", command, tmp_path / "it.log", {}, noise="^leaked")
        await process.start()
        await process.wait()
        assert process.last_lines() == "the real reason\nbye"
        assert "leaked 98" in process.tail()
        await process.stop()

    run(scenario(), START_S)


def test_what_became_of_it_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(tmp_path / "it.log", "print('last words')") as process:
            await process.wait()
            expected = f"the engine hangs; its log {tmp_path / 'it.log'} ends with:\nlast words"
            assert str(process.failure("hangs")) == expected
        async with started(tmp_path / "silent.log", "pass") as process:
            await process.wait()
            assert str(process.failure("hangs")) == "the engine hangs"

    run(scenario(), START_S)


def test_stopping_again_does_not_touch_a_group_that_may_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with started(tmp_path / "it.log", "pass") as process:
            await process.stop(1)
            monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("a signal to nobody"))
            await process.stop(1)

    run(scenario(), START_S)


def test_a_line_behind_a_long_log_is_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "print(('x' * 99 + '\\n') * 20_000); print('ready', flush=True); input()"
        async with started(tmp_path / "it.log", code) as process:
            await process.wait_for_line("ready", 3)

    run(scenario(), START_S)


def test_an_earlier_servers_output_in_the_same_log_is_not_taken_for_this_ones(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        log = tmp_path / "it.log"
        async with started(log, "print('ready for the first time')") as process:
            await process.wait()
        async with started(log, "raise SystemExit('second')") as process:
            with pytest.raises(BackendError) as caught:
                await process.wait_for_line("ready", START_S)
            assert "first time" not in str(caught.value)
        assert "first time" in log.read_text()  # which is kept

    run(scenario(), START_S)


def test_a_server_that_does_not_get_ready_in_time_is_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "print('loading', flush=True); import time; time.sleep(60)"
        async with started(tmp_path / "it.log", code) as process:
            await process.wait_for_line("loading", START_S)
            with pytest.raises(BackendError, match="was not ready within 0 s") as caught:
                await process.wait_for_line("ready", 0.2)
            assert str(caught.value).endswith("loading")

    run(scenario(), START_S)


def test_a_command_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = ServerProcess("it", ["/no/such/command"], tmp_path / "it.log", {})
        await process.start()
        with pytest.raises(BackendError, match="/no/such/command"):
            await process.wait_for_line("ready", START_S)
        await process.stop(0.1)

    run(scenario(), START_S)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "file").write_text("")
        process = ServerProcess("it", ["true"], tmp_path / "file" / "it.log", {})
        with pytest.raises(BackendError, match="cannot launch it: "):
            await process.start()
        await process.stop()  # harmless

    run(scenario(), START_S)


def test_its_environment_is_ours_and_what_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INHERITED", "yes")

    async def scenario() -> None:
        code = "import os; print(os.environ['INHERITED'], os.environ['ADDED'])"
        async with started(tmp_path / "it.log", code, env={"ADDED": "too"}) as process:
            await process.wait_for_line("yes too", START_S)

    run(scenario(), START_S)


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_its_exit_code_is_the_servers_own(tmp_path: Path, code: str, expected: int) -> None:
    async def scenario() -> None:
        async with started(tmp_path / "it.log", code) as process:
            assert await process.wait() == expected
            assert process.exit_code == expected

    run(scenario(), START_S)


def test_stopping_ends_the_server_with_all_its_children(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(tmp_path / "it.log", PARENT) as process:
            match = await process.wait_for_line(r"pids (\d+) (\d+) end", START_S)
            pids = [int(pid) for pid in match.groups()]
            assert all(map(is_alive, pids))
            await process.stop(5)
            await until(lambda: not any(map(is_alive, pids)), "both are gone", 2)
            await process.stop(5)  # again: harmless

    run(scenario(), START_S)


def test_a_server_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(tmp_path / "it.log", STUBBORN) as process:
            await process.wait_for_line("ready", START_S)
            await asyncio.wait_for(process.stop(0.1), 3)
            assert process.exit_code is not None

    run(scenario(), START_S)


def test_stopping_gives_the_server_time_to_end_well(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = (
            "import signal, sys, time\n"
            "def end(*_):\n    time.sleep(0.1)\n    print('ended well')\n    sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(60)"
        )
        async with started(tmp_path / "it.log", code) as process:
            await process.wait_for_line("ready", START_S)
            await process.stop(5)
            assert process.exit_code == 0
            assert "ended well" in process.last_lines()

    run(scenario(), START_S)


def test_children_that_a_dead_server_left_are_ended_by_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = PARENT.replace("time.sleep(60)\n", "os._exit(1)\n")
        async with started(tmp_path / "it.log", code) as process:
            match = await process.wait_for_line(r"pids (\d+) (\d+) end", START_S)
            await process.wait()
            assert is_alive(int(match[2]))
            await process.stop(0.1)
            await until(lambda: not is_alive(int(match[2])), "the child is gone", 2)

    run(scenario(), START_S)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_server_does_not_outlive_its_owner_however_that_ends(
    tmp_path: Path, signum: signal.Signals
) -> None:
    with running(sys.executable, "-c", OWNER, tmp_path / "it.log", PARENT) as owner:
        match = owner.wait_for_line(re.compile(r"server (\d+) (\d+)"))
        pids = [int(pid) for pid in match.groups()]
        try:
            assert all(map(is_alive, pids))
            os.kill(owner._popen.pid, signum)
            wait_until(lambda: not any(map(is_alive, pids)), "server and child are gone", 5)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
