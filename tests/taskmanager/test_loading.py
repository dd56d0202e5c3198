"""From `--task` and its arguments to a task class; what is wrong is said in a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dispatcher.errors import TaskLoadError
from dispatcher.taskmanager.task.loading import find_task, load_task, parse_task_args

HEAD = "from dispatcher.taskmanager.task import GeneratorTask, Task\n"
TASK = """
class {name}(GeneratorTask):
    def task_generator(self):
        return {{}}
        yield
"""

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start in an empty directory, and forget what is imported there."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a module with task classes and further code."""

    def write(name: str, *classes: str, code: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEAD + "".join(TASK.format(name=each) for each in classes) + code)
        return path

    return write


def refusal(spec: str) -> str:
    """Return the sentence a spec is refused with."""
    with pytest.raises(TaskLoadError) as caught:
        load_task(spec, {})
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- the three forms ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["first_tasks:Mine", "first_tasks.Mine", "first_tasks.py:Mine", "./first_tasks.py:Mine"],
)
def test_a_class_is_found_in_the_current_directory(spec: str, write: Write) -> None:
    write("first_tasks.py", "Mine")
    assert find_task(spec).__name__ == "Mine"


@pytest.mark.parametrize("spec", ["pack.sub.tasks:Mine", "pack.sub.tasks.Mine"])
def test_a_class_is_found_in_a_package(spec: str, write: Write) -> None:
    write("pack/sub/tasks.py", "Mine")
    assert find_task(spec).__name__ == "Mine"


def test_a_file_is_found_by_its_path_and_may_import_what_is_beside_it(
    write: Write, tmp_path: Path
) -> None:
    write("else where/helper_beside.py", code="ANSWER = 42\n")
    path = write("else where/my.tasks.py", "Mine", code="import helper_beside\n")

    assert find_task(f"{path}:Mine").__name__ == "Mine"
    assert find_task("else where/my.tasks.py:Mine").__name__ == "Mine"


def test_two_files_of_one_name_are_not_taken_for_each_other(write: Write) -> None:
    write("a/tasks.py", "Mine", code="PLACE = 'a'\n")
    write("b/tasks.py", "Mine", code="PLACE = 'b'\n")

    first, second = find_task("a/tasks.py:Mine"), find_task("b/tasks.py:Mine")

    assert first is not second
    assert [sys.modules[c.__module__].PLACE for c in (first, second)] == ["a", "b"]


def test_a_file_may_be_called_like_a_module_of_the_standard_library(write: Write) -> None:
    write("json.py", "Mine")
    assert find_task("json.py:Mine").__name__ == "Mine"
    assert "Mine" not in vars(json)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "tasks", ":Mine", "tasks:", ".Mine", "tasks."])
def test_a_spec_without_a_class_is_refused_with_the_forms(spec: str) -> None:
    said = refusal(spec)
    assert said == f"--task {spec!r} names no class; give module:Class or path/file.py:Class"


def test_a_module_that_does_not_exist_is_named() -> None:
    said = refusal("nowhere_tasks:Mine")
    assert said.startswith("--task 'nowhere_tasks:Mine': there is no module nowhere_tasks; ")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.py") in refusal("none.py:Mine")


def test_a_module_that_the_tasks_module_lacks_is_not_blamed_on_the_spec(write: Write) -> None:
    path = write("lacking_tasks.py", "Mine", code="import not_installed_here\n")

    for spec in ("lacking_tasks:Mine", "lacking_tasks.py:Mine"):
        said = refusal(spec)
        assert said.startswith(f"--task {spec!r}: importing it failed: ModuleNotFoundError: ")
        assert "not_installed_here" in said
    assert f"{path}:" in said


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero ("),
        ("def broken(:\n", "SyntaxError"),
        ("raise SystemExit('usage: mine FILE')\n", "SystemExit: usage: mine FILE"),
    ],
    ids=["raises", "syntax", "exits"],
)
@pytest.mark.parametrize("form", ["failing_tasks:Mine", "failing_tasks.py:Mine"])
def test_an_import_that_fails_says_how_and_where(
    code: str, shown: str, form: str, write: Write
) -> None:
    write("failing_tasks.py", "Mine", code=code)

    said = refusal(form)

    assert said.startswith(f"--task {form!r}: importing it failed: ")
    assert shown in said


def test_a_class_that_does_not_exist_is_refused_with_those_that_do(write: Write) -> None:
    write("several_tasks.py", "Sum", "Answer")

    said = refusal("several_tasks:Nothing")

    assert said.startswith("--task 'several_tasks:Nothing': several_tasks has no class Nothing; ")
    assert "Answer" in said
    assert "Sum" in said


def test_a_class_that_does_not_exist_in_a_module_without_tasks_is_refused_plainly() -> None:
    assert refusal("json:Nothing") == "--task 'json:Nothing': json has no class Nothing"


