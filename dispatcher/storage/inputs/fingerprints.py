"""What a changed file, or directory of files, is told by: sizes, names and samples of content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 1 << 16
SAMPLES = 16
_MOST_FILES_SAMPLED = 64


def fingerprint_of(fd: int, size_bytes: int, samples: int = SAMPLES) -> dict[str, Any]:
    """Return size and hashes of an open file; reads at most 64 KiB for each sample and two more."""

    def sample(offset: int) -> bytes:
        return os.pread(fd, max(0, min(SAMPLE_BYTES, size_bytes - offset)), offset)

    middle = hashlib.blake2b(digest_size=16)
    for number in range(1, samples + 1):
        middle.update(sample(size_bytes * number // (samples + 1)))
    last = max(0, size_bytes - SAMPLE_BYTES)
    return {
        "size": size_bytes,
        "head": hashlib.blake2b(sample(0), digest_size=16).hexdigest(),
        "tail": hashlib.blake2b(sample(last), digest_size=16).hexdigest(),
        "samples": middle.hexdigest(),
    }


def fingerprint_of_file(path: Path, samples: int = SAMPLES) -> dict[str, Any]:
    """Return the fingerprint of a file. Raises OSError."""
    with path.open("rb") as file:
        return fingerprint_of(file.fileno(), os.fstat(file.fileno()).st_size, samples)


def fingerprint_of_files(directory: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return one for files of a directory: their number, sizes, names and content.

    Of many files only beginnings and ends are read. Raises OSError.
    """
    names, content = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    samples = SAMPLES if len(files) <= _MOST_FILES_SAMPLED else 0
    size = 0
    for path in sorted(files):
        found = fingerprint_of_file(path, samples)
        size += found["size"]
        name = os.fsencode(path.relative_to(directory))
        names.update(b"%d %b\0" % (found["size"], name))
        content.update(repr((found["head"], found["tail"], found["samples"])).encode())
    return {
        "files": len(files),
        "size": size,
        "names": names.hexdigest(),
        "content": content.hexdigest(),
    }
