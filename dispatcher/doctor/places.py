"""Where output and state go: can they be written, do writes last, is there room, do locks hold?"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from dispatcher.doctor.finding import Finding, Status, ok, problem, size_text, warning
from dispatcher.doctor.lines import Sample
from dispatcher.storage.files import Files
from dispatcher.storage.run_state import STARTING, load_run_file

MOUNTS = Path("/proc/self/mounts")
_SYNCS = 5
_PROBE_BYTES = 1 << 16
_SLOW_SYNC_S = 0.1
_UNUSABLE_SYNC_S = 2.0
_SKEW_S = 5.0
_LOCK_TEST_S = 30.0
_GUESSED_GROWTH = 2.0
_STATE_BYTES = 256 << 20
"""What the journal and logs of a small run take."""

_KINDS: Mapping[str, tuple[Status, str, str]] = {
    "nfs": ("ok", "NFS, which all nodes of a cluster can share", ""),
    "lustre": ("ok", "Lustre, which all nodes of a cluster can share", ""),
    "gpfs": ("ok", "GPFS, which all nodes of a cluster can share", ""),
    "beegfs": ("ok", "BeeGFS, which all nodes of a cluster can share", ""),
    "ceph": ("ok", "CephFS, which all nodes of a cluster can share", ""),
    "tmpfs": (
        "warning",
        "memory (tmpfs), which is lost with the machine or the job",
        "name a directory on a disk",
    ),
    "overlay": (
        "warning",
        "a container's own layer, which is lost with the container",
        "bind-mount a directory of the host, and name that",
    ),
}
_ALIASES = {"nfs4": "nfs", "ramfs": "tmpfs", "fuse.ceph": "ceph", "fuse-overlayfs": "overlay"}
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs")

_TRY_LOCK = """
import sys
from filelock import FileLock, Timeout
try:
    FileLock(sys.argv[1]).acquire(timeout=0)
except Timeout:
    print("held")
else:
    print("got")
"""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run writes: its output, and its state directory."""

    output: Path
    state_dir: Path

    @property
    def directories(self) -> list[Path]:
        """The directories that exist and will be written to, each once."""
        found = [_existing(self.output.parent), _existing(self.state_dir)]
        return found[:1] if found[0] == found[1] else found


@dataclass(slots=True)
class Probe:
    """What writing to a directory for real showed. `skew_s`: how far its clock is from ours."""

    directory: Path
    sync_s: list[float] = field(default_factory=list)
    skew_s: float = 0.0


def check_output(places: Places) -> Finding:
    """Say whether a run may begin or go on with this output. Raises StateError."""
    run_file = load_run_file(places.state_dir, Files())
    state = (run_file or {}).get("state")
    output = places.output
    if output.is_dir():
        return problem("output", f"{output} is a directory", "name a file in it")
    size = output.stat().st_size if output.exists() else 0
    if run_file is None or state == STARTING:
        if size:
            return problem(
                "output",
                f"{output} exists ({size_text(size)}), but {places.state_dir} holds no run that "
                "wrote it",
                "name another output, or the state directory of its run with --state",
            )
        return ok("output", f"{output} is to be written, its state to {places.state_dir}")
    if state == "complete":
        return ok("output", f"{output} is complete; the same command says so and ends")
    return ok("output", f"{places.state_dir} holds a run, with which the same command goes on")


def check_writing(probe: Probe) -> Finding:
    """Write, sync and rename in a directory, and say how long a sync takes."""
    check = f"writing to {probe.directory}"
    try:
        with _probe_file(probe.directory) as path:
            _write_for_real(path, probe)
    except OSError as error:
        return problem(
            check,
            f"it cannot be written to: {error.strerror}",
            "give --output and --state places you may write to",
        )
    return judge_syncs(check, probe.sync_s)


def judge_syncs(check: str, sync_s: Sequence[float]) -> Finding:
    """Say what the times of some syncs mean for a run."""
    usual_s = statistics.median(sync_s)
    found = f"written, synced and renamed; a sync takes {1000 * usual_s:.1f} ms"
    if max(sync_s) > 2 * usual_s:
        found += f" (the slowest of {len(sync_s)}: {1000 * max(sync_s):.1f} ms)"
    if usual_s >= _UNUSABLE_SYNC_S:
        return problem(check, found, "no result is acknowledged sooner: use another file system")
    if usual_s >= _SLOW_SYNC_S:
        return warning(
            check, found, "every acknowledgement waits for one: put --state on a quicker disk"
        )
    return ok(check, found)


