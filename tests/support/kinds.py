"""The same lines as inputs of every kind."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as Parquet, in groups of ten."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    return path


def save_data_set(directory: Path, **splits: list[dict[str, Any]]) -> Path:
    """Save a data set to a directory: of one split named `alone`, without a name."""
    import datasets

    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    alone = made.get("alone")
    (alone if alone is not None else datasets.DatasetDict(made)).save_to_disk(str(directory))
    return directory


COMPRESSED: dict[str, Callable[[Path, bytes], Path]] = {"gzip": write_gzip, "zstd": write_zstd}
