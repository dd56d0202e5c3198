"""Write docs/reference.md: every command's options, and what a YAML file may hold, from the code.

python scripts/make_reference.py          write it
python scripts/make_reference.py --check  exit with 1 when it is not what the code says
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dispatcher import fakellm, launch, orders, watch
from dispatcher.doctor import command as doctor
from dispatcher.errors import ExitCode
from dispatcher.export import cli as export
from dispatcher.help_text import HelpFormatter
from dispatcher.runs import cli as runs
from dispatcher.server import cli as server
from dispatcher.slurm import cli as slurm
from dispatcher.slurm.settings import SETTINGS as SLURM_SETTINGS
from dispatcher.taskmanager import cli as taskmanager
from dispatcher.taskmanager.backend.settings import KINDS, NESTED, BackendSettings, Settings

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
_COMMAND = "python scripts/make_reference.py"

_HEAD = f"""\
# Reference

<!-- Made by `{_COMMAND}` from the code; change the help texts there. -->

All options of all commands, what a YAML file may hold, variables and exit codes. Options have
whole names only. What can be given several times says so.

`--config FILE` takes a command's options from a YAML file, under their names without the dashes
in front, with `-` or `_`: `max_retries: 5`. A switch is `true` or `false`. A flag wins over the
file, the file over what `--resume` remembers, and an unknown key is refused.
"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the options of every command, by the command's name."""
    found: dict[str, argparse.ArgumentParser] = {
        "dispatcher run": launch.build_parser(),
        "dispatcher server": server.build_parser(),
        "dispatcher task-run": taskmanager.build_parser(),
        "dispatcher doctor": doctor.build_parser(),
        "dispatcher watch": watch.build_parser(),
        **{f"dispatcher {name}": parser for name, parser in orders.parsers().items()},
        "dispatcher runs": runs.build_parser(),
        "dispatcher export": export.build_parser(),
    }
    found |= {f"dispatcher slurm {name}": parser for name, parser in slurm.parsers().items()}
    found["python -m dispatcher.fakellm"] = fakellm.build_parser()
    return found


def reference() -> str:
    """Return the whole page."""
    commands = parsers()
    parts = [_HEAD, *(_links(commands)), ""]
    for name, parser in commands.items():
        parts += _command(name, parser)
    parts += _sections()
    parts += _slurm_variables()
    parts += _exit_codes()
    return "\n".join(parts).rstrip("\n") + "\n"


def _links(commands: Iterable[str]) -> Iterator[str]:
    others = ["The file of --config", "Variables of the Slurm scripts", "Exit codes"]
    for name in (*commands, *others):
        anchor = re.sub(r"[^a-z0-9 _-]", "", name.lower()).replace(" ", "-")
        yield f"- [{name}](#{anchor})"


# -------------------------------------------------------------------- commands


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {name}\n"
    other_name = {"dispatcher server": "dispatcher-server", "dispatcher task-run": parser.prog}
    if name in other_name and other_name[name] != name:
        yield f"Also as `{other_name[name]}`.\n"
    for text in (parser.description, parser.epilog):
        if text:
            yield from _paragraphs(text)
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help"]
        if not actions:
            continue
        title = group.title or ""
        yield f"### {title if title not in ('options', 'positional arguments') else 'General'}\n"
        if group.description:
            yield _escaped(group.description) + "\n"
        yield "| option | default | meaning |"
        yield "|---|---|---|"
        for action in actions:
            yield _option(action, parser)
        yield ""


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a description as Markdown; paragraphs with indented lines are shown as written."""
    for paragraph in text.split("\n\n"):
        if "\n " in f"\n{paragraph}":
            yield f"```text\n{paragraph}\n```\n"
        else:
            yield _escaped(" ".join(paragraph.split())) + "\n"


def _option(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    names = ", ".join(action.option_strings) or action.dest
    formatter = HelpFormatter(parser.prog)
    if action.option_strings and action.nargs != 0:
        names += " " + formatter._format_args(action, action.dest.upper())
    elif not action.option_strings:
        names = formatter._format_args(action, action.dest)
    meaning, default = _told_default(action)
    default = _escaped(default) if default else _default_of(action)
    return f"| `{_in_code(names)}` | {default} | {_escaped(meaning)} |"


def _told_default(action: argparse.Action) -> tuple[str, str]:
    """Split a help text into what it says and the default that it names, if it names one."""
    return _split_default((action.help or "") % {"default": action.default})


def _split_default(text: str) -> tuple[str, str]:
    meaning = " ".join(text.split())
    told = re.search(r" ?\(default(?: of ([^:()]*))?: ((?:[^()]|\([^()]*\))*)\)$", meaning)
    if told is None:
        return meaning, ""
    return meaning[: told.start()], told[2] if told[1] is None else f"{told[1]}: {told[2]}"


def _default_of(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.nargs == 0:
        return "off"
    if action.default in (None, "", argparse.SUPPRESS) or action.default == []:
        return "none"
    if isinstance(action.default, float):
        return f"{action.default:g}"
    return _escaped(str(action.default))


# -------------------------------------------------------------------- sections of a file


_SECTIONS_TEXT = """\
## The file of --config

