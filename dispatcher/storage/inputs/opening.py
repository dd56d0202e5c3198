"""Which kind of input a name means, and the lines of each as a file that is read by offset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dispatcher.errors import UsageError
from dispatcher.input_options import InputOptions, is_data_set, is_standard_input
from dispatcher.storage.inputs.compressed import GzipReader, ZstdReader
from dispatcher.storage.inputs.copying import Copying, copy_input, origin_now, origin_of_copy
from dispatcher.storage.inputs.data_sets import DataSetReader, is_hidden, was_saved
from dispatcher.storage.inputs.growing import Begun, open_growing
from dispatcher.storage.inputs.parquet import SUFFIX, ParquetReader, parquet_files
from dispatcher.storage.inputs.pipe import PipeReader
from dispatcher.storage.inputs.reader import InputReader, without_waiting
from dispatcher.storage.run_state import SPOOL_FILE
from dispatcher.storage.source import LineSource

_OF_ONE_PROCESS = ("/dev/stdin", "/dev/fd", "/proc")
_BY_SUFFIX: dict[str, Callable[[Path], InputReader]] = {
    ".gz": GzipReader,
    ".zst": ZstdReader,
    SUFFIX: ParquetReader,
}


def is_plain_file(path: Path) -> bool:
    """Say whether the path names a file that another start finds again, unlike /dev/stdin."""
    return path.is_file() and not any(map(path.is_relative_to, _OF_ONE_PROCESS))


def reader_of(path: Path, options: InputOptions | None = None) -> InputReader | None:
    """Return what reads an input; None for a plain file of lines. Nothing is read yet.

    Raises UsageError for what is not there, or no input.
    """
    options = options or InputOptions()
    if is_standard_input(path):
        return PipeReader(path)
    if is_data_set(path):
        return DataSetReader(path, options)
    try:
        path.stat()
    except OSError as error:
        raise UsageError(f"cannot read the input {path}: {error.strerror}") from error
    if path.is_dir():
        return _reader_of_directory(path, options)
    if path.is_file():
        by_suffix = _BY_SUFFIX.get(path.suffix.lower()) if is_plain_file(path) else None
        return by_suffix(path) if by_suffix is not None else None
    return PipeReader(path)


def open_source(
    path: Path,
    state_dir: Path,
    max_line_bytes: int,
    options: InputOptions | None = None,
    copying: Copying | None = None,
    *,
    is_begun: bool = True,
    begun: Begun | None = None,
) -> LineSource:
    """Open the input; what cannot be read by offset is copied into the state directory.

    A copy that is there is used: of a run that `is_begun` in any case, as it is what that began
    with, else if the original is still what it was made of. One that has to be made may be a source
    that grows, from what is `begun` of it, where the original can be read again; else it is whole.
    Raises UsageError, StateError, StorageError, and StartStoppedError when the copying was stopped.
    """
    copying = copying or Copying()
    spool = state_dir / SPOOL_FILE
    has_copy = spool.exists()
    if has_copy and not is_there(path):
        # A pipe, and its writer, may be long gone; of what else is gone the copy is as good.
        return LineSource(spool, max_line_bytes, origin_of_copy(state_dir, copying.files))
    reader = reader_of(path, options)
    if reader is None:
        return LineSource(path, max_line_bytes)
    kept = origin_of_copy(state_dir, copying.files) if has_copy else None
    before = kept if is_begun else None
    # Of a data set of the hub, which is asked over a network.
    origin = next(without_waiting(lambda: iter([origin_now(reader, before)]), copying.stop))
    if not has_copy or (not is_begun and origin != kept):
        if begun is not None and origin is not None and reader.is_here:
            copying.files.unlink(spool)
            return open_growing(reader, state_dir, max_line_bytes, origin, copying, begun)
        copy_input(reader, state_dir, origin, copying)
    return LineSource(spool, max_line_bytes, origin)


def check_apart(path: Path, options: InputOptions, *written: Path) -> None:
    """Refuse to write into the directory of a data set: what is written would be part of it.

    Raises UsageError.
    """
    reader = reader_of(path, options)
    if not isinstance(reader, DataSetReader) or reader.directory is None:
        return
    directory = reader.directory.resolve()
    for place in written:
        within = place.resolve()
        if within.is_relative_to(directory) and not is_hidden(within, directory):
            raise UsageError(
                f"{place} is in the directory of the input {path}, which would change with it; "
                "name a place outside of it"
            )


def is_there(path: Path) -> bool:
    """Say whether an input is one that another start finds again, and finds now."""
    if is_standard_input(path):
        return False
    return is_data_set(path) or is_plain_file(path) or path.is_dir()


def _reader_of_directory(path: Path, options: InputOptions) -> InputReader:
    if was_saved(path):
        return DataSetReader(path, options)
    if parquet_files(path):
        if options.subset or options.split:
            raise UsageError(
                f"--input-subset and --input-split go with a data set; of the directory {path} all "
                f"files are read, but hf:{path} is taken for a data set"
            )
        return ParquetReader(path)
    raise UsageError(
        f"the input {path} is a directory, and neither holds .parquet files nor was made by "
        f"save_to_disk; name a file of lines in it, or hf:{path} for files that load_dataset reads"
    )


def input_kind(path: Path, fingerprint: dict[str, Any]) -> str:
    """Return what run.yaml calls the kind of an input that was opened."""
    plain = "lines" if is_there(path) else "pipe"
    return str(fingerprint.get("kind", plain))
