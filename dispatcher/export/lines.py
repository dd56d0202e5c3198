"""The lines of an output that are exported, and what each says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from dispatcher.core.results import error_kind
from dispatcher.errors import StateError
from dispatcher.runs.lines import unreadable

ERROR = "__ERROR__"
_BUFFER_BYTES = 1 << 20
_ESCAPES = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    r"|\\."
)
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class OutputLine:
    """One line, without its line end; `is_error` for one that is no answer."""

    work_id: int
    text: bytes
    is_error: bool


class OutputLines:
    """The whole lines that an output had when it was opened, as often as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb", buffering=_BUFFER_BYTES)
            self.size_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise unreadable(f"the output {path}", error) from error

    def __iter__(self) -> Iterator[OutputLine]:
        """Yield the lines from the first on. Raises StorageError."""
        left = self.size_bytes
        try:
            self._file.seek(0)
            for work_id, line in enumerate(self._file):
                left -= len(line)
                if left < 0 or not line.endswith(b"\n"):
                    return  # written since, or being written
                yield OutputLine(work_id, line[:-1], bool(error_kind(line)))
        except OSError as error:
            raise unreadable(f"the output {self.path}", error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def value_of(self, line: OutputLine) -> Any:
        """Return what a line says. Raises StateError when it is no JSON, or nested too deeply.

        What no file but JSON can hold, half of a surrogate pair, is replaced.
        """
        try:
            try:
                return _decode(line.text)
            except msgspec.MsgspecError:
                pass  # numbers beyond all bounds, half surrogates, or no JSON
            return json.loads(_cleaned(line.text))
        except RecursionError as error:
            raise self.too_deep(line) from error
        except ValueError as error:
            raise StateError(
                f"line {line.work_id} of {self.path} is no JSON ({error}); restore the output"
            ) from error

    def error_of(self, line: OutputLine) -> Any:
        """Return what an `__ERROR__` line says: all of it, if it has other keys too."""
        value = self.value_of(line)
        return value[ERROR] if len(value) == 1 else value

    def too_deep(self, line: OutputLine) -> StateError:
        """Return what to raise for a line whose lists and objects are nested too deeply."""
        return StateError(
            f"line {line.work_id} of {self.path} is nested too deeply for columns; export it to "
            ".jsonl.zst instead"
        )


def _cleaned(text: bytes) -> str:
    """Replace halves of surrogate pairs, as they are and escaped.

    In the text, as a value could be nested more deeply than a function may call itself.
    """
    in_pairs = text.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
    return _ESCAPES.sub(_whole_escape, in_pairs.decode("utf-16", "replace"))


def _whole_escape(found: re.Match[str]) -> str:
    return r"\ufffd" if found["half"] else found[0]
