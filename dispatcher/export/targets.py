"""The files an output is exported to: written beside their name, and whole when they have it."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from msgspec.structs import replace

from dispatcher.errors import StateError, StorageError, UsageError
from dispatcher.export.lines import ERROR, OutputLine, OutputLines
from dispatcher.export.shapes import Shape
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.reader import missing_package
from dispatcher.storage.ownership import Identity

SUFFIXES = (".parquet", ".jsonl.zst", ".jsonl.gz", ".jsonl")
_VALUE = "__VALUE__"
_MOST_COLUMNS = 10_000
_GROUP_ROWS = 50_000
_GROUP_BYTES = 32 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def new_file(target: Path, files: Files, *, force: bool) -> Iterator[BinaryIO]:
    """Give a file that gets its name when the block ends well, and is then on disk.

    Raises UsageError when there is such a file, unless it may be replaced, or no directory for
    it, and StorageError.
    """
    _check_new(target, force=force)
    _remove_leftovers(target)
    partial = _partial_of(target)
    try:
        try:
            with partial.open("xb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _give_name(partial, target, files, force=force)
        finally:
            files.unlink(partial)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; nothing was changed, make room or "
            "name a file elsewhere"
        ) from error


def _partial_of(target: Path) -> Path:
    """Return where this process writes what becomes `target`; the name says who it is."""
    me = Identity.of_this_process()
    return target.with_name(f".{target.name}.{_place_of(me)}-{me.pid}-{me.started}.tmp")


def _place_of(one: Identity) -> str:
    """Return what tells the machine, its boot and its process ids apart from others."""
    text = "\0".join((one.host, one.boot, one.namespace))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _remove_leftovers(target: Path) -> None:
    """Remove what an export to the same file left behind when it was killed.

    What another machine left stays: nobody can tell from here whether it is still being written.
    """
    me = Identity.of_this_process()
    name = re.compile(re.escape(f".{target.name}.{_place_of(me)}-") + r"(\d+)-(\d+)\.tmp")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            if (found := name.fullmatch(path.name)) is None:
                continue
            writer = replace(me, pid=int(found[1]), started=found[2])
            # Of another user's processes this one may see nothing.
            if path.lstat().st_uid == os.geteuid() and me.knows_dead(writer):
                path.unlink()


def _check_new(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise UsageError(f"{target} is a directory; name a file in it")
    if not target.parent.is_dir():
        raise UsageError(
            f"the directory {target.parent} of {target.name} does not exist; make it, or name a "
            "file elsewhere"
        )
    if os.path.lexists(target) and not force:
        raise UsageError(f"{target} exists; name a new file, or give --force to replace it")


def _give_name(partial: Path, target: Path, files: Files, *, force: bool) -> None:
    try:
        if force:
            files.rename(partial, target)
        else:
            os.link(partial, target, follow_symlinks=False)
    except FileExistsError:
        _check_new(target, force=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _check_new(target, force=False)  # a file system without links: the next best
        files.rename(partial, target)
    files.sync_dir(target.absolute().parent)


def open_text(file: BinaryIO, target: Path) -> contextlib.AbstractContextManager[Any]:
    """Return what writes bytes to a file, compressed as its name says. Raises UsageError."""
    suffix = target.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0)
    if suffix != ".zst":
        return contextlib.nullcontext(file)
    if sys.version_info >= (3, 14):
        from compression import zstd

        options = {zstd.CompressionParameter.checksum_flag: 1}
        return zstd.ZstdFile(file, "wb", options=options)
    try:
        import zstandard
    except ImportError as error:
        raise missing_package(f"the export to {target}", "zstandard", "zstd") from error
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    made: contextlib.AbstractContextManager[Any] = compressor.stream_writer(file, closefd=False)
    return made


# -------------------------------------------------------------------- Parquet


def columns_of(lines: OutputLines, wanted: Iterable[OutputLine]) -> Shape:
    """Return the columns of these lines, reading all of them."""
    columns = Shape()
    for line in wanted:
        value = row_of(lines, line)
        if ERROR in value and ERROR not in columns.fields:
            columns.fields[ERROR] = Shape(1, is_json=True)
        columns.note(value)
        if len(columns.fields) > _MOST_COLUMNS:
            raise StateError(
                f"{lines.path} has more than {_MOST_COLUMNS:,} different keys, too many for "
                "columns; export it to .jsonl.zst instead"
            )
    if columns.kinds and not columns.fields:
        # Rows without any column would not be there at all.
        columns.fields[ERROR] = Shape(1, is_json=True)
    for shape in columns.fields.values():
        shape.settle()
    return columns


def row_of(lines: OutputLines, line: OutputLine) -> dict[str, Any]:
    """Return a line as a row: what is no object stands in a column of its own."""
    if line.is_error:
        return {ERROR: lines.error_of(line)}
    value = lines.value_of(line)
    return value if isinstance(value, dict) else {_VALUE: value}


def write_parquet(
    file: BinaryIO, lines: OutputLines, wanted: Iterable[OutputLine], columns: Shape
) -> None:
    """Write these lines as Parquet, some tens of mebibytes at a time in memory."""
    pa, parquet = pyarrow_modules(f"the export of {lines.path}")
    schema = pa.schema(list(columns.arrow_fields()))
    converts = {k: c for k, s in columns.fields.items() if (c := s.convert()) is not None}
    rows: list[dict[str, Any]] = []
    size = 0
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for line in wanted:
            row = row_of(lines, line)
            try:
                for name, convert in converts.items():
                    if row.get(name) is not None:
                        row[name] = convert(row[name])
            except RecursionError as error:
                raise lines.too_deep(line) from error
            rows.append(row)
            size += len(line.text)
            if len(rows) >= _GROUP_ROWS or size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def pyarrow_modules(what: str) -> tuple[Any, Any]:
    """Return pyarrow and its part for Parquet. Raises UsageError when it is missing."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package(what, "pyarrow", "parquet") from error
    return pyarrow, parquet
