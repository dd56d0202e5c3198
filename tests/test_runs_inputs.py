"""The failed lines of a run whose input was copied, found again when the copy is gone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher.errors import StateError
from dispatcher.input_options import InputOptions
from dispatcher.runs.cli import main
from dispatcher.storage.inputs import opening, rows
from tests.support.kinds import save_data_set, write_gzip, write_parquet, write_zstd
from tests.test_runs_command import carry_out, fails_at, good, settings_of

ROWS = [{"n": number, "word": "x"} for number in range(20)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPACT = [json.dumps(row, separators=(",", ":")) for row in ROWS]


def gzip_file(directory: Path) -> Path:
    return write_gzip(directory, TEXT)


def zstd_file(directory: Path) -> Path:
    return write_zstd(directory, TEXT)


def parquet_file(directory: Path) -> Path:
    return write_parquet(directory / "in.parquet", ROWS)


def data_set(directory: Path) -> Path:
    return save_data_set(directory / "set", dev=ROWS, test=ROWS[:3])


KINDS = pytest.mark.parametrize(
    "make", [gzip_file, zstd_file, parquet_file, data_set], ids=lambda make: make.__name__
)


@KINDS
def test_failed_lines_are_read_again_from_the_original(
    make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "run", make(tmp_path))
    if make is data_set:
        settings = replace(settings, input_options=InputOptions(split="dev"))
    carry_out(settings, fails_at(3, 11))
    assert not (settings.state_dir / "input.spool").exists()
    target = tmp_path / "again.jsonl"

    assert main([str(settings.state_dir), "--failed-to", str(target)]) == 0

    wanted = [json.loads(line) for line in target.read_text().splitlines()]
    assert wanted == [ROWS[3], ROWS[11]]
    if make is gzip_file:
        assert target.read_bytes().splitlines() == [TEXT.splitlines()[n] for n in (3, 11)]
    else:
        assert make is zstd_file or target.read_text().splitlines() == [COMPACT[3], COMPACT[11]]
    assert not list(tmp_path.glob(".dispatcher-input-*"))
    assert not (settings.state_dir / "input.spool").exists()

    second = settings_of(tmp_path, "second", target)
    carry_out(second, good)
    assert main([str(settings.state_dir), "--merge", str(second.outfile)]) == 0
    assert b"__ERROR__" not in settings.outfile.read_bytes()


@KINDS
def test_a_complete_run_is_not_copied_again_but_a_changed_original_is_told(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path)
    settings = settings_of(tmp_path, "run", path)
    if make is data_set:
        settings = replace(settings, input_options=InputOptions(split="dev"))
    carry_out(settings, good)
    state = {entry.name for entry in settings.state_dir.iterdir()}

    def copy(*_: object) -> None:
        raise AssertionError("it was copied again")

    monkeypatch.setattr(opening, "copy_input", copy)
    carry_out(settings, good)
    assert {entry.name for entry in settings.state_dir.iterdir()} == state
    if make is data_set:
        with pytest.raises(StateError, match="its split"):
            carry_out(replace(settings, input_options=InputOptions(split="test")), good)
    change(path)
    with pytest.raises(StateError, match="its content changed"):
        carry_out(settings, good)


def change(path: Path) -> None:
    changed = next(path.rglob("*.arrow")) if path.is_dir() else path
    content = bytearray(changed.read_bytes())
    content[-10] ^= 1
    changed.write_bytes(content)


@KINDS
def test_an_original_that_changed_is_refused(
    make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    settings = settings_of(tmp_path, "run", path)
    if make is data_set:
        settings = replace(settings, input_options=InputOptions(split="dev"))
    carry_out(settings, fails_at(3))
    change(path)

    assert main([str(settings.state_dir), "--failed-to", str(tmp_path / "again.jsonl")]) == 1
    assert "kind or content changed" in capsys.readouterr().err
    assert not (tmp_path / "again.jsonl").exists()


def test_an_original_that_is_gone_is_to_be_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gzip_file(tmp_path)
    settings = settings_of(tmp_path, "run", path)
    carry_out(settings, fails_at(3))
    path.unlink()
    assert main([str(settings.state_dir), "--failed-to", str(tmp_path / "again.jsonl")]) == 1
    said = capsys.readouterr().err
    assert f"the input {path} of the run" in said
    assert "is not there any more, so its lines cannot be written; restore it" in said


def test_rows_that_are_written_otherwise_now_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, "run", parquet_file(tmp_path))
    carry_out(settings, fails_at(3))
    monkeypatch.setattr(rows, "_encode", lambda row: json.dumps(row).encode())
    assert main([str(settings.state_dir), "--failed-to", str(tmp_path / "again.jsonl")]) == 1
    assert "another version of the package" in capsys.readouterr().err
    assert not list(tmp_path.glob("*again*"))
    assert not list(tmp_path.glob(".dispatcher-input-*"))


def test_failed_lines_of_a_run_that_goes_on_come_from_its_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gzip_file(tmp_path)
    settings = settings_of(tmp_path, "run", path)
    carry_out(settings, lambda n: None if n == 12 else fails_at(1)(n))
    assert (settings.state_dir / "input.spool").exists()
    assert main([str(settings.state_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["input"] == str(path)
    os.unlink(path)
    target = tmp_path / "again.jsonl"
    assert main([str(settings.state_dir), "--failed-to", str(target)]) == 0
    assert target.read_bytes() == TEXT.splitlines(keepends=True)[1]
