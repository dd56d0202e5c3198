"""What `--input` may name besides a file: standard input, and data sets of Hugging Face.

FILE        a file or, of some kinds, a directory
-           standard input
hf:NAME     a data set of the hub, or hf:DIR one in a directory
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dispatcher.errors import UsageError

STANDARD_INPUT = Path("-")
HUB = "hf:"

INPUT_HELP = (
    "input, one item a line: a file of JSON lines, also .gz or .zst; a .parquet file, or a "
    "directory of them; a data set of Hugging Face, as hf:NAME, hf:DIR or a directory that "
    "save_to_disk made; - for standard input"
)


@dataclass(frozen=True, slots=True)
class InputOptions:
    """Which part of a data set is the input, and whether it is read without being kept."""

    subset: str | None = None
    split: str | None = None
    streaming: bool = False

    def given(self) -> dict[str, Any]:
        """Return what was given."""
        return {key: value for key, value in asdict(self).items() if value}


def input_path(text: str) -> Path:
    """Return an option's value as a path; what is written as one is never a word for something.

    So `./-` and `./hf:x` are files of these names.
    """
    path = Path(text)
    means_else = path == STANDARD_INPUT or is_data_set(path)
    return path.absolute() if means_else and text.startswith(".") else path


def is_standard_input(path: Path) -> bool:
    """Say whether an input is the command's standard input."""
    return path == STANDARD_INPUT


def is_data_set(path: Path) -> bool:
    """Say whether an input is a data set that is named so: hf:NAME or hf:DIR."""
    return str(path).startswith(HUB)


def data_set_directory(path: Path) -> Path | None:
    """Return the directory of hf:DIR; None when it names a data set of the hub."""
    named = Path(str(path).removeprefix(HUB)).expanduser()
    is_path = named.is_absolute() or named.parts[:1] in ((), (".",), ("..",)) or named.exists()
    return named if is_path or str(path).startswith(f"{HUB}.") else None


def absolute_input(path: Path) -> Path:
    """Return an input that names the same from another directory."""
    if is_standard_input(path):
        return path
    if is_data_set(path):
        directory = data_set_directory(path)
        return path if directory is None else Path(f"{HUB}{directory.absolute()}")
    return path.absolute()


def check_input_options(path: Path, options: InputOptions) -> None:
    """Refuse options of data sets with an input that is none. Raises UsageError."""
    given = options.given()
    if given and not is_data_set(path) and not path.is_dir():
        raise UsageError(
            f"--input-{next(iter(given))} goes with a data set (hf:NAME, or a directory); {path} "
            "is none"
        )
