"""Is the input there, and are its lines what a task can be given?"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from dispatcher.doctor.finding import Finding, ok, problem, size_text, warning
from dispatcher.input_options import InputOptions, is_standard_input
from dispatcher.storage.inputs.beginning import Beginning, beginning_of
from dispatcher.storage.inputs.compressed import FIRST_BYTES
from dispatcher.storage.inputs.opening import reader_of
from dispatcher.storage.inputs.reader import InputReader
from dispatcher.storage.lines import InputLine
from dispatcher.storage.source import LineSource

CHECK = "input"
_WHOLE_BYTES = 4 << 20
_PART_BYTES = 1 << 20
_PART_LINES = 500
_MANY_BAD = 0.2
_BY_FIRST_BYTES = {**FIRST_BYTES, b"PAR1": ("Parquet", ".parquet")}
_SHOWN_KEYS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """What some lines of the input tell of all of it; `first` is the first that can be used.

    `copied_bytes` is what a copy of it takes beside the state.
    """

    size_bytes: float
    lines_in_all: float
    is_whole: bool
    first: InputLine | None
    copied_bytes: float = 0


def check_input(
    path: Path, max_line_bytes: int, options: InputOptions | None = None
) -> tuple[Finding, Sample | None]:
    """Look at lines of the beginning, the middle and the end. Raises UsageError or StateError.

    Of what cannot be read by offset only the beginning is looked at; what is read once is left.
    """
    reader = reader_of(path, replace(options or InputOptions(), streaming=True))
    if reader is not None and not reader.can_be_read_again:
        name = "standard input" if is_standard_input(path) else str(path)
        return ok(CHECK, f"{name} is no file, so it is not looked at; a run copies it first"), None
    if reader is not None:
        with tempfile.TemporaryDirectory(prefix="dispatcher-doctor-") as directory:
            return _look_at_beginning(reader, Path(directory), max_line_bytes)
    source = LineSource(path, max_line_bytes)
    try:
        with path.open("rb") as file:
            head = file.read(4)
        for magic, (kind, suffix) in _BY_FIRST_BYTES.items():
            if head.startswith(magic):
                found = f"{path} is {kind} by its content, but read as lines, as it is no {suffix}"
                return problem(CHECK, found, f"let its name end in {suffix}"), None
        return _look(source)
    finally:
        source.close()


def _look_at_beginning(
    reader: InputReader, directory: Path, max_line_bytes: int
) -> tuple[Finding, Sample | None]:
    with beginning_of(reader, directory, max_line_bytes, 1, _PART_BYTES) as part:
        if not part.source.size_bytes:
            return problem(CHECK, f"{reader.name} is empty", "name another"), None
        lines = _read(part.source, 0, part.source.size_bytes)[:_PART_LINES]
        read = sum(line.next_offset - line.offset for line in lines)
        is_whole = part.is_whole and read == part.source.size_bytes
        what = _part_text(reader, part, read, len(lines), is_whole=is_whole)
        finding, sample = _judge(what, part.size_bytes, lines, is_whole)
        copied = part.size_bytes or 0
        return finding, replace(sample, copied_bytes=copied) if sample is not None else None


def _part_text(
    reader: InputReader, part: Beginning, read: int, lines: int, *, is_whole: bool
) -> str:
    what = f"{reader.name} ({reader.kind})"
    if part.size_bytes is None:
        return what
    size = f"{'' if part.is_whole else 'about '}{size_text(part.size_bytes)} as JSON lines"
    if (known := reader.known_lines) is not None:
        return f"{what}, {known:,} lines, {size}"
    about = "" if is_whole else "about "
    return f"{what}, {about}{lines * part.size_bytes / max(1, read):,.0f} lines, {size}"


def _look(source: LineSource) -> tuple[Finding, Sample | None]:
    path, size = source.path, source.size_bytes
    if not size:
        return problem(CHECK, f"{path} is empty", "name another, or write lines to it"), None
    parts, is_whole = _parts(source)
    lines = [line for part in parts for line in part]
    read = sum(line.next_offset - line.offset for line in lines)
    in_all = len(lines) if is_whole else len(lines) * size / max(1, read)
    about = "" if is_whole else "about "
    what = f"{path}, {about}{in_all:,.0f} lines, {size_text(size)}"
    return _judge(what, size, lines, is_whole, "beginning, middle and end")


def _judge(
    what: str,
    size: float | None,
    lines: list[InputLine],
    is_whole: bool,
    where: str = "the beginning",
) -> tuple[Finding, Sample | None]:
    read = sum(line.next_offset - line.offset for line in lines)
    bad = [(line, why) for line in lines if (why := _defect(line)) is not None]
    good = [line for line in lines if line.defect is None]
    usable = {line.offset for line in lines} - {line.offset for line, _ in bad}
    first = next((line for line in good if line.offset in usable), None)
    in_all = len(lines) if is_whole or size is None else len(lines) * size / max(1, read)
    sample = Sample(size or 0, in_all, is_whole, first)
    looked = "all of them" if is_whole else f"{len(lines):,} of {where}"
    if not bad:
        return ok(CHECK, f"{what}; {looked} are JSON objects{_keys(first)}"), sample
    line, why = bad[0]
    place = f"byte {line.offset:,}" + (" (the first line)" if line.offset == 0 else "")
    found = f"{what}; {len(bad)} of {looked} cannot be used, as the one at {place}: {why}"
    if len(bad) > _MANY_BAD * len(lines):
        return problem(CHECK, found, "write one JSON object a line"), sample
    return warning(CHECK, found, "each such line becomes an __ERROR__ line"), sample


def _parts(source: LineSource) -> tuple[list[list[InputLine]], bool]:
    """Return lines of three places of the input, or all, and whether they are all."""
    size = source.size_bytes
    if size <= _WHOLE_BYTES:
        return [_read(source, 0, size)], True
    head = _read(source, 0, _PART_BYTES)
    # From somewhere in a line on: the rest of that one tells nothing.
    middle = _read(source, size // 2, size // 2 + _PART_BYTES)[1:]
    tail = _read(source, size - _PART_BYTES, size)[1:]
    return [head[:_PART_LINES], middle[:_PART_LINES], tail[-_PART_LINES:]], False


def _read(source: LineSource, begin: int, end: int) -> list[InputLine]:
    """Return the lines from one byte of the input to another."""
    lines: list[InputLine] = []
    while begin < end and (more := source.scan(begin, _PART_LINES, _PART_BYTES)):
        lines += more
        begin = more.end
    return lines


def _defect(line: InputLine) -> str | None:
    if line.defect is not None:
        return line.defect.replace("_", " ")
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return None if isinstance(value, dict) else f"a JSON {type(value).__name__}, no object"


def _keys(line: InputLine | None) -> str:
    if line is None:
        return ""
    keys = list(json.loads(line.text))
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f" (keys of the first: {', '.join(map(ascii, keys[:_SHOWN_KEYS]))}{more})"