def check_clock(probes: list[Probe]) -> Finding:
    """Compare this machine's clock with those of the file systems."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    far = [probe for probe in probes if probe.sync_s and abs(probe.skew_s) > _SKEW_S]
    if far:
        return warning(
            "clock",
            f"it is {now}, but files in {far[0].directory} are dated {far[0].skew_s:+.0f} s from "
            "that",
            "have both machines' clocks set by the same time servers",
        )
    if time.time() < 1_700_000_000:
        return problem("clock", f"it is {now}, which is past", "set the clock: TLS refuses it")
    return ok("clock", now)


def check_file_system(directory: Path, mounts: str) -> Finding:
    """Say on what kind of file system a directory is, and what that means for a run."""
    check = f"file system of {directory}"
    kind, options = mount_of(directory.resolve(), mounts)
    known = _KINDS.get(_ALIASES.get(kind, kind))
    if known is not None:
        status, meaning, fix = known
        if kind.startswith("nfs") and {"nolock", "local_lock=all"} & set(options.split(",")):
            return warning(
                check,
                f"{meaning}, mounted so that locks end at the node",
                "a run is then kept to one server by its claim alone, which takes half a minute "
                "after a crash; mount it without nolock",
            )
        return Finding(check, status, meaning, fix)
    if kind in _LOCAL:
        hint = "task managers on other nodes need a directory that all nodes share"
        return ok(check, f"{kind}, of this machine alone", hint)
    return ok(check, f"{kind or 'unknown'}, of which nothing is known here")


def mount_of(path: Path, mounts: str) -> tuple[str, str]:
    """Return kind and options of the file system a path is on, by the text of /proc/mounts."""
    found, best = ("", ""), -1
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 4:
            continue
        # A blank stands there as \040.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[1])
        # Of two at one place, the later one hides the earlier.
        if path.is_relative_to(point) and len(point) >= best:
            found, best = (words[2], words[3]), len(point)
    return found


def check_locks(directory: Path) -> Finding:
    """Let another process try a lock that this one has, and then one that it has not."""
    check = f"locks in {directory}"
    try:
        with _probe_file(directory) as path:
            lock = FileLock(path)
            lock.acquire(timeout=0)
            try:
                while_held = _tried_by_another(path)
            finally:
                lock.release()
            when_free = _tried_by_another(path)
    except (OSError, NotImplementedError, subprocess.SubprocessError) as error:
        said = getattr(error, "strerror", None) or str(error)
        return warning(check, f"there are none here: {said}", _WITHOUT_LOCKS)
    if (while_held, when_free) == ("held", "got"):
        return ok(check, "they hold between processes of this machine")
    return warning(
        check, f"another process {while_held} one that was taken, {when_free} a free one",
        _WITHOUT_LOCKS,
    )  # fmt: skip


_WITHOUT_LOCKS = (
    "a run is kept to one server by its claim alone, which works, but takes half a minute after a "
    "crash"
)


def check_space(places: Places, sample: Sample | None, bytes_per_line: float | None) -> Finding:
    """Compare the free space with what the output and the journal will take."""
    free = min(shutil.disk_usage(directory).free for directory in places.directories)
    written = places.output.stat().st_size if places.output.exists() else 0
    if sample is None:
        return ok("space", f"{size_text(free)} free; without an input nothing tells what it takes")
    if bytes_per_line is not None:
        expected = sample.lines_in_all * bytes_per_line
        basis = f"at {bytes_per_line:g} bytes a line"
    else:
        expected = _GUESSED_GROWTH * sample.size_bytes
        basis = "guessed as twice the input; --preview tells --expect-bytes-per-line"
    expected = max(0.0, expected - written)
    # Results that wait for an earlier line are in the journal until it is done.
    found = f"{size_text(free)} free, about {size_text(expected)} of output to come ({basis})"
    state_bytes = _STATE_BYTES + sample.copied_bytes
    if sample.copied_bytes:
        found += f", {size_text(sample.copied_bytes)} for a copy of the input beside the state"
    if free < expected + state_bytes:
        return problem("space", found, "make room, or put --output elsewhere")
    if free < 2 * expected + state_bytes:
        return warning(
            "space", found, "the journal may take as much again while a line holds the others up"
        )
    return ok("space", found)


# -------------------------------------------------------------------- inside


def _existing(directory: Path) -> Path:
    """Return the directory, or the nearest one above it that is there already."""
    directory = directory.absolute()
    while not directory.is_dir() and directory != directory.parent:
        directory = directory.parent
    return directory


@contextmanager
def _probe_file(directory: Path) -> Iterator[Path]:
    path = directory / f".dispatcher-doctor.{secrets.token_hex(8)}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write_for_real(path: Path, probe: Probe) -> None:
    files = Files()
    renamed = path.with_suffix(".renamed")
    fd = files.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        for place in range(_SYNCS):
            files.write_at(fd, os.urandom(_PROBE_BYTES), place * _PROBE_BYTES)
            begun_at = time.perf_counter()
            files.sync(fd)
            probe.sync_s.append(time.perf_counter() - begun_at)
        probe.skew_s = os.fstat(fd).st_mtime - time.time()
    finally:
        files.close(fd)
    try:
        files.rename(path, renamed)
        files.sync_dir(path.parent)
    finally:
        files.unlink(renamed)


def _tried_by_another(path: Path) -> str:
    tried = subprocess.run(
        [sys.executable, "-c", _TRY_LOCK, str(path)],
        capture_output=True,
        text=True,
        timeout=_LOCK_TEST_S,
        check=False,
    )
    return tried.stdout.strip() or "could not try"