Beside the options, the file of `dispatcher run` and `dispatcher task-run` may hold these sections.

- `backends`: a mapping of names to backends, each a mapping with `kind` and the keys of that kind.
  A request picks one by its name, as `"model"`; one that names none goes to the first.
- `models_to_run`: a list of models at one hosted endpoint, each with `name` and, if it has its
  own, `concurrency` and `generation`. The first is the default.
- `concurrency`, `load_monitoring`, `generation`: for every backend that does not say otherwise.
"""


def _sections() -> Iterator[str]:
    yield _SECTIONS_TEXT
    for name, nested in NESTED.items():
        yield f"### {name}\n"
        yield from _keys(nested, ())
    common = BackendSettings.__struct_fields__
    yield "### Every kind of backend\n"
    yield from _keys(BackendSettings, ())
    for kind, settings in KINDS.items():
        yield f"### kind: {kind}\n"
        yield _escaped(" ".join((settings.__doc__ or "").split())) + "\n"
        yield from _keys(settings, common)


def _keys(settings: type[Settings], without: Iterable[str]) -> Iterator[str]:
    """Yield a table of the keys of a section; their limits are those that are checked."""
    (_, components) = msgspec.json.schema_components([settings])
    schema = components[settings.__name__]
    skipped = set(without)
    flags = {action.dest: action for action in launch.build_parser()._actions}
    yield "| key | default | allowed | meaning |"
    yield "|---|---|---|---|"
    for field in msgspec.structs.fields(settings):
        if field.name in skipped:
            continue
        known = schema["properties"][field.name]
        meaning = known.get("description", "")
        if not meaning and field.name in flags:
            meaning, _ = _told_default(flags[field.name])
        row = (f"`{field.name}`", _field_default(field), _allowed(known), _escaped(meaning))
        yield f"| {' | '.join(row)} |"
    yield ""


def _field_default(field: msgspec.structs.FieldInfo) -> str:
    default = field.default
    if isinstance(default, Settings):
        return "as above"
    if isinstance(default, float):
        return f"{default:g}"
    if default is None or default == "":
        return "none"
    return str(default).lower() if isinstance(default, bool) else f"{default}"


def _allowed(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        words = [_allowed(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(words)
    if "$ref" in schema:
        return "a mapping, see above"
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "array": "list",
    }[schema["type"]]
    limits = [
        f"{word} {schema[key]:,.15g}"
        for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
        if key in schema
    ]
    return " ".join([kind, *limits])


# -------------------------------------------------------------------- the rest


def _slurm_variables() -> Iterator[str]:
    yield "## Variables of the Slurm scripts\n"
    yield "Settings of `slurm/*.sbatch`, and the option of `dispatcher slurm` that sets each.\n"
    yield "| variable | option | default | meaning |"
    yield "|---|---|---|---|"
    for setting in SLURM_SETTINGS:
        meaning, default = map(_escaped, _split_default(setting.help))
        yield f"| `{setting.variable}` | `{setting.flag}` | {default} | {meaning} |"
    yield ""


_MEANINGS = {
    ExitCode.COMPLETE: "complete",
    ExitCode.ERROR: "an error; the message says which and what to do",
    ExitCode.USAGE: "the command line, or a file of options, cannot be right",
    ExitCode.STOPPED: "stopped; the same command, or `--resume`, goes on",
    ExitCode.COMPLETE_WITH_ERRORS: "complete, some lines are `__ERROR__` lines",
    ExitCode.SERVER_LOST: "the server stayed away too long (task managers)",
}


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes\n"
    yield "| code | meaning |"
    yield "|---|---|"
    for code in ExitCode:
        yield f"| {code.value} | {_MEANINGS[code]} |"


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is; what stands between backticks it does anyway."""
    parts = text.split("`")
    parts[::2] = map(_escaped_words, parts[::2])
    return "`".join(parts)


def _escaped_words(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("_", "\\_")


def _in_code(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    text = reference()
    if not args.check:
        REFERENCE.parent.mkdir(exist_ok=True)
        REFERENCE.write_text(text)
        return 0
    if not REFERENCE.is_file() or REFERENCE.read_text() != text:
        print(f"{REFERENCE} is not what the code says; run: {_COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
