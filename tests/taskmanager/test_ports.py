"""Ports for model servers: never the same one twice, whoever dies and however."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.ports import lease_port, usable_ports
from tests.support.processes import Process, running, wait_until

PORTS = range(21_000, 21_040)

HOLDER = """
import sys, time
from pathlib import Path
from dispatcher.taskmanager.backend.ports import lease_port
leases = [lease_port(Path(sys.argv[1]), range(21_000, 21_040)) for _ in range(int(sys.argv[2]))]
print("holds", *(lease.port for lease in leases), flush=True)
time.sleep(60)
"""


def ports_of(process: Process) -> list[int]:
    wait_until(lambda: "\n" in process.output or process.has_ended, "its ports")
    words = process.output.split()
    assert words[0] == "holds", process.output
    return [int(word) for word in words[1:]]


def test_eight_processes_that_start_at_once_share_forty_ports_without_a_clash(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        command = (sys.executable, "-c", HOLDER, tmp_path / "locks", "5")
        processes = [stack.enter_context(running(*command)) for _ in range(8)]
        held = [port for process in processes for port in ports_of(process)]

        assert sorted(held) == list(PORTS)
        with pytest.raises(BackendError, match=r"40 of those from 21000 to 21039 were tried"):
            lease_port(tmp_path / "locks", PORTS)


def test_the_ports_of_a_killed_process_are_free_again(tmp_path: Path) -> None:
    with running(sys.executable, "-c", HOLDER, tmp_path / "locks", "40") as process:
        assert sorted(ports_of(process)) == list(PORTS)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lease_port(tmp_path / "locks", PORTS).release()


def test_a_child_that_outlives_the_holder_does_not_keep_the_port(tmp_path: Path) -> None:
    code = HOLDER.replace("print(", "import subprocess\nsubprocess.Popen(['sleep', '60'])\nprint(")
    with running(sys.executable, "-c", code, tmp_path / "locks", "40") as process:
        assert len(ports_of(process)) == 40
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: process.has_ended, "its end")
        lease_port(tmp_path / "locks", PORTS).release()
        os.killpg(process.pid, signal.SIGKILL)  # the sleeper


def test_a_released_port_can_be_leased_again(tmp_path: Path) -> None:
    first = lease_port(tmp_path / "locks", [21_050])
    with pytest.raises(BackendError, match="no port is free"):
        lease_port(tmp_path / "locks", [21_050])
    first.release()
    first.release()  # again: harmless, and no other file is closed
    second = lease_port(tmp_path / "locks", [21_050])
    assert second.port == 21_050
    second.release()


def test_a_port_that_another_program_listens_on_is_passed_over(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("0.0.0.0", 21_060))
        other.listen()
        with pytest.raises(BackendError, match="no port is free"):
            lease_port(tmp_path / "locks", [21_060])
        lease = lease_port(tmp_path / "locks", [21_060, 21_061])
        assert lease.port == 21_061
        lease.release()


def test_ports_that_the_kernel_gives_to_connections_are_not_used(tmp_path: Path) -> None:
    file = tmp_path / "range"
    file.write_text("32768\t60999\n")
    assert usable_ports(file) == range(10_000, 32_768)
    file.write_text("10240\t20000\n")
    assert usable_ports(file) == range(20_001, 65_536)
    file.write_text("1024\t65535\n")
    assert usable_ports(file) == range(10_000, 65_536)  # there is no other choice
    assert usable_ports(tmp_path / "missing") == range(10_000, 65_536)


def test_the_directory_is_private_and_found_again(tmp_path: Path) -> None:
    place = tmp_path / "locks"
    lease_port(place, [21_070]).release()
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "21070").stat().st_mode & 0o777 == 0o600
    lease_port(place, [21_070]).release()


def test_it_lies_in_the_temporary_directory_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lease = lease_port()
    assert (tmp_path / f"dispatcher-ports-{os.geteuid()}" / str(lease.port)).exists()
    lease.release()


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
def test_a_directory_that_others_can_look_into_is_refused(tmp_path: Path, mode: int) -> None:
    place = tmp_path / "locks"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(BackendError, match=f"{place}, .* is open to other users; remove it, or"):
        lease_port(place, PORTS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "locks"
    place.mkdir(mode=0o700)
    os.chown(place, 12345, -1)
    with pytest.raises(BackendError, match="open to other users"):
        lease_port(place, PORTS)


def test_a_link_is_followed_neither_to_a_directory_nor_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(BackendError, match="set TMPDIR to a directory of your own"):
        lease_port(tmp_path / "link", PORTS)

    (tmp_path / "real" / "21080").symlink_to(tmp_path / "victim")
    with pytest.raises(BackendError, match=r"cannot lock .*21080"):
        lease_port(tmp_path / "real", [21_080])
    assert not (tmp_path / "victim").exists()


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "locks"
    place.mkdir(mode=0o700)
    os.mkfifo(place / "21090", 0o600)
    lease = lease_port(place, [21_090, 21_091])
    assert lease.port == 21_091
    lease.release()
