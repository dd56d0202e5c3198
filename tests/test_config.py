"""Flags over a YAML file: the same names, the same types, and a sentence for what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dispatcher.config import (
    OwnList,
    Parser,
    add_run_limits,
    argv_of,
    default_state_dir,
    number,
    parse,
    policy_of,
    run_settings_of,
)
from dispatcher.errors import UsageError
from scripts.make_reference import parsers


def parser_of(*, with_config: bool = True) -> Parser:
    """Return a parser with an option of every kind."""
    parser = Parser(prog="it")
    if with_config:
        parser.add_argument("--config", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--count", type=number(int, 1, 100), default=7)
    parser.add_argument("--wait-s", type=number(float, 0), default=1.5)
    parser.add_argument("--kind", choices=("a", "b"), default="a")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--text", default="")
    parser.add_argument("--pair", action="append", default=[], metavar="KEY=VALUE")
    return parser


Read = Callable[..., argparse.Namespace]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function that parses flags over a file with this content."""

    def read(content: str, *flags: str) -> argparse.Namespace:
        path = tmp_path / "it.yaml"
        path.write_text(content)
        return parse(parser_of(), ["--config", str(path), *flags])

    return read


def refusal(read: Read, content: str, *flags: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(content, *flags)
    return str(caught.value)


# --- the file -----------------------------------------------------------------------------------


def test_a_file_sets_what_flags_would_with_their_types(read: Read) -> None:
    args = read(
        "name: n\ncount: 12\nwait-s: 3\nkind: b\ndry_run: true\nfile: a/b\ntext: 5\npair: [x=1, y]"
    )

    assert args.name == "n"
    assert (args.count, type(args.count)) == (12, int)
    assert (args.wait_s, type(args.wait_s)) == (3.0, float)
    assert args.kind == "b"
    assert args.dry_run is True
    assert args.file == Path("a/b")
    assert args.text == "5"
    assert args.pair == ["x=1", "y"]


def test_flags_win_over_the_file_and_the_file_over_defaults(read: Read) -> None:
    args = read("name: from file\ncount: 12\nkind: b\n", "--name", "from flag", "--kind=a")

    assert (args.name, args.count, args.kind, args.wait_s) == ("from flag", 12, "a", 1.5)


def test_a_flag_is_one_more_of_a_repeatable_option(read: Read) -> None:
    args = read("name: n\npair: [a=1]\n", "--pair", "b=2")
    assert args.pair == ["a=1", "b=2"]


def test_reading_a_file_does_not_change_what_the_next_parser_gives(read: Read) -> None:
    read("name: n\npair: [a=1]\ncount: 9\n", "--pair", "b=2")
    args = read("name: n\n")
    assert (args.pair, args.count) == ([], 7)


@pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_sets_nothing(read: Read, content: str) -> None:
    assert read(content, "--name", "n").count == 7


@pytest.mark.parametrize("key", ["wait-s", "wait_s"])
def test_a_key_may_be_written_with_dashes_or_underscores(read: Read, key: str) -> None:
    assert read(f"name: n\n{key}: 4\n").wait_s == 4.0


@pytest.mark.parametrize("key", ["cuont", "config", "help", "7", "--name", "nam"])
def test_an_unknown_key_is_named(read: Read, key: str) -> None:
    said = refusal(read, f"name: n\n{key}: 3\n")
    assert "it.yaml: unknown option " in said
    assert key in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dry-run: 'yes'", "dry-run needs true or false, not 'yes'"),
        ("dry-run: 1", "dry-run needs true or false, not 1"),
        ("count: true", "count needs a value, not True"),
        ("count: null", "count needs a value, not None"),
        ("text: {a: 1}", "text needs a value, not {'a': 1}"),
        ("kind: c", "kind is 'c', but must be one of a, b"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_a_sentence(
    read: Read, line: str, said: str
) -> None:
    assert refusal(read, f"name: n\n{line}\n").endswith(said)


@pytest.mark.parametrize(("line", "dry_run"), [("dry-run: false", False), ("dry-run: on", True)])
def test_a_switch_is_a_truth_value(read: Read, line: str, dry_run: bool) -> None:
    assert read(f"name: n\n{line}\n").dry_run is dry_run


@pytest.mark.parametrize("value", ["0", "101", "1.5", "many"])
def test_a_number_in_the_file_has_the_flags_bounds(
    read: Read, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, UsageError)):
        read(f"name: n\ncount: {value}\n")
    assert "count" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["count: [1, 2]", "text: [a]", "file: [a]"])
def test_a_list_for_an_option_that_is_not_repeatable_is_refused(read: Read, line: str) -> None:
    with pytest.raises((SystemExit, UsageError)):
        read(f"name: n\n{line}\n")


def test_one_value_for_a_repeatable_option_is_a_list_of_one(read: Read) -> None:
    assert read("name: n\npair: a=1\n").pair == ["a=1"]
    assert read("name: n\npair: a=1\n", "--pair", "b=2").pair == ["a=1", "b=2"]


