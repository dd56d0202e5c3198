"""Data sets of Hugging Face: of the hub, made by save_to_disk, or files that load_dataset reads.

Rows come as Arrow tables, so that they are JSON as those of Parquet are (rows.py): nothing is
decoded, an image or a recording is an object with its bytes and its path.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispatcher.errors import DispatcherError, StorageError, UsageError
from dispatcher.input_options import HUB, InputOptions, data_set_directory, is_data_set
from dispatcher.storage.inputs.fingerprints import fingerprint_of_files
from dispatcher.storage.inputs.reader import (
    CopyStop,
    InputReader,
    missing_package,
    without_waiting,
)
from dispatcher.storage.inputs.rows import RowEncoder, in_blocks

_BATCH_ROWS = 256
_DEFAULT_SPLIT = "train"
_DICT_FILE = "dataset_dict.json"
_SET_FILES = ("state.json", "dataset_info.json")
_SHOWN_CHARACTERS = 300
_FULL = (errno.ENOSPC, errno.EDQUOT)


def was_saved(directory: Path) -> bool:
    """Say whether save_to_disk made this directory."""
    return (directory / _DICT_FILE).is_file() or all(
        (directory / name).is_file() for name in _SET_FILES
    )


class DataSetReader(InputReader):
    """The rows of one split of a data set; `directory` is None for one of the hub."""

    kind = "datasets"

    def __init__(self, path: Path, options: InputOptions) -> None:
        self.name = str(path)
        self._options = options
        self.directory = data_set_directory(path) if is_data_set(path) else path
        self._rows = self._rows_read = 0
        self._made_builder: Any = None
        if self.directory is not None and not self.directory.is_dir():
            raise UsageError(
                f"the input {path}: there is no directory {self.directory}; name one, or a data "
                f"set of the hub as {HUB}NAME"
            )

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the files; of a data set of the hub its revision, which it is asked."""
        if self.directory is None:
            return self._named() | {"revision": str(self._builder().hash)}
        return fingerprint_of_files(self.directory, _files_in(self.directory)) | self._named()

    def fingerprint_beside(self, before: dict[str, Any]) -> dict[str, Any]:
        """Return the same without asking the hub: the revision that was copied is the run's."""
        return self.fingerprint() if self.directory is not None else before | self._named()

    def blocks(self, stop: CopyStop) -> Iterator[bytes]:
        """Yield the rows as lines."""
        for block in without_waiting(lambda: in_blocks(self._lines()), stop):
            self._rows_read += block.count(b"\n")
            yield block

    def share_read(self) -> float | None:
        """Return which share of the rows has been read."""
        return min(1.0, self._rows_read / self._rows) if self._rows else None

    @property
    def known_lines(self) -> int | None:
        """The number of rows, of a saved data set; what others say of themselves may be old."""
        is_saved = self.directory is not None and was_saved(self.directory)
        return self._rows or None if is_saved else None

    @property
    def is_here(self) -> bool:
        """Whether it is none of the hub."""
        return self.directory is not None

    def _named(self) -> dict[str, Any]:
        named = {"subset": self._options.subset, "split": self._options.split}
        return named if self.directory is not None else {"name": self.name, **named}

    # ---------------------------------------------------------------- rows

    def _lines(self) -> Iterator[bytes]:
        encoder: RowEncoder | None = None
        schema: Any = None
        try:
            for table in self._tables():
                if encoder is None or table.schema != schema:  # of a stream, it may change
                    schema = table.schema
                    encoder = RowEncoder(schema, self.name)
                yield from encoder.lines(table)
        except (DispatcherError, GeneratorExit):
            raise
        except Exception as error:  # what reads the files of others may raise anything
            raise self._failure(error) from error

    def _tables(self) -> Iterator[Any]:
        rows = self._load()
        known = getattr(rows, "num_rows", None)
        if known is None and rows.info.splits and rows.split in rows.info.splits:
            known = rows.info.splits[rows.split].num_examples
        self._rows = known or 0
        yield from rows.with_format("arrow").iter(batch_size=_BATCH_ROWS)

    def _load(self) -> Any:
        if self.directory is not None and was_saved(self.directory):
            return self._load_saved(self.directory)
        builder = self._builder()
        splits = [*(builder.info.splits or ()), *(builder.config.data_files or ())]
        split = self._split_of(list(dict.fromkeys(map(str, splits))))
        if self._options.streaming or self.directory is not None:
            # What is prepared of files is kept by their names and times, so that rows could be
            # those of older files; and all splits are, although one is wanted.
            files = builder.config.data_files
            if files and split in files:  # or its columns would have to be those of the first split
                builder.config.data_files = type(files)({split: files[split]})
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)

    def _load_saved(self, directory: Path) -> Any:
        datasets = _package(self.name)
        if self._options.subset:
            raise UsageError(f"{self.name} has no subsets; leave --input-subset out")
        if not (directory / _DICT_FILE).is_file():
            rows = self._load_rows(datasets, directory)
            if self._options.split is not None:
                self._split_of([str(rows.split)] if rows.split else [])
            return rows
        try:
            content = json.loads((directory / _DICT_FILE).read_text())
            splits = [str(name) for name in content["splits"]]
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged(directory / _DICT_FILE) from error
        return self._load_rows(datasets, directory / self._split_of(splits))

    def _load_rows(self, datasets: Any, directory: Path) -> Any:
        try:
            return datasets.load_from_disk(str(directory))
        except (ValueError, LookupError, TypeError) as error:
            states = " or ".join(str(directory / name) for name in _SET_FILES)
            raise self._damaged(states) from error

    def _damaged(self, what: object) -> UsageError:
        return UsageError(
            f"the data set {self.name} cannot be read: {what} is not as save_to_disk writes it; "
            "save it anew"
        )

    def _builder(self) -> Any:
        """Return what prepares the rows, of one revision."""
        if self._made_builder is None:
            self._made_builder = self._make_builder()
        return self._made_builder

    def _make_builder(self) -> Any:
        datasets = _package(self.name)
        where = str(self.directory) if self.directory else self.name.removeprefix(HUB)
        try:
            return datasets.load_dataset_builder(where, name=self._options.subset)
        except Exception as error:  # the hub's, the network's, or that of a file
            raise self._failure(error) from error

    def _split_of(self, splits: list[str]) -> str:
        wanted = self._options.split
        there = ", ".join(splits) or "no named ones"
        if wanted is not None:
            if wanted in splits or not splits:
                return wanted
            raise UsageError(f"{self.name} has no split {wanted!r}; there are: {there}")
        if len(splits) == 1:
            return splits[0]
        if _DEFAULT_SPLIT in splits or not splits:
            return _DEFAULT_SPLIT
        raise UsageError(f"{self.name} has several splits: {there}; name one with --input-split")

    def _failure(self, error: Exception) -> DispatcherError:
        if isinstance(error, DispatcherError):
            return error
        causes = _causes_of(error)
        said = _said_by(causes)
        if any(isinstance(e, OSError) and e.errno in _FULL for e in causes):
            return StorageError(
                f"the data set {self.name} cannot be downloaded: {said}; make room where HF_HOME "
                "is, or give --input-streaming, which keeps no files there"
            )
        after = f" after {self._rows_read:,} rows" if self._rows_read else ""
        if any(isinstance(e, StopIteration) for e in causes):
            return UsageError(
                f"the data set {self.name} cannot be read{after}: one of its files is empty; "
                "remove it, or write rows to it"
            )
        if self.directory is not None:
            return UsageError(
                f"the data set {self.name} cannot be read{after}: {said}; mend its files, or name "
                "one that load_dataset reads"
            )
        return UsageError(
            f"the data set {self.name} cannot be read from the hub{after}: {said}; check its name "
            f"and the network, or download it elsewhere and name its directory as {HUB}DIR"
        )


def _causes_of(error: BaseException) -> list[BaseException]:
    """Return an error and what it came from, the innermost last."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _said_by(causes: list[BaseException]) -> str:
    """Return the words of the innermost error that has any, with its kind where they tell none."""
    for error in reversed(causes):
        if said := " ".join(str(error).split())[:_SHOWN_CHARACTERS]:
            return f"{type(error).__name__}: {said}" if isinstance(error, LookupError) else said
    return type(causes[-1]).__name__


def _files_in(directory: Path) -> list[Path]:
    """Return the files at any depth, without those that begin with a dot."""
    found = []
    for path in directory.rglob("*"):
        if not is_hidden(path, directory) and path.is_file():
            found.append(path)
    return found


def is_hidden(path: Path, directory: Path) -> bool:
    """Say whether a path in a directory is none of its data: a name begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


def _package(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_package(f"the data set {name}", "datasets", "datasets") from error
    datasets.disable_progress_bars()
    return datasets
