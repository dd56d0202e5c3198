"""Data sets of Hugging Face in directories as inputs; none of these tests leaves the machine."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import StartStoppedError, StateError, StorageError, UsageError
from dispatcher.input_options import InputOptions, check_input_options
from dispatcher.run_command import note_start
from dispatcher.storage.inputs import data_sets
from dispatcher.storage.inputs.copying import Copying
from dispatcher.storage.inputs.opening import reader_of
from dispatcher.storage.inputs.reader import CopyStop
from tests.storage.test_inputs import RunSettings, check_input, opened
from tests.support.kinds import save_data_set, write_parquet

ROWS: list[dict[str, Any]] = [{"id": n, "word": f"word {n}", "tags": ["a"]} for n in range(600)]


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def rows_of(place: str | Path, **options: Any) -> list[Any]:
    reader = reader_of(Path(place), InputOptions(**options))
    assert reader is not None
    text = b"".join(reader.blocks(CopyStop()))
    return [json.loads(line) for line in text.splitlines()]


def refusal_of(place: str | Path, **options: Any) -> str:
    with pytest.raises(UsageError) as refused:
        rows_of(place, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def jsonl_files(directory: Path, **splits: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(text)
    return directory


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_saved_data_set_is_its_rows(prefix: str, tmp_path: Path) -> None:
    saved = save_data_set(tmp_path / "set", alone=ROWS)
    assert rows_of(f"{prefix}{saved}") == ROWS


def test_of_several_saved_splits_train_is_the_default(tmp_path: Path) -> None:
    saved = save_data_set(tmp_path / "set", test=ROWS[:3], train=ROWS[3:9])
    assert rows_of(saved) == ROWS[3:9]
    assert rows_of(saved, split="test") == ROWS[:3]
    said = refusal_of(saved, split="dev")
    assert "no split 'dev'; there are: test, train" in said


def test_an_only_split_needs_no_name_but_several_without_train_do(tmp_path: Path) -> None:
    assert rows_of(save_data_set(tmp_path / "one", dev=ROWS[:3])) == ROWS[:3]
    said = refusal_of(save_data_set(tmp_path / "two", a=ROWS[:3], b=ROWS[3:]))
    assert "several splits: a, b" in said
    assert "--input-split" in said


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_that_load_dataset_reads_is_its_rows(streaming: bool, tmp_path: Path) -> None:
    directory = jsonl_files(tmp_path / "files", train=ROWS, test=ROWS[:2])
    assert rows_of(f"hf:{directory}", streaming=streaming) == ROWS
    assert rows_of(f"hf:{directory}", streaming=streaming, split="test") == ROWS[:2]
    assert "no split 'dev'" in refusal_of(f"hf:{directory}", streaming=streaming, split="dev")


def test_the_rows_are_those_of_the_files_now_although_their_times_are_as_before(
    tmp_path: Path,
) -> None:
    directory = jsonl_files(tmp_path / "files", train=ROWS[:3])
    assert rows_of(f"hf:{directory}") == ROWS[:3]
    file = directory / "train.jsonl"
    before = file.stat()
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[3:6]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert rows_of(f"hf:{directory}") == ROWS[3:6]


def test_a_split_with_other_columns_is_in_nobodys_way(tmp_path: Path) -> None:
    directory = jsonl_files(tmp_path / "files", train=ROWS, test=[{"other": "column"}])
    assert rows_of(f"hf:{directory}", split="train") == ROWS
    assert rows_of(f"hf:{directory}", split="test") == [{"other": "column"}]


def test_parquet_and_csv_files_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "train-0.parquet", ROWS)
    assert rows_of(f"hf:{tmp_path / 'parquet'}", streaming=True) == ROWS
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("id,word\n0,zero\n1,one\n")
    rows = rows_of(f"hf:{tmp_path / 'csv'}")
    assert rows == [{"id": 0, "word": "zero"}, {"id": 1, "word": "one"}]


def test_an_image_is_its_bytes_and_needs_no_decoder(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "id": datasets.Value("int64")})
    picture = {"bytes": b"\x89PNG", "path": "a.png"}
    made = datasets.Dataset.from_list([{"picture": picture, "id": 1}]).cast(features)
    made.save_to_disk(str(tmp_path / "set"))
    kept = {"bytes": "iVBORw==", "path": "a.png"}
    assert rows_of(tmp_path / "set") == [{"picture": kept, "id": 1}]


def test_a_changed_data_set_and_another_split_are_told(tmp_path: Path) -> None:
    state = tmp_path / "state"
    directory = jsonl_files(tmp_path / "files", train=ROWS, test=ROWS[:2])
    place = Path(f"hf:{directory}")
    run = RunSettings(place, tmp_path / "out", state)
    lines, before = opened(place, state, is_begun=False)
    assert len(lines) == 600
    assert before["kind"] == "datasets"
    assert opened(place, state)[1] == before

    other_split = opened(place, state, options=InputOptions(split="test"))[1]
    with pytest.raises(StateError, match=r"its split \(None then, test now\)"):
        check_input(run, before, other_split)
    (directory / "test.jsonl").unlink()
    with pytest.raises(StateError, match=r"the number of its files \(2 then, 1 now\)"):
        check_input(run, before, opened(place, state)[1])


class Builder:
    """Plays what the hub would give."""

    def __init__(self, revision: str) -> None:
        self.hash = revision


def test_the_hub_is_not_asked_again_for_what_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, place = tmp_path / "state", Path("hf:org/name")
    reader = data_sets.DataSetReader
    monkeypatch.setattr(reader, "_make_builder", lambda _: Builder("revision 1"))
    monkeypatch.setattr(reader, "_lines", lambda _: iter([b'{"id": 1}\n']))
    _, before = opened(place, state, is_begun=False)
    assert before["original"]["revision"] == "revision 1"

    def ask(_: Any) -> Builder:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(reader, "_make_builder", ask)
    assert opened(place, state)[1] == before
    run = RunSettings(place, tmp_path / "out", state)
    for name, options in (("subset", InputOptions(subset="x")), ("split", InputOptions(split="x"))):
        with pytest.raises(StateError, match=f"its {name}"):
            check_input(run, before, opened(place, state, options=options)[1])
    with pytest.raises(StateError, match="its name"):
        check_input(run, before, opened(Path("hf:org/other"), state)[1])


def test_a_hub_that_does_not_answer_does_not_hold_up_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, answers = Copying(), threading.Event()

    def ask(_: Any) -> Builder:
        copying.stop.set()
        answers.wait(20)
        return Builder("late")

    monkeypatch.setattr(data_sets.DataSetReader, "_make_builder", ask)
    with pytest.raises(StartStoppedError):
        opened(Path("hf:org/name"), tmp_path / "state", copying=copying, is_begun=False)
    answers.set()


def test_a_hub_that_cannot_be_asked_is_said_in_a_sentence() -> None:
    said = refusal_of("hf:org/name-that-nobody-has")
    assert "cannot be read from the hub" in said
    assert "hf:DIR" in said


def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    assert "there is no directory" in refusal_of(f"hf:{tmp_path / 'nothing'}")
    (tmp_path / "empty").mkdir()
    assert "cannot be read" in refusal_of(f"hf:{tmp_path / 'empty'}")
    directory = jsonl_files(tmp_path / "files", train=[])
    (directory / "train.jsonl").write_text("no JSON\n")
    assert "cannot be read" in refusal_of(f"hf:{directory}", streaming=True)
    saved = save_data_set(tmp_path / "set", alone=ROWS)
    assert "--input-subset" in refusal_of(saved, subset="x")
    for path in saved.glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in refusal_of(saved)


def test_a_full_cache_is_no_bad_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_sets.DataSetReader, "_load", fail)
    with pytest.raises(StorageError, match="--input-streaming"):
        rows_of("hf:org/name")


def test_a_full_disk_is_found_below_what_datasets_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("An error occurred") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(data_sets.DataSetReader, "_load", fail)
    with pytest.raises(StorageError, match=r"No space left; .*--input-streaming"):
        rows_of("hf:org/name")


def test_the_innermost_cause_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("An error occurred") from ValueError("row 7 is\nno row")

    monkeypatch.setattr(data_sets.DataSetReader, "_load", fail)
    assert "hub: row 7 is no row;" in refusal_of("hf:org/name")


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    directory = jsonl_files(tmp_path / "files", train=[])
    assert "one of its files is empty" in refusal_of(f"hf:{directory}")


@pytest.mark.parametrize("content", ["{}", "no JSON", "[]"])
def test_a_broken_description_of_a_saved_set_is_named(content: str, tmp_path: Path) -> None:
    several = save_data_set(tmp_path / "several", train=ROWS, test=ROWS)
    (several / "dataset_dict.json").write_text(content)
    assert "dataset_dict.json is not as save_to_disk writes it" in refusal_of(several)
    one = save_data_set(tmp_path / "one", alone=ROWS)
    (one / "state.json").write_text(content)
    assert "state.json or" in refusal_of(one)


@pytest.mark.parametrize("written", ["outfile", "state_dir"])
def test_nothing_is_written_into_the_directory_of_a_data_set(written: str, tmp_path: Path) -> None:
    directory = jsonl_files(tmp_path / "files", train=ROWS)
    (tmp_path / "link").symlink_to(directory)
    state = tmp_path / "state"
    run = RunSettings(Path(f"hf:{directory}"), tmp_path / "out.jsonl", state)
    place = tmp_path / "link" / "x"
    with pytest.raises(UsageError, match="x is in the directory of the input"):
        note_start(replace(run, **{written: place}))  # type: ignore[arg-type]
    assert [path.name for path in directory.iterdir()] == ["train.jsonl"]
    note_start(replace(run, outfile=directory / ".answers" / "out.jsonl"))


def test_options_of_data_sets_are_refused_with_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--input-split goes with a data set"):
        check_input_options(tmp_path / "in.jsonl", InputOptions(split="x"))
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "a.parquet", ROWS)
    assert f"hf:{tmp_path / 'data'}" in refusal_of(tmp_path / "data", split="x")


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal_of("hf:org/name")
