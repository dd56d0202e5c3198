"""`python -m dispatcher.taskmanager.backend.guard COMMAND...`: tie a server to its owner's life.

Runs COMMAND in this process group and ends the whole group when the owner goes away, however it
goes (also by `kill -9`): the owner holds the other end of standard input, which the system
closes with it. Without this, a killed task manager would leave a model server on the GPU.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

STDIN_OPTION = "--stdin-fd="
"""Before COMMAND: a descriptor that this process inherited, to be the command's standard input."""

_GRACE_S = 10.0
_POLL_S = 0.1


def main() -> int:
    """Run the command until it ends or the owner does; return the command's exit code."""
    owner = sys.stdin.fileno()
    # The group gets the signal too; this process must outlive it to see the others end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command, stdin = sys.argv[1:], subprocess.DEVNULL
    if command[0].startswith(STDIN_OPTION):
        stdin = int(command.pop(0).removeprefix(STDIN_OPTION))
    child = subprocess.Popen(command, stdin=stdin, preexec_fn=_restore_signals)
    if stdin != subprocess.DEVNULL:
        os.close(stdin)  # the writer of a pipe is to notice when nobody reads it any more
    while (code := child.poll()) is None:
        readable, _, _ = select.select([owner], [], [], _POLL_S)
        if readable and not os.read(owner, 1):
            _end(child)
            return 0
    return code if code >= 0 else 128 - code


def _restore_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(child: subprocess.Popen[bytes]) -> None:
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
