"""What `dispatcher slurm` makes of slurm/'s scripts, against files that people have read.

After a change that is meant, write the golden files anew and look at the difference:

    python -m tests.slurm.test_render && git diff tests/slurm/golden
"""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from dispatcher.slurm import cli
from dispatcher.slurm.render import log_of, render, variables_of
from dispatcher.slurm.settings import SCRIPTS_OF, SETTINGS, Settings, build_parser, settings_of
from tests.support.processes import ROOT

GOLDEN = Path(__file__).parent / "golden"
SLURM = ROOT / "slurm"
NASTY = 'it\'s a "run" of $HOME, `id` $(id) \\n #1; & *'

CASES: dict[str, tuple[str, list[str]]] = {
    "defaults": ("run", []),
    "eight-gpus": (
        "run",
        [
            *("--task", "/data/my tasks.py:MyTask", "--infile", "/data/in.jsonl"),
            *("--outfile", "/data/answers.jsonl", "--model", "org/model"),
            *("--tensor-parallel", "2", "--workers", "auto", "--work-timeout", "600"),
            *("--worker-args", "--task-arg temperature=0 --vllm-extra-args='--seed 1'"),
            *("--container", "/images/vllm openai.sif", "--modules", "cuda/12 apptainer"),
            *("--env", "CONTAINER_BINDS=/data,/scratch", "--env", "HF_HOME=/data/$USER's"),
            *("--nodes", "4", "--tasks-per-node", "4", "--gpus-per-node", "a100:8"),
            *("--time", "1-12:00:00", "--partition", "gpu", "--account", "proj", "--qos", "low"),
            *("--job-name", "my run", "--sbatch-arg=--mem=0", "--sbatch-arg=--exclusive"),
            *("--sbatch-arg=--signal B:TERM@300", "--sbatch-arg=-x n[1-2]"),
        ],
    ),
    "apart": (
        "start",
        [
            *("--infile", "hf:org/name", "--input-subset", "en", "--input-split", "test[:10%]"),
            *("--outfile", "/data/answers.jsonl"),
            *("--state", "/scratch/state", "--backend", "fake", "--batch-size", "8"),
            *("--server-args", "--window 100000", "--server-timeout", "7200"),
            *("--gpus-per-node", "1", "--time", "01:00:00", "--job-name", "answers"),
            *("--partition", "gpu", "--server-partition", "cpu", "--server-time", "2-0"),
            *("--server-sbatch-arg=--mem=8G",),
        ],
    ),
    "quotes": ("run", ["--model", NASTY, f"--sbatch-arg=--comment={NASTY}", "--env", f"X={NASTY}"]),
}


def settings_for(command: str, flags: list[str]) -> Settings:
    flags = ["--chdir", "/data/my runs", "--outfile", "/data/out.jsonl", *flags]
    return settings_of(build_parser(command).parse_args(flags), command, {}, None)


def rendered(command: str, flags: list[str]) -> dict[str, str]:
    """Return the scripts that a command submits, by name."""
    settings = settings_for(command, flags)
    return {
        name: render(
            (SLURM / f"{name}.sbatch").read_text(),
            scripts_dir="/opt/dispatcher/slurm",
            variables=settings.variables,
            environment=settings.environment,
            options=settings.options[name],
        )
        for name in SCRIPTS_OF[command]
    }


def golden_files() -> dict[str, str]:
    """Return what the golden files should hold, by their names."""
    return {
        f"{case}-{name}.sbatch": text
        for case, (command, flags) in CASES.items()
        for name, text in rendered(command, flags).items()
    }


def test_the_scripts_are_those_that_people_have_read() -> None:
    written = {path.name: path.read_text() for path in GOLDEN.iterdir()}
    assert golden_files() == written, __doc__