@pytest.mark.parametrize("name", ["JSONDecoder", "loads", "__name__"])
def test_what_is_no_task_is_refused(name: str) -> None:
    assert refusal(f"json:{name}") == f"--task 'json:{name}': {name} is not a subclass of Task"


def test_a_task_that_is_not_written_whole_is_refused_with_what_it_lacks(write: Write) -> None:
    write("half_tasks.py", code="class Half(Task):\n    def is_done(self): return True\n")

    said = refusal("half_tasks:Half")

    assert said.endswith("Half does not define get_next_request, get_result, process_result")


# --- setup --------------------------------------------------------------------------------------


def test_setup_runs_once_with_the_arguments_which_every_task_sees(write: Write) -> None:
    code = """
    calls = []
    @classmethod
    def setup(cls, args):
        cls.calls.append(dict(args))
"""
    write("setup_tasks.py", "Mine", code=code)
    given = {"n": 3}

    task_class = load_task("setup_tasks:Mine", given)
    given["n"] = 4  # what the caller does later changes nothing
    tasks = [task_class({}, None) for _ in range(3)]

    assert task_class.calls == [{"n": 3}]  # type: ignore[attr-defined]
    assert [dict(task.args) for task in tasks] == [{"n": 3}] * 3
    with pytest.raises(TypeError):
        task_class.args["n"] = 5  # type: ignore[index]


def test_finding_a_task_does_not_set_it_up(write: Write) -> None:
    code = "    @classmethod\n    def setup(cls, args):\n        raise AssertionError\n"
    write("unready_tasks.py", "Mine", code=code)
    assert find_task("unready_tasks:Mine").args == {}


def test_one_tasks_arguments_are_not_anothers(write: Write) -> None:
    write("pair_tasks.py", "One", "Two")
    one, two = load_task("pair_tasks:One", {"n": 1}), load_task("pair_tasks:Two", {})
    assert (dict(one.args), dict(two.args)) == ({"n": 1}, {})


def test_a_setup_that_fails_says_how_and_where(write: Write) -> None:
    code = "    @classmethod\n    def setup(cls, args):\n        args['template']\n"
    path = write("missing_tasks.py", "Mine", code=code)

    said = refusal("missing_tasks:Mine")

    assert said.startswith("--task 'missing_tasks:Mine': setup failed: KeyError: 'template' (")
    assert f"{path}:" in said


# --- arguments ----------------------------------------------------------------------------------


def test_values_are_read_as_yaml() -> None:
    pairs = ["n=3", "x=0.5", "on=true", "name=abc", "none=null", "list=[1, a]", "map={a: 1}"]
    assert parse_task_args(pairs, None) == {
        "n": 3,
        "x": 0.5,
        "on": True,
        "name": "abc",
        "none": None,
        "list": [1, "a"],
        "map": {"a": 1},
    }


@pytest.mark.parametrize(
    "text", ["a=b", "-1:", "{not yaml", "[1", "@at", "%d items", "a: b: c", "=", "'"]
)
def test_a_value_that_is_no_yaml_is_text(text: str) -> None:
    value = parse_task_args([f"key={text}"], None)["key"]
    assert value == text or text == "-1:"


@pytest.mark.parametrize("text", ["2024-13-45", "2024-02-30", "12:61:99"])
def test_a_value_that_looks_like_a_date_and_is_none_is_not_the_end(text: str) -> None:
    assert "day" in parse_task_args([f"day={text}"], None)


@pytest.mark.parametrize("pair", ["key", "", "=value", "key:value"])
def test_what_is_no_pair_is_refused(pair: str) -> None:
    with pytest.raises(TaskLoadError) as caught:
        parse_task_args([pair], None)
    assert str(caught.value) == f"--task-arg {pair!r} is not KEY=VALUE"


def test_a_file_gives_arguments_and_flags_win_over_it(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text("n: 1\ntemplate: |\n  two\n  lines\n7: seven\n")

    args = parse_task_args(["n=2", "more=x", "more=y"], path)

    assert args == {"n": 2, "template": "two\nlines\n", "7": "seven", "more": "y"}


def test_a_file_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text('{"n": [1, {"a": null}]}')
    assert parse_task_args([], path) == {"n": [1, {"a": None}]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- a\n- b\n", "must hold `name: value` lines"),
        (b"just text", "must hold `name: value` lines"),
        (b"{broken", "is not YAML: "),
        (b"\xff\xfe\xff", "is not YAML: "),
        (b"day: 2024-13-45\n", "is not YAML: "),
    ],
    ids=["list", "text", "broken", "no UTF-8", "no date"],
)
def test_a_file_that_holds_no_arguments_is_refused(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "args.yaml"
    path.write_bytes(content)
    with pytest.raises(TaskLoadError) as caught:
        parse_task_args([], path)
    assert f"--task-args {path} {said}" in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(TaskLoadError) as caught:
        parse_task_args([], tmp_path / "none.yaml")
    said = str(caught.value)
    assert said == f"cannot read --task-args {tmp_path}/none.yaml: No such file or directory"
