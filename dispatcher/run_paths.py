"""The paths of a run as options: what cannot name one is refused where it stands.

Each function is an argparse type, and raises argparse.ArgumentTypeError.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dispatcher.input_options import HUB, input_path

_STATE_SUFFIX = ".dispatch"
_MOST_NAME_BYTES = 255
_MOST_PATH_BYTES = 4000
"""Of what Linux takes, 4,095 bytes, less what is put into a directory."""


def input_option(text: str) -> Path:
    """Return the value of `--input`."""
    _check(text, "a file")
    if text.strip() == HUB:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no data set; write hf:NAME or hf:DIR (hf:. is this directory)"
        )
    return input_path(text)


def output_option(text: str) -> Path:
    """Return the value of `--output`; the state directory's name must be possible as well."""
    path = _check(text, "a file", _STATE_SUFFIX)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; name a file in it")
    return path


def file_option(text: str) -> Path:
    """Return the value of an option that names a file beside a run's own."""
    return _check(text, "a file")


def place_option(text: str) -> Path:
    """Return the value of what names a run by its output, or by its state directory."""
    path = _check(text, "a file")
    return path if path.is_dir() else _check(text, "a file", _STATE_SUFFIX)


def state_option(text: str) -> Path:
    """Return the value of `--state`."""
    return _check(text, "a directory, or leave the option out")


def _check(text: str, wanted: str, suffix: str = "") -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(
            f"the value is empty, as that of a variable that is not set; name {wanted}"
        )
    path = Path(text)
    names = (*path.parts[:-1], path.name + suffix)
    longest = max(names, key=lambda name: len(os.fsencode(name)))
    if (size := len(os.fsencode(longest))) > _MOST_NAME_BYTES:
        what = (
            f"with {suffix}, as its state's, its name"
            if longest == names[-1] and suffix
            else ("a name in it")
        )
        raise argparse.ArgumentTypeError(
            f"{what} has {size:,} bytes, of which {_MOST_NAME_BYTES} are possible; shorten it"
        )
    if len(os.fsencode(path.absolute())) > _MOST_PATH_BYTES:
        raise argparse.ArgumentTypeError(
            f"the path is longer than {_MOST_PATH_BYTES:,} bytes; name a shorter one"
        )
    return path
