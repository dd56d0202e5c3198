"""An output as Parquet or compressed: row i is line i, whatever the answers hold."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.errors import DispatcherError
from dispatcher.export.cli import main
from dispatcher.export.exporting import Wish, export
from dispatcher.export.lines import OutputLines
from dispatcher.storage.files import Files
from dispatcher.storage.ownership import Claim, Identity
from tests.storage.test_inputs import text_of
from tests.support.processes import running

ERROR = {"__ERROR__": {"error": "task_exception", "message": "x", "work_id": 1}}


def complete_run(directory: Path, lines: list[Any], state: str = "complete") -> Path:
    """Leave an output with the run.yaml of its run, and return it."""
    output = directory / "out.jsonl"
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    output.write_text(text)
    state_dir = directory / "out.jsonl.dispatch"
    state_dir.mkdir(exist_ok=True)
    content = {
        "run": "abc",
        "state": state,
        "output_bytes": output.stat().st_size,
        "settings": {
            "output": str(output),
            "input": str(directory / "in.jsonl"),
            "state": str(state_dir),
        },
        "command": {"program": "dispatcher run", "options": {}},
    }
    (state_dir / "run.yaml").write_text(yaml.safe_dump(content))
    return output


def to_parquet(directory: Path, lines: list[Any], *flags: str) -> pa.Table:
    output = complete_run(directory, lines)
    target = directory / "out.parquet"
    assert main([str(output), "--to", str(target), "--force", *flags]) == 0
    return pq.read_table(target)


def type_of(field: pa.Field) -> str:
    return str(field.type).replace("element:", "item:")  # as versions of pyarrow call it


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    code: int | str | None
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:  # of argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (1, 2)
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_answers_become_columns_of_their_types(tmp_path: Path) -> None:
    rows = [
        {"id": 0, "text": "a", "score": 1, "ok": True, "tags": ["x"], "in": {"n": 1}},
        {"id": 1, "text": None, "score": 0.5, "ok": None, "tags": [], "in": {"n": None, "m": "y"}},
    ]
    table = to_parquet(tmp_path, rows)
    assert {field.name: type_of(field) for field in table.schema} == {
        "id": "int64",
        "text": "string",
        "score": "double",
        "ok": "bool",
        "tags": "list<item: string>",
        "in": "struct<n: int64, m: string>",
    }
    assert table.to_pylist()[1] == rows[1]
    assert table.to_pylist()[0]["in"] == {"n": 1, "m": None}


def test_an_error_is_a_row_at_its_place(tmp_path: Path) -> None:
    table = to_parquet(tmp_path, [{"id": 0}, ERROR, {"id": 2}])
    assert table.column("id").to_pylist() == [0, None, 2]
    texts = table.column("__ERROR__").to_pylist()
    assert [text and json.loads(text) for text in texts] == [None, ERROR["__ERROR__"], None]


ODD_ERROR = {**ERROR, "work_id": 99, "id": "seven"}


def test_an_error_with_other_keys_is_whole_in_its_column(tmp_path: Path) -> None:
    table = to_parquet(tmp_path, [ODD_ERROR, {"id": 2}])
    assert table.column_names == ["__ERROR__", "id"]
    assert table.column("id").to_pylist() == [None, 2]
    assert json.loads(table.column("__ERROR__")[0].as_py()) == ODD_ERROR


def test_errors_elsewhere_have_the_number_of_their_line_whatever_they_hold(tmp_path: Path) -> None:
    errors = tmp_path / "errors.jsonl"
    to_parquet(tmp_path, [ODD_ERROR, {"id": 2}, ERROR], "--errors-to", str(errors))
    assert [json.loads(line) for line in errors.read_text().splitlines()] == [
        {"work_id": 0, "__ERROR__": ODD_ERROR},
        {"work_id": 2, **ERROR},
    ]


def test_columns_come_and_go(tmp_path: Path) -> None:
    table = to_parquet(tmp_path, [{"a": 1}, {"b": "x"}, {}, {"a": None, "c": []}])
    assert table.to_pylist() == [
        {"a": 1, "b": None, "c": None},
        {"a": None, "b": "x", "c": None},
        {"a": None, "b": None, "c": None},
        {"a": None, "b": None, "c": []},
    ]


MIXED = [
    ([1, "one", None], "text and whole numbers"),
    ([True, 1], "truth values and whole numbers"),
    ([[1], {"a": 1}], "lists and objects"),
    ([{}, {}], "objects"),
    ([2**63, -1], "whole numbers"),
    ([2**64], "whole numbers"),
    ([-(2**63) - 1], "whole numbers"),
    ([2**53 + 1, 0.5], "numbers and whole numbers"),
    ([{str(n): n for n in range(1001)}], "objects"),
]


@pytest.mark.parametrize(("values", "kinds"), MIXED, ids=[kinds for _, kinds in MIXED])
def test_what_no_column_can_hold_is_json_text_and_said_to_be(
    values: list[Any], kinds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = to_parquet(tmp_path, [{"x": value} for value in values])
    assert f"kept as JSON text: x ({kinds})" in capsys.readouterr().out
    texts = table.column("x").to_pylist()
    assert [text if text is None else json.loads(text) for text in texts] == values
    back = [json.loads(line)["x"] for line in text_of(tmp_path / "out.parquet").splitlines()]
    assert back == values


@pytest.mark.parametrize("values", [[-(2**63), 2**63 - 1], [0, 2**64 - 1]])
def test_whole_numbers_of_64_bits_are_numbers(values: list[int], tmp_path: Path) -> None:
    table = to_parquet(tmp_path, [{"x": value} for value in values])
    assert table.column("x").to_pylist() == values


def test_places_within_are_json_text_by_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"a": {"b": [1, "x"], "c": 1}}, {"a": {"b": [], "c": 2}}, {"a": None}]
    table = to_parquet(tmp_path, rows)
    assert "a.b[] (text and whole numbers)" in capsys.readouterr().out
    assert type_of(table.schema.field("a")) == "struct<b: list<item: string>, c: int64>"
    assert [json.loads(line) for line in text_of(tmp_path / "out.parquet").splitlines()] == rows


DEPTHS = pytest.mark.parametrize("depth", [15, 16, 17, 50, 600])


@DEPTHS
@pytest.mark.parametrize("odd", ["", ", 1e400", ', "\\\\\\ud800"'], ids=["plain", "huge", "half"])
def test_lists_of_any_depth_are_in_a_file_that_can_be_read(
    depth: int, odd: str, tmp_path: Path
) -> None:
    deep = "[" * depth + "7" + odd + "]" * depth
    table = to_parquet(tmp_path, [f'{{"x": {deep}}}\n', '{"x": []}\n'])
    assert table.num_rows == 2
    if not odd:
        assert text_of(tmp_path / "out.parquet").splitlines()[0] == b'{"x":' + deep.encode() + b"}"


@DEPTHS
def test_lists_and_objects_in_turns_are_in_a_file_that_can_be_read(
    depth: int, tmp_path: Path
) -> None:
    half = depth // 2
    deep = '[{"a": ' * half + "7" + "}]" * half
    to_parquet(tmp_path, [f'{{"x": {deep}}}\n'])
    assert json.loads(text_of(tmp_path / "out.parquet")) == {"x": json.loads(deep)}


def test_a_line_that_is_nested_beyond_all_bounds_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = complete_run(tmp_path, ['{"x": 1}\n', '{"x": ' + "[" * 5000 + "]" * 5000 + "}\n"])
    said = refused(capsys, output, "--to", tmp_path / "x.parquet")
    assert "line 1 of" in said
    assert "nested too deeply" in said


def test_odd_lines_are_exported_too(tmp_path: Path) -> None:
    lines = ['{"a": "\\ud800x"}\n', "[1, 2]\n", '{"a": 1e400}\n', '{"a": 1, "a": "last"}\n']
    table = to_parquet(tmp_path, lines)
    assert table.num_rows == 4
    assert table.column("a").to_pylist()[0] == '"\ufffdx"'
    assert table.column("__VALUE__").to_pylist()[1] == [1, 2]


def test_an_empty_output_is_an_empty_table(tmp_path: Path) -> None:
    assert to_parquet(tmp_path, []).num_rows == 0
    assert text_of(tmp_path / "out.parquet") == b""


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(st.dictionaries(st.sampled_from(["a", "b", "c"]), JSON), max_size=6))
def test_every_answer_comes_back_as_it_was(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    to_parquet(tmp_path, rows)
    back = [json.loads(line) for line in text_of(tmp_path / "out.parquet").splitlines()]
    assert len(back) == len(rows)
    assert [without_nulls(row) for row in back] == [without_nulls(row) for row in rows]


def without_nulls(value: Any) -> Any:
    """Return a value without keys that are null, which Parquet does not tell from missing ones."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if not is_nothing(v)}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(is_nothing, value.values())))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".jsonl", ".JSONL.GZ"])
