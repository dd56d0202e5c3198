"""A batch script of slurm/ with a run's settings written into it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath

_SETTINGS_BEGIN = "# ---- Settings"
_VARIABLE = re.compile(r"\b([A-Z][A-Z0-9_]*)=\$\{\1:-([^}]*)\}")
SBATCH_OPTION = re.compile(
    r"(?P<long>--[A-Za-z][\w-]*)(?:[= ](?P<value>.*))?|(?P<short>-[A-Za-z]) *(?P<of_short>.*)"
)
"""What sbatch takes as an option: `--name`, `--name=value`, `-x`, `-x value`; one line."""


def render(
    script: str,
    *,
    scripts_dir: str,
    variables: Mapping[str, str],
    environment: Mapping[str, str],
    options: Sequence[str],
) -> str:
    """Return the script with these settings at its top, so that it goes by nothing else.

    Of `variables` those count that the script has, and where there is none, its default;
    `environment` is exported whole. `options` are sbatch's: each takes the place of the script's
    own of that name, or follows it. `scripts_dir` is where the scripts are that it needs.
    """
    lines = _with_options(script.splitlines(), options)
    begin = next(n for n, line in enumerate(lines) if line.startswith(_SETTINGS_BEGIN)) + 1
    end = lines.index("", begin)
    lines[begin - 1] = f"{_SETTINGS_BEGIN}, as they were given. Empty: the default."
    added = [f"DISPATCHER_SLURM_DIR={shlex.quote(scripts_dir)} # the other scripts"]
    added += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    block = [_with_variables(line, variables) for line in lines[begin:end]]
    shebang, *rest = [*lines[:begin], *added, *block, *lines[end:]]
    notes = [
        "# Written by `dispatcher slurm`, which writes it anew when it submits the run again.",
        # common.sh reads the settings; a dollar sign in one of them is meant.
        "# shellcheck disable=SC2016,SC2034",
    ]
    return "\n".join([shebang, *notes, *rest, ""])


def variables_of(script: str) -> list[str]:
    """Return the names of a script's settings."""
    block = script.split(_SETTINGS_BEGIN, 1)[1].split("\n\n", 1)[0]
    return [match[1] for match in _VARIABLE.finditer(block)]


def log_of(script: str, number: str = "*") -> str:
    """Return where the job of a rendered script writes its log; `*` stands for what is not known,
    such as the numbers of an array's elements."""
    found = re.findall(r'^#SBATCH --(output|job-name|chdir)="?(.*?)"?$', script, re.MULTILINE)
    given = {name: re.sub(r"\\(.)", r"\1", value) for name, value in found}
    name = given["output"].replace("%x", given["job-name"]).replace("%j", number)
    name = re.sub("%[0-9]*[a-zA-Z]", "*", name)
    return str(PurePath(given["chdir"]) / name)


def _with_variables(line: str, variables: Mapping[str, str]) -> str:
    code, mark, comment = line.partition(" # ")

    def assignment(match: re.Match[str]) -> str:
        return f"{match[1]}={shlex.quote(variables.get(match[1]) or match[2])}"

    changed = _VARIABLE.sub(assignment, code.rstrip())
    return f"{changed:<{len(code)}}{mark}{comment}" if mark else changed


def _with_options(lines: list[str], options: Sequence[str]) -> list[str]:
    lines = list(lines)
    for option in options:
        name, text = _directive(option)
        own = [n for n, line in enumerate(lines) if line.startswith("#SBATCH ")]
        same = [n for n in own if re.split(r"[=\s]", lines[n].split(" ", 1)[1])[0] == name]
        if same:
            lines[same[0]] = text
        else:
            lines.insert(own[-1] + 1, text)
    return lines


def _directive(option: str) -> tuple[str, str]:
    """Return the name of one of sbatch's options, and the line that gives it in a script."""
    match = SBATCH_OPTION.fullmatch(option)
    assert match is not None, option  # settings.py has looked at it
    if match["long"] is None:
        name, value, between = match["short"], match["of_short"] or None, " "
    else:
        name, value, between = match["long"], match["value"], "="
    return name, f"#SBATCH {name}" + ("" if value is None else between + _word(value))


def _word(value: str) -> str:
    """Return a value as sbatch reads it: where quotes must be, also inside of them, a backslash
    stands before what is meant as it is."""
    if not re.search(r"[\s\"'\\#]", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
