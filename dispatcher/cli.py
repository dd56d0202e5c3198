"""`dispatcher`: one command with the others as subcommands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from dispatcher import __version__
from dispatcher.errors import ExitCode

# Each subcommand parses its own options; importing only the one asked for keeps --help quick.
# Where one has a module of its own, that has a `main`; the others name their function.
COMMANDS = {
    "run": ("dispatcher.launch", "run a task over a file on this machine"),
    "server": ("dispatcher.server.cli", "serve a file's lines to task managers"),
    "task-run": ("dispatcher.taskmanager.cli", "run a task against a model server"),
    "watch": ("dispatcher.watch", "show how a run goes, from anywhere"),
    "pause": ("dispatcher.orders:pause", "have a run wait, until it is told to go on"),
    "unpause": ("dispatcher.orders:unpause", "let a paused run go on"),
    "set": ("dispatcher.orders:set_limits", "change a run's work timeout, or its failure limit"),
    "drain": ("dispatcher.orders:drain", "end a run's server when it has what is under way"),
    "runs": ("dispatcher.runs.cli", "list runs; what became of a line; failed lines out and in"),
    "export": ("dispatcher.export.cli", "write a run's output as Parquet, or compressed"),
    "doctor": ("dispatcher.doctor.command", "check a set-up before a run, and say what to mend"),
    "slurm": ("dispatcher.slurm.cli", "submit a run to Slurm, look at its jobs, stop it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return ExitCode.COMPLETE if words else ExitCode.USAGE
    if words[0] == "--version":
        print(f"dispatcher {__version__}")
        return ExitCode.COMPLETE
    if words[0] not in COMMANDS:
        print(f"dispatcher: there is no command {words[0]!r}\n{_usage()}", file=sys.stderr)
        return ExitCode.USAGE
    module, _, function = COMMANDS[words[0]][0].partition(":")
    try:
        code: int = getattr(import_module(module), function or "main")(words[1:])
    except KeyboardInterrupt:  # before the command took the signal over
        print(f"dispatcher {words[0]}: stopped before anything was begun", file=sys.stderr)
        return ExitCode.STOPPED
    return code


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dispatcher COMMAND [options]",
            "",
            "Run LLM workflows over very large JSONL files; finished work is never lost.",
            "",
            *lines,
            "",
            "dispatcher COMMAND --help tells the options of one.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