def test_lines_are_byte_for_byte_those_of_the_output(suffix: str, tmp_path: Path) -> None:
    output = complete_run(tmp_path, [{"id": 0, "t": "\u2028"}, ERROR, {"id": 2}])
    target = tmp_path / f"out2{suffix}"
    assert main([str(output.parent / "out.jsonl.dispatch"), "--to", str(target)]) == 0
    packed = target.read_bytes()
    if suffix.endswith("zst"):
        packed = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    elif suffix.lower().endswith("gz"):
        packed = gzip.decompress(packed)
    assert packed == output.read_bytes()
    if suffix != ".jsonl":
        assert text_of(target) == output.read_bytes()


def test_errors_are_left_out_or_go_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": 0}, ERROR, {"id": 2}]
    assert to_parquet(tmp_path, lines, "--skip-errors").to_pylist() == [{"id": 0}, {"id": 2}]
    assert "errors left out: 1\n" in capsys.readouterr().out
    errors = tmp_path / "errors.jsonl"
    table = to_parquet(tmp_path, lines, "--errors-to", str(errors))
    said = capsys.readouterr().out
    assert said.startswith("2 rows of ")
    assert f"; errors in {errors}: 1\n" in said
    to_parquet(tmp_path, [ERROR])
    said = capsys.readouterr().out
    assert said.startswith("1 row of ")
    assert "; errors among them: 1\n" in said
    assert table.column_names == ["id"]
    assert json.loads(errors.read_text()) == {"work_id": 1, **ERROR}


