"""`.parquet` files, and directories of them: a line for each row, file after file by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispatcher.errors import UsageError
from dispatcher.storage.inputs.fingerprints import fingerprint_of_file, fingerprint_of_files
from dispatcher.storage.inputs.reader import CopyStop, InputReader, missing_package
from dispatcher.storage.inputs.rows import RowEncoder, in_blocks

SUFFIX = ".parquet"
_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


class ParquetReader(InputReader):
    """The rows of a file, or of all files of a directory."""

    kind = "parquet"

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._files = parquet_files(path) if path.is_dir() else [path]
        self._rows = self._rows_decoded = self._rows_read = 0

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the file, or of all files."""
        if self._path.is_dir():
            return fingerprint_of_files(self._path, parquet_files(self._path))
        return fingerprint_of_file(self._path)

    def blocks(self, stop: CopyStop) -> Iterator[bytes]:
        """Yield the rows as lines, some hundred at a time in memory."""
        for block in in_blocks(self._lines(stop)):
            self._rows_read += block.count(b"\n")
            yield block

    def share_read(self) -> float | None:
        """Return which share of the rows has been read."""
        return self._rows_read / self._rows if self._rows else None

    @property
    def known_lines(self) -> int | None:
        """The number of rows."""
        return self._rows or None

    def _lines(self, stop: CopyStop) -> Iterator[bytes]:
        # Each file's end tells its rows; of a damaged one this is where it shows.
        self._rows = sum(self._open(path).metadata.num_rows for path in self._files)
        for path in self._files:
            file = self._open(path)
            encoder = RowEncoder(file.schema_arrow, str(path))
            try:
                for batch in self._batches(path, file):
                    stop.check()
                    yield from encoder.lines(batch)
                    self._rows_decoded += batch.num_rows
            finally:
                file.close()

    def _open(self, path: Path) -> Any:
        parquet, arrow_error = _pyarrow(f"the input {path}")
        try:
            return parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES)
        except (arrow_error, OSError) as error:
            raise self._refuse(path, error) from error

    def _batches(self, path: Path, file: Any) -> Iterator[Any]:
        _, arrow_error = _pyarrow(f"the input {path}")
        try:
            yield from file.iter_batches(batch_size=_BATCH_ROWS)
        except (arrow_error, OSError) as error:
            raise self._refuse(path, error) from error

    def _refuse(self, path: Path, error: Exception) -> Exception:
        """Return what to raise instead: pyarrow has OSError without a number for damage, too."""
        if isinstance(error, OSError) and error.errno is not None:
            return error
        after = f" after {self._rows_decoded:,} rows" if self._rows_decoded else ""
        why = " ".join(str(error).split()).rstrip(".")
        return UsageError(
            f"the input {path} cannot be read as Parquet{after}: {why}; name it by what it is, or "
            "make it anew"
        )


def parquet_files(directory: Path) -> list[Path]:
    """Return the files of a directory that are Parquet by their name, sorted."""
    # A leading dot or underscore is how writers name what is no part of the data.
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix.lower() == SUFFIX and path.name[0] not in "._" and path.is_file()
    )


def _pyarrow(what: str) -> tuple[Any, type[Exception]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package(what, "pyarrow", "parquet") from error
    return parquet, pyarrow.lib.ArrowException
