"""`<state>/spool/`: results that workers could not hand in, on their way to the server.

A worker writes all that the server has not acknowledged into one file, under a new name each
time, and then removes its file before that. So a file with a name is whole and never changes, and
the server that took it in deletes exactly what it read.

    @spool 1 RUN CRC LF
    @WORK_ID LEASE LENGTH CRC LF      for each result, followed by
    result LF                         its LENGTH bytes
    @end COUNT CRC LF

RUN is the run's id, COUNT the number of results. A CRC is the CRC-32 of what stands before it in
its line, and of the result.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

from dispatcher.errors import SpoolFileError, SpoolUnreadableError, StorageError, UsageError
from dispatcher.models import ResultItem, WorkItem
from dispatcher.server_file import read_server_file
from dispatcher.storage.files import Files

SPOOL_DIR = "spool"
SUFFIX = ".results"
FILE_BYTES = 256 << 20
"""How large a file may get; a worker keeps further results in memory."""

READ_BYTES = 4 << 20
"""How much is read at a time, unless one result alone is larger."""

_WRITE_BYTES = 1 << 20
_LARGEST_RESULT = 64 << 20
_LONGEST_LINE = 256
_LONGEST_NAME = 100
_FIRST = re.compile(rb"@spool 1 ([!-~]{1,64}) ([0-9a-f]{8})\n")
_RESULT = re.compile(rb"@(\d{1,18}) ([!-~]{1,64}) (\d{1,10}) ([0-9a-f]{8})\n")
_END = re.compile(rb"@end (\d{1,18}) ([0-9a-f]{8})\n")
_CRC_BYTES = 9  # with the line end
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_REMEDY = "nothing is taken from it; remove it"
_WAITS = "what is in it waits, and is tried again"


class SpoolWriter:
    """A worker's file in the spool of the run that `server_file` (or its directory) tells of.

    Calls block, and wait for one another; any thread may make them.
    """

    def __init__(self, server_file: Path, worker: str, files: Files | None = None) -> None:
        self._server_file = server_file.absolute()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", worker)[:_LONGEST_NAME].lstrip(".") or "worker"
        # Whoever has the same name, or had it before, has other files.
        self._name = f"{name}.{secrets.token_hex(4)}"
        self._files = files or Files()
        self._count = 0
        self._paths: list[Path] = []
        self._lock = threading.Lock()

    @property
    def paths(self) -> list[Path]:
        """What was written and not removed: one file, or two after a failure."""
        return list(self._paths)

    def write(self, items: Sequence[WorkItem]) -> int:
        """Have these results in the spool, durably, instead of those of the call before.

        Returns how many of them, from the first on, were seen to: the file's size is bounded, and
        results of another run are left out. Raises StorageError, and then what was there is there.
        """
        with self._lock:
            directory, run = self._look()
            if all(item.run != run for item in items):
                raise StorageError(f"{directory.parent} is that of another run, {run}, by now")
            self._count += 1
            path = directory / f"{self._name}.{self._count}{SUFFIX}"
            try:
                count = self._write(path, items, run)
            except OSError as error:
                raise StorageError(f"cannot write {path}: {error.strerror}") from error
            *before, path = self._paths
            self._paths = [path]
            self._remove(before)
            return count

    def remove(self) -> None:
        """Take back what was written: the server has it."""
        with self._lock:
            before, self._paths = self._paths, []
            self._remove(before)

    def _look(self) -> tuple[Path, str]:
        """Return the spool directory and the id of the run that it is part of."""
        path = self._server_file
        try:
            found = read_server_file(path)
            state_dir = path if path.is_dir() else path.parent
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        except UsageError as error:
            raise StorageError(str(error)) from error
        if found.state == "complete":
            raise StorageError(f"the run in {state_dir} is complete without them")
        return state_dir / SPOOL_DIR, found.run

    def _write(self, path: Path, items: Sequence[WorkItem], run: str) -> int:
        # As Files.write_whole, but piece by piece: this may be a lot.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = self._files.open(partial, flags, 0o600)
        try:
            try:
                seen = self._write_results(fd, items, run)
                self._files.sync(fd)
            finally:
                self._files.close(fd)
            self._files.rename(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                self._files.unlink(partial)
            raise
        self._paths.append(path)
        self._files.sync_dir(path.parent)
        return seen

    def _write_results(self, fd: int, items: Sequence[WorkItem], run: str) -> int:
        data = bytearray(_with_crc(f"@spool 1 {run} "))
        offset = seen = written = 0
        for item in items:
            result = _bytes_of(item, run)
            if result is not None:
                if offset + len(data) + len(result) > FILE_BYTES:
                    break
                data += _with_crc(f"@{item.work_id} {item.lease} {len(result)} ", result)
                data += result
                data += b"\n"
                written += 1
            seen += 1
            if len(data) > _WRITE_BYTES:
                self._files.write_at(fd, data, offset)
                offset += len(data)
                data.clear()
        data += _with_crc(f"@end {written} ")
        self._files.write_at(fd, data, offset)
        return seen

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):  # the server takes it, which does no harm
                self._files.unlink(path)


def _bytes_of(item: WorkItem, run: str) -> bytes | None:
    """Return the result as it stands in the file; None when it cannot be one of this run."""
    if item.run != run or item.result is None or not item.lease or " " in item.lease:
        return None
    try:
        return item.result.encode()
    except UnicodeEncodeError:
        return None  # half a surrogate pair, which is no result


def _with_crc(head: str, body: bytes = b"") -> bytes:
    return b"%b%08x\n" % (head.encode(), zlib.crc32(body, zlib.crc32(head.encode())))


class Spool:
    """The spool of a run, as its server sees it. Calls block."""

    def __init__(self, state_dir: Path, files: Files) -> None:
        self._directory = state_dir / SPOOL_DIR
        self._files = files

    def names(self) -> list[str]:
        """Return the files that wait. Raises SpoolUnreadableError when that cannot be told."""
        try:
            names = self._files.names(self._directory)
        except OSError as error:
            raise SpoolUnreadableError(
                f"cannot list {self._directory}: {error.strerror}; what workers left there waits"
            ) from error
        return [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]

    def open(self, name: str, run: str) -> SpoolFile | None:
        """Open a file to read the results of `run` in it; None when it is not there any more.

        Raises SpoolFileError when it cannot be trusted or is of another run, and
        SpoolUnreadableError when the file system does not let it be read now.
        """
        path = self._directory / name
        try:
            # Not blocking, so that a pipe in the file's place is refused and not waited for.
            fd = self._files.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if path.is_symlink():
                problem = "is a symbolic link, which is not followed"
                raise SpoolFileError(f"{path} {problem}; {_REMEDY}") from error
            raise SpoolUnreadableError(f"cannot open {path}: {error.strerror}; {_WAITS}") from error
        try:
            _check_private(path, os.fstat(fd))
            return SpoolFile(path, fd, run, self._files)
        except BaseException:  # whatever it was, nobody else would close it
            self._files.close(fd)
            raise

    def remove(self, name: str) -> None:
        """Delete a file whose results are in the journal."""
        with contextlib.suppress(OSError):  # it is taken in again, which changes nothing
            self._files.unlink(self._directory / name)

    def remove_all(self, run: str) -> None:
        """Delete what workers of `run`, which is complete, left; what is not theirs stays."""
        for name in self._names_or_none():
            path = self._directory / name
            if name.startswith(".") and f"{SUFFIX}." in name and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    self._files.unlink(path)
            elif name.endswith(SUFFIX):
                with contextlib.suppress(SpoolFileError):
                    if (file := self.open(name, run)) is not None:
                        file.close()
                        self.remove(name)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _names_or_none(self) -> list[str]:
        try:
            return self._files.names(self._directory)
        except OSError:
            return []


def _check_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SpoolFileError(f"{path} is not a regular file; {_REMEDY}")
    if found.st_uid not in (os.geteuid(), 0):
        raise SpoolFileError(f"{path} belongs to another user; {_REMEDY}")
    if found.st_mode & _OTHERS:
        raise SpoolFileError(
            f"{path} could be read or changed by others (its mode is "
            f"{stat.S_IMODE(found.st_mode):04o}); {_REMEDY}"
        )
    if found.st_size > FILE_BYTES + _WRITE_BYTES:
        raise SpoolFileError(f"{path} is larger than any file a worker writes; {_REMEDY}")


class SpoolFile:
    """An open file of results of `run`, read piece by piece. Raises SpoolFileError."""

    def __init__(self, path: Path, fd: int, run: str, files: Files) -> None:
        self._path = path
        self._fd = fd
        self._run = run
        self._files = files
        self._offset = 0
        self._ahead = b""
        self._place = 0
        self._count = 0
        self._ended = False
        self._problem: SpoolFileError | None = None
        match = self._match(_FIRST)
        if match is None:
            raise SpoolFileError(f"{path} is not a file of results; {_REMEDY}")
        if (other := match[1].decode()) != run:
            raise SpoolFileError(f"{path} holds results of another run, {other}; {_REMEDY}")

    def next_results(self) -> list[ResultItem]:
        """Return the next results; none at the end.

        Where the file is damaged the results before that come first, the error with the next call.
        """
        results: list[ResultItem] = []
        size = 0
        while not self._ended and self._problem is None and size < READ_BYTES:
            try:
                found = self._next()
            except SpoolFileError as error:
                self._problem = error
                break
            if found is not None:
                results.append(found)
                size += len(found.result or "")
        if self._problem is not None and not results:
            raise self._problem
        return results

    def close(self) -> None:
        """Close the file."""
        self._files.close(self._fd)

    def _next(self) -> ResultItem | None:
        if (match := self._match(_RESULT)) is not None:
            return self._read_result(match)
        match = self._match(_END)
        if match is None or int(match[1]) != self._count:
            raise self._damage()
        self._ended = True
        return None

    def _read_result(self, match: re.Match[bytes]) -> ResultItem:
        length = int(match[3])
        if length > _LARGEST_RESULT:
            raise self._damage()
        self._read_ahead(length + 1)
        end = self._place + length
        result = self._ahead[self._place : end]
        crc = zlib.crc32(result, zlib.crc32(match[0][:-_CRC_BYTES]))
        if self._ahead[end : end + 1] != b"\n" or crc != int(match[4], 16):
            raise self._damage()
        try:
            text = result.decode()
        except UnicodeDecodeError:
            raise self._damage() from None
        self._place = end + 1
        self._count += 1
        return ResultItem(int(match[1]), text, self._run, match[2].decode())

    def _match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Go behind the line that begins here, if it is like this and, but for a result, sound."""
        self._read_ahead(_LONGEST_LINE)
        match = pattern.match(self._ahead, self._place)
        if match is None:
            return None
        if pattern is not _RESULT and zlib.crc32(match[0][:-_CRC_BYTES]) != int(match[2], 16):
            return None
        self._place = match.end()
        return match

    def _read_ahead(self, length: int) -> None:
        """Have so many bytes ready behind the place, fewer at the end of the file."""
        if len(self._ahead) - self._place >= length:
            return
        try:
            part = self._files.read_at(self._fd, max(length, _WRITE_BYTES), self._offset)
        except OSError as error:
            problem = f"cannot read {self._path}: {error.strerror}; {_WAITS}"
            raise SpoolUnreadableError(problem) from error
        self._ahead = self._ahead[self._place :] + part
        self._place = 0
        self._offset += len(part)

    def _damage(self) -> SpoolFileError:
        return SpoolFileError(
            f"{self._path} is damaged or cut off behind its result {self._count}; what stands "
            "before that is taken, the other lines are answered again"
        )
