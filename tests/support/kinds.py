"""The same lines as inputs of every kind."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import zstandard


def write_plain(directory: Path, content: bytes) -> Path:
    (path := directory / "in.jsonl").write_bytes(content)
    return path


def write_gzip(directory: Path, content: bytes) -> Path:
    """Write two members, cut anywhere."""
    path, half = directory / "in.jsonl.gz", len(content) // 2
    members = [gzip.compress(part, mtime=0) for part in (content[:half], content[half:])]
    path.write_bytes(b"".join(members))
    return path


def write_zstd(directory: Path, content: bytes) -> Path:
    """Write two frames, cut anywhere."""
    path, half = directory / "in.jsonl.zst", len(content) // 2
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    path.write_bytes(compress(content[:half]) + compress(content[half:]))
    return path


COMPRESSED: dict[str, Callable[[Path, bytes], Path]] = {"gzip": write_gzip, "zstd": write_zstd}