def test_a_required_option_may_stand_in_the_file_and_is_missed_when_it_does_not(
    read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read("name: n\n").name == "n"
    with pytest.raises(SystemExit) as caught:
        read("count: 3\n")
    assert caught.value.code == 2
    assert "--name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n", "must hold `option: value` lines"),
        ("text", "must hold `option: value` lines"),
        ("{broken", "is not YAML: "),
        ("text: 2024-13-45\n", "is not YAML: "),
    ],
    ids=["list", "text", "broken", "no date"],
)
def test_a_file_that_is_none_is_refused(read: Read, content: str, said: str) -> None:
    assert said in refusal(read, content)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(UsageError) as caught:
        parse(parser_of(), ["--config", str(path)])
    assert str(caught.value) == f"cannot read --config {path}: No such file or directory"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="is not YAML"):
        parse(parser_of(), [f"--config={path}"])


# --- sections -----------------------------------------------------------------------------------


def test_a_section_is_taken_as_it_stands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text("name: n\nmodels: [{a: 1}]\n")
    parser = parser_of()
    parser.add_sections("models", "limits")
    args = parse(parser, ["--config", str(path)])
    assert args.models == [{"a": 1}]
    assert args.limits is None


def test_an_empty_section_and_one_of_another_command_are_named(read: Read, tmp_path: Path) -> None:
    assert "unknown option 'models'" in refusal(read, "name: n\nmodels: [a]\n")
    path = tmp_path / "empty.yaml"
    path.write_text("models:\n")
    parser = parser_of()
    parser.add_sections("models")
    with pytest.raises(UsageError, match=r"empty\.yaml: the section models is empty"):
        parse(parser, ["--config", str(path)])


def test_flags_of_an_own_list_replace_the_one_of_the_file(tmp_path: Path) -> None:
    def read_list(*flags: str) -> list[str]:
        parser = parser_of()
        parser.add_argument("--url", action=OwnList, default=[])
        found = parse(parser, ["--name", "n", "--config", str(path), *flags]).url
        assert isinstance(found, list)
        return found

    path = tmp_path / "it.yaml"
    path.write_text("url: [a, b]\n")
    assert read_list() == ["a", "b"]
    assert read_list("--url", "c") == ["c"]
    assert read_list("--url", "c", "--url=d") == ["c", "d"]
    path.write_text("")
    assert read_list("--url", "c", "--url=d") == ["c", "d"]


# --- flags --------------------------------------------------------------------------------------


def test_option_names_are_never_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(parser_of(), ["--name", "n", "--cou", "3"])
    assert "--cou" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "bounds", "good"),
    [
        (int, (1, 10), {"1": 1, "10": 10, " 7 ": 7}),
        (int, (-1,), {"-1": -1, "0": 0, "99999999999": 99999999999}),
        (float, (0.1,), {"0.1": 0.1, "1e9": 1e9, "5": 5.0}),
    ],
)
def test_a_number_within_its_bounds_is_taken(
    kind: type[int], bounds: tuple[float, ...], good: dict[str, float]
) -> None:
    convert = number(kind, *bounds)
    assert {text: convert(text) for text in good} == good
    assert all(type(convert(text)) is kind for text in good)