@pytest.mark.shellcheck
def test_rendered_scripts_pass_shellcheck() -> None:
    paths = sorted(str(path) for path in GOLDEN.iterdir())
    done = subprocess.run(
        ["shellcheck", "--external-sources", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for path in paths:
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize(
    "value", [NASTY, "plain", "two\nlines", "'", '"', "\\", "$MODEL", " ", "ä€", "a=b", "-x", "}"]
)
def test_a_setting_reaches_the_script_as_it_was_given(value: str) -> None:
    script = rendered("run", [f"--model={value}", "--env", f"HERE={value}"])["run"]
    begin = script.index("# ---- Settings")
    block = script[begin : script.index("\n\n", begin)]
    code = f'set -eu\n{block}\nprintf "%s\\0" "$MODEL" "$HERE" "$TASK"'
    # What is in the environment counts no more: it counted when the script was written.
    env = {"TASK": "another", "MODEL": "another", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}\0{value}\0\0"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("hf:org/name", "hf:org/name"),
        ("hf:/data/set", "hf:/data/set"),
        ("hf:./set", "hf:{here}/set"),
        ("data", "{here}/data"),
    ],
)
def test_an_input_means_the_same_in_a_job(given: str, kept: str) -> None:
    variables = settings_for("run", ["--infile", given]).variables
    assert variables["INPUT"] == kept.format(here=Path.cwd())


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--mem=0", "#SBATCH --mem=0"),
        ("--mem 0", "#SBATCH --mem=0"),
        ("--exclusive", "#SBATCH --exclusive"),
        ("-p gpu", "#SBATCH -p gpu"),
        ("-pgpu", "#SBATCH -p gpu"),
        ("-H", "#SBATCH -H"),
        ("--nodes=4", "#SBATCH --nodes=4"),
        ("--comment=a b", '#SBATCH --comment="a b"'),
        ('--comment=say "a\\b"', '#SBATCH --comment="say \\"a\\\\b\\""'),
        ("--comment=a#b", '#SBATCH --comment="a#b"'),
    ],
)
def test_an_option_of_sbatch_stands_once_among_the_directives(option: str, line: str) -> None:
    lines = rendered("run", [f"--sbatch-arg={option}"])["run"].splitlines()
    directives = [found for found in lines if found.startswith("#SBATCH")]
    assert directives.count(line) == 1
    names = [found.split()[1].partition("=")[0] for found in directives]
    assert len(names) == len(set(names))
    # sbatch reads none behind the first command.
    first_command = next(n for n, found in enumerate(lines) if found and found[0] != "#")
    assert max(n for n, found in enumerate(lines) if found.startswith("#SBATCH")) < first_command


def test_every_setting_of_the_scripts_is_an_option() -> None:
    known = {setting.variable for setting in SETTINGS}
    for command, names in SCRIPTS_OF.items():
        has = {v for name in names for v in variables_of((SLURM / f"{name}.sbatch").read_text())}
        offered = {action.dest for action in build_parser(command)._actions}
        assert has <= known
        assert has == {setting.variable for setting in SETTINGS if setting.dest in offered}


def test_the_defaults_in_the_help_are_those_of_the_scripts() -> None:
    """A number in brackets after a script's setting stands in the option's help as well."""
    text = "".join((SLURM / f"{name}.sbatch").read_text() for name in ("run", "server", "workers"))
    for setting in SETTINGS:
        for line in text.splitlines():
            if line.startswith(f"{setting.variable}=") and line.endswith(")"):
                default = line.rpartition("(")[2].rstrip(")")
                if default.isdecimal():
                    assert f"(default: {default})" in setting.help, setting.flag


def test_the_log_is_where_the_script_says() -> None:
    scripts = rendered("start", ["--job-name", "my job", "--sbatch-arg=--output=logs/%x.%A_%4a"])
    assert log_of(scripts["server"], "12") == "/data/my runs/my job-server-12.log"
    assert log_of(scripts["workers"]) == "/data/my runs/logs/my job-workers.*_*"


def test_a_wheel_has_every_script() -> None:
    """The package has them by a link, which a wheel follows to what these patterns name."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = content["tool"]["setuptools"]["package-data"]["dispatcher"]
    found = {path.resolve() for pattern in patterns for path in (ROOT / "dispatcher").glob(pattern)}
    scripts = {path for path in SLURM.iterdir() if path.suffix in (".sh", ".sbatch")}
    assert len(scripts) > 5
    assert scripts <= found
    assert cli._scripts_dir() == SLURM


def test_a_recorded_command_is_the_same_command() -> None:
    for command, flags in CASES.values():
        settings = settings_for(command, flags)
        again = [
            f"--{name.replace('_', '-')}={value}"
            for name, values in settings.recorded.items()
            for value in (values if isinstance(values, list) else [values])
        ]
        args = build_parser(command).parse_args(again)
        assert settings_of(args, command, {}, None) == settings


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.iterdir():
        path.unlink()
    for name, text in golden_files().items():
        (GOLDEN / name).write_text(text)
