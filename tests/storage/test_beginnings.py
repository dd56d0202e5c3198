"""The first lines of an input that cannot be read by offset: for a preview, and for the doctor."""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dispatcher.doctor.lines import check_input
from dispatcher.input_options import InputOptions
from dispatcher.preview import command as preview
from dispatcher.storage.inputs.beginning import beginning_of
from dispatcher.storage.inputs.opening import reader_of
from dispatcher.storage.inputs.pipe import PipeReader
from tests.support.kinds import save_data_set, write_gzip, write_parquet, write_zstd

ROWS = [{"id": number, "text": os.urandom(40).hex()} for number in range(30_000)]
TEXT = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def gzip_file(directory: Path) -> Path:
    return write_gzip(directory, TEXT)


def zstd_file(directory: Path) -> Path:
    return write_zstd(directory, TEXT)


def parquet_file(directory: Path) -> Path:
    return write_parquet(directory / "in.parquet", ROWS)


def saved_data_set(directory: Path) -> Path:
    return save_data_set(directory / "set", alone=ROWS)


KINDS = pytest.mark.parametrize(
    "make",
    [gzip_file, zstd_file, parquet_file, saved_data_set],
    ids=lambda make: make.__name__,
)


@KINDS
def test_a_preview_reads_the_first_lines_and_estimates_the_rest(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = make(tmp_path)
    (directory := tmp_path / "preview").mkdir()
    args = argparse.Namespace(input=path, preview=3, max_line_bytes=1 << 20)

    beginning = preview._read(args, directory)

    assert [json.loads(line.text)["id"] for line in beginning.lines] == [0, 1, 2]
    assert beginning.in_all == pytest.approx(30_000, rel=0.2)
    assert not beginning.is_exact
    (part,) = directory.iterdir()
    assert part.stat().st_size < len(TEXT) / 2


@KINDS
def test_the_doctor_estimates_what_the_copy_takes(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    finding, sample = check_input(make(tmp_path), 1 << 20)
    assert finding.status == "ok"
    assert "about" in finding.found
    assert sample is not None
    assert sample.lines_in_all == pytest.approx(30_000, rel=0.2)
    assert sample.copied_bytes == pytest.approx(len(TEXT), rel=0.2)


def test_a_short_input_is_known_exactly(tmp_path: Path) -> None:
    path = write_gzip(tmp_path, b'{"a": 1}\n{"a": 2}')
    reader = reader_of(path, InputOptions())
    assert reader is not None
    with beginning_of(reader, tmp_path, 1000, least_lines=5) as part:
        assert part.is_whole
        assert part.size_bytes == 17
        assert len(part.source.scan(0, 10, 1000)) == 2


def test_of_a_pipe_no_more_is_read_than_a_preview_needs(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    may_end = threading.Event()

    def write() -> None:
        with pipe.open("wb", buffering=0) as writer:
            writer.write(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a"')
            may_end.wait(20)

    thread = threading.Thread(target=write)
    thread.start()
    with beginning_of(PipeReader(pipe), tmp_path, 1000, least_lines=2) as part:
        assert len(part.source.scan(0, 10, 1000)) == 3
        assert part.size_bytes is None
    may_end.set()
    thread.join()