@pytest.mark.parametrize(
    ("kind", "bounds", "text", "said"),
    [
        (int, (1, 10), "0", "0 is out of range; allowed: 1 to 10"),
        (int, (1, 10), "11", "11 is out of range; allowed: 1 to 10"),
        (int, (-1,), "-2", "-2 is out of range; allowed: -1 or more"),
        (int, (1,), "1.5", "'1.5' is not a whole number"),
        (int, (1,), "", "'' is not a whole number"),
        (float, (0.1,), "0.09", "0.09 is out of range; allowed: 0.1 or more"),
        (float, (0,), "nan", "nan is out of range; allowed: 0 or more"),
        (float, (0, 5), "inf", "inf is out of range; allowed: 0 to 5"),
        (float, (0,), "soon", "'soon' is not a number"),
    ],
)
def test_a_number_out_of_bounds_is_refused_with_the_bounds(
    kind: type[int], bounds: tuple[float, ...], text: str, said: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(kind, *bounds)(text)
    assert str(caught.value) == said


TIMES = [(n, a) for n, parser in parsers().items() for a in parser._actions if a.metavar == "S"]


@pytest.mark.parametrize(
    ("command", "option"), TIMES, ids=lambda each: getattr(each, "dest", str(each))
)
def test_no_option_takes_more_seconds_than_anybody_waits(
    command: str, option: argparse.Action
) -> None:
    assert callable(option.type)
    assert float(option.type("3600")) == 3600
    for text in ("inf", "1e300", "nan", "4e8"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is out of range; allowed: "):
            option.type(text)


def test_help_shows_every_default_also_where_there_is_none() -> None:
    parser = Parser(prog="it")
    parser.add_argument("--some", default=5, help="some number")
    parser.add_argument("--none", help="none at all")
    parser.add_argument("--switch", action="store_true", help="a switch")

    text = parser.format_help()

    assert "some number (default: 5)" in text
    assert "none at all (default: none)" in text
    assert "a switch (default: no)" in text


# --- a command line for another command ---------------------------------------------------------


def round_trip(flags: Sequence[str]) -> list[str]:
    """Check that what is handed on parses to the same; return it."""
    args = parse(parser_of(), ["--name", "n", *flags])
    argv = argv_of(parser_of(), args)
    assert parse(parser_of(), argv) == args
    return argv


def test_what_is_handed_on_is_what_differs_from_the_defaults() -> None:
    assert round_trip([]) == ["--name=n"]
    assert round_trip(["--count", "7", "--kind", "a"]) == ["--name=n"]
    assert round_trip(["--count=8", "--dry-run"]) == ["--name=n", "--count=8", "--dry-run"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--text=--latency-s 0.1 --rules 'a b.yaml'"],
        ["--text=-"],
        ["--text=--count=3"],
        ["--text=a=b c\n\"d'"],
        ["--pair=a=1", "--pair=-b", "--pair=", "--pair=--count"],
        ["--file=-odd/name.yaml"],
        ["--wait-s=0.1"],
        ["--wait-s=1e-07"],
        ["--count=100", "--dry-run", "--kind=b"],
        ["--name=-n"],
        ["--name="],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_what_is_handed_on_arrives_as_it_was_given(flags: list[str]) -> None:
    round_trip(flags)


def test_what_a_file_set_is_handed_on_too(read: Read) -> None:
    args = read("name: n\ncount: 12\ndry-run: true\npair: [x=1, -y]\ntext: '--a b'\n")

    argv = argv_of(parser_of(with_config=False), args)  # the values instead of their file
    again = parse(parser_of(), argv)

    assert vars(again) == {**vars(args), "config": None}


def test_only_the_options_of_the_given_parser_are_handed_on() -> None:
    args = argparse.Namespace(name="n", count=9, unknown="x")
    parser = Parser(add_help=False)
    parser.add_argument("--count", type=int, default=7)
    parser.add_argument("--absent", default="d")

    assert argv_of(parser, args) == ["--count=9"]


# --- a run's settings ---------------------------------------------------------------------------


def limits(*flags: str) -> argparse.Namespace:
    parser = Parser()
    add_run_limits(parser)
    return parse(parser, flags)


def test_limits_become_the_queues_policy() -> None:
    policy = policy_of(
        limits("--work-timeout=60", "--max-retries=-1", "--lease-term", "5", "--max-line-bytes=9")
    )
    assert (policy.work_timeout_s, policy.max_retries, policy.lease_term_s) == (60.0, -1, 5.0)


def test_the_defaults_of_the_limits_are_those_of_the_policy() -> None:
    policy = policy_of(limits())
    assert (policy.work_timeout_s, policy.max_retries, policy.lease_term_s) == (1200.0, 3, 30.0)


def test_window_and_backups_become_the_queues_policy() -> None:
    assert (policy_of(limits()).window, policy_of(limits()).backups) == (0, True)
    policy = policy_of(limits("--window=40", "--backup-tasks", "off"))
    assert (policy.window, policy.backups) == (40, False)
    assert policy_of(limits("--backup-tasks=auto")).backups


@pytest.mark.parametrize(("word", "backups"), [("off", False), ("'off'", False), ("auto", True)])
def test_the_word_off_of_a_configuration_file_is_not_taken_for_false(
    word: str, backups: bool, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"backup-tasks: {word}\n")
    parser = Parser()
    parser.add_argument("--config", type=Path)
    add_run_limits(parser)
    assert policy_of(parse(parser, ["--config", str(config)])).backups == backups


@pytest.mark.parametrize(
    "flag",
    ["--max-retries=-2", "--work-timeout=0", "--lease-term=0", "--max-line-bytes=0", "--window=-1"],
)
def test_a_limit_out_of_bounds_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        limits(flag)
    assert "is out of range; allowed: " in capsys.readouterr().err


def test_a_runs_paths_are_absolute_and_its_state_lies_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    settings = run_settings_of(limits("--max-line-bytes=99"), Path("in"), Path("sub/out.jsonl"))

    assert settings.infile == tmp_path / "in"
    assert settings.outfile == tmp_path / "sub" / "out.jsonl"
    assert settings.state_dir == tmp_path / "sub" / "out.jsonl.dispatch"
    assert settings.state_dir == default_state_dir(settings.outfile)
    assert settings.max_line_bytes == 99


def test_a_runs_state_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = limits()
    args.state = Path("state")
    assert run_settings_of(args, Path("in"), Path("out")).state_dir == tmp_path / "state"