def test_a_run_that_is_not_complete_is_exported_only_when_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = complete_run(tmp_path, [{"id": 0}, '{"id": 1, "half'], "running")
    target = tmp_path / "x.jsonl.gz"
    said = refused(capsys, output, "--to", target)
    assert "not complete" in said
    assert "--resume" in said
    assert "--partial" in said
    assert main([str(output), "--to", str(target), "--partial"]) == 0
    assert text_of(target) == b'{"id": 0}\n'


def test_a_run_that_is_running_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = complete_run(tmp_path, [{"id": 0}], "running")
    (owners := tmp_path / "out.jsonl.dispatch" / "owners").mkdir()
    claim = Claim(Identity.of_this_process(), 1)
    (owners / "1").write_bytes(msgspec.json.encode(claim))
    said = refused(capsys, output, "--to", tmp_path / "x.jsonl")
    assert "is running; wait until it is complete, or give --partial" in said
    assert "--resume" not in said


def test_an_output_that_is_not_there_is_told_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir, target = tmp_path / "out.jsonl.dispatch", tmp_path / "x.jsonl"
    complete_run(tmp_path, []).unlink()
    assert "is not there; restore it" in refused(capsys, state_dir, "--to", target)
    complete_run(tmp_path, [], "running").unlink()
    said = refused(capsys, state_dir, "--to", target, "--partial")
    assert "is not there yet; wait until the run has written a line" in said


def test_lines_that_are_written_meanwhile_are_in_neither_pass(tmp_path: Path) -> None:
    output = complete_run(tmp_path, [{"id": 0}, {"id": 1}])
    lines = OutputLines(output)
    with output.open("a") as file:
        file.write('{"id": 2}\n')
    assert [[line.work_id for line in lines] for _ in range(2)] == [[0, 1], [0, 1]]
    lines.close()


def test_an_output_without_its_state_is_exported_only_when_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (output := tmp_path / "alone.jsonl").write_text('{"a": 1}\n')
    assert "--partial" in refused(capsys, output, "--to", tmp_path / "x.jsonl")
    assert main([str(output), "--to", str(tmp_path / "x.jsonl"), "--partial"]) == 0


def test_what_cannot_be_right_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = complete_run(tmp_path, [{"id": 0}])
    (there := tmp_path / "there.parquet").write_text("precious")
    assert "exists" in refused(capsys, output, "--to", there)
    assert "no kind of file" in refused(capsys, output, "--to", tmp_path / "x.csv")
    assert "put a name before it" in refused(capsys, output, "--to", tmp_path / ".parquet")
    said = refused(capsys, output, "--to", tmp_path / "none" / "x.jsonl")
    assert f"the directory {tmp_path / 'none'} of x.jsonl does not exist; make it" in said
    assert "the output itself" in refused(capsys, output, "--to", output, "--force")
    assert "same file" in refused(
        capsys, output, "--to", tmp_path / "x.jsonl", "--errors-to", tmp_path / "x.jsonl"
    )
    assert "JSON lines" in refused(
        capsys, output, "--to", tmp_path / "x.jsonl", "--errors-to", tmp_path / "e.parquet"
    )
    assert "does not exist" in refused(capsys, tmp_path / "no", "--to", tmp_path / "x.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "directory" in refused(capsys, output, "--to", tmp_path / "folder.jsonl", "--force")
    output.write_text('{"id": 0}\n{"id": 1}\n')
    assert "is not the one" in refused(capsys, output, "--to", tmp_path / "x.jsonl")
    assert there.read_text() == "precious"
    left = {"out.jsonl", "out.jsonl.dispatch", "there.parquet", "folder.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_an_empty_name_is_not_the_current_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = complete_run(tmp_path, [{"id": 0}])
    monkeypatch.chdir(tmp_path / "out.jsonl.dispatch")
    target = tmp_path / "x.jsonl"
    assert "OUTPUT: the value is empty" in refused(capsys, "", "--to", target)
    assert "--to: the value is empty" in refused(capsys, output, "--to", "")
    assert "--errors-to: the value is empty" in refused(
        capsys, output, "--to", target, "--errors-to", " "
    )
    assert not target.exists()


def test_a_name_that_no_file_can_have_is_refused_with_its_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = complete_run(tmp_path, [{"id": 0}])
    name = "x" * 300
    state_too = "OUTPUT: with .dispatch, as its state's, its name has 259 bytes"
    assert state_too in refused(capsys, "x" * 250, "--to", "x.jsonl")
    assert "OUTPUT: a name in it has 300 bytes" in refused(capsys, name, "--to", "x.jsonl")
    assert "--to: a name in it has 306 bytes" in refused(capsys, output, "--to", f"{name}.jsonl")


@pytest.mark.parametrize("option", ["--to", "--errors-to"])
def test_the_files_of_the_run_itself_are_never_replaced(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = complete_run(tmp_path, [{"id": 0}])
    state_dir = tmp_path / "out.jsonl.dispatch"
    (infile := tmp_path / "in.jsonl").write_text("precious")
    (link := tmp_path / "link.jsonl").symlink_to(infile)
    (spool := state_dir / "input.jsonl").write_text("precious")
    other = [] if option == "--to" else ["--to", tmp_path / "x.jsonl"]
    for mine in (infile, link):
        assert "the input of the run" in refused(capsys, output, *other, option, mine, "--force")
    for mine in (spool, state_dir / "new.jsonl"):
        assert "state directory" in refused(capsys, output, *other, option, mine, "--force")
    assert "the output itself" in refused(capsys, output, *other, option, output, "--force")
    assert [path.read_text() for path in (infile, spool)] == ["precious", "precious"]
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_file_of_an_input_that_is_a_directory_is_never_replaced(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = complete_run(tmp_path, [{"id": 0}])
    (part := tmp_path / "set" / "part.parquet").parent.mkdir()
    part.write_text("precious")
    run_file = tmp_path / "out.jsonl.dispatch" / "run.yaml"
    content = yaml.safe_load(run_file.read_text())
    content["settings"]["input"] = f"{prefix}{part.parent}"
    run_file.write_text(yaml.safe_dump(content))
    assert "part of it" in refused(capsys, output, "--to", part, "--force")
    assert part.read_text() == "precious"


def test_a_file_is_replaced_when_asked_to(tmp_path: Path) -> None:
    output = complete_run(tmp_path, [{"id": 0}])
    (there := tmp_path / "there.jsonl").write_text("old")
    assert main([str(output), "--to", str(there), "--force"]) == 0
    assert there.read_text() == '{"id": 0}\n'


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.zst", "x.jsonl.gz"])
def test_a_disk_that_fails_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = complete_run(tmp_path, [{"id": 0}])

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DispatcherError, match="No space left on device; nothing was changed"):
        export(output, Wish(tmp_path / name), Files(), lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.dispatch"}


SIGNALLED = """
import os, sys
from dispatcher.export import cli
cli._Teller = lambda: lambda line: line == 1 and os.kill(os.getpid(), int(sys.argv[1]))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz"])
def test_an_export_that_is_ended_by_a_signal_says_so_and_leaves_nothing(
    name: str, number: int, tmp_path: Path
) -> None:
    output = complete_run(tmp_path, [{"id": n} for n in range(3)])
    words = [sys.executable, "-c", SIGNALLED, str(number), output, "--to", tmp_path / name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    said = "dispatcher export: interrupted; nothing was written\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", said)
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.dispatch"}


WRITING = """
import signal, sys
from pathlib import Path
from dispatcher.export.targets import new_file
from dispatcher.storage.files import Files
with new_file(Path(sys.argv[1]), Files(), force=False) as file:
    print("writing", flush=True)
    signal.pause()
"""


def test_what_a_killed_export_left_goes_with_the_next_one_and_no_other(tmp_path: Path) -> None:
    output = complete_run(tmp_path, [{"id": n} for n in range(3)])
    one, other = tmp_path / "x[1].jsonl", tmp_path / "y.jsonl"

    def left() -> list[Path]:
        return sorted(tmp_path.glob(".*.tmp"))

    with running(sys.executable, "-c", WRITING, one) as killed:
        killed.wait_for_line(re.compile("writing"))
    with running(sys.executable, "-c", WRITING, other) as killed:
        killed.wait_for_line(re.compile("writing"))
    of_one, of_other = left()
    elsewhere = of_one.with_name(re.sub("[0-9a-f]{12}-", "0" * 12 + "-", of_one.name))
    elsewhere.write_text("of another machine")
    with running(sys.executable, "-c", WRITING, one) as living:
        living.wait_for_line(re.compile("writing"))
        assert not of_one.exists()
        (of_living,) = set(left()) - {elsewhere, of_other}
        assert main([str(output), "--to", str(one)]) == 0
        assert left() == sorted([elsewhere, of_other, of_living])
    assert len(one.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "x.parquet"), ("zstandard", "x.jsonl.zst")]
)
def test_a_missing_package_is_named(
    package: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = complete_run(tmp_path, [{"id": 0}])
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refused(capsys, output, "--to", tmp_path / name)
    assert not list(tmp_path.glob("*x.*"))


def test_a_large_output_is_never_whole_in_memory(tmp_path: Path) -> None:
    lines = [{"id": n, "text": "x" * 2000} for n in range(60_000)]
    output = complete_run(tmp_path, lines)
    del lines
    before = pa.total_allocated_bytes()
    tracemalloc.start(1)
    try:
        export(output, Wish(tmp_path / "x.parquet"), Files(), lambda _: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert output.stat().st_size > 120_000_000
    assert peak < 90_000_000
    assert pa.total_allocated_bytes() - before < 1_000_000
    assert pq.ParquetFile(tmp_path / "x.parquet").metadata.num_rows == 60_000
