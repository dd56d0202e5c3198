"""dispatcher-server as it is on a cluster whose file system has no locks: on a node of any name.

`python -m tests.faults.lockless_server HOST [options of dispatcher-server]`
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import msgspec

from dispatcher.server import cli
from dispatcher.storage.files import Files
from dispatcher.storage.ownership import Identity, Ownership


class NoLocks:
    """What a lock is where the file system has none."""

    def acquire(self) -> bool:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def release(self) -> None:
        pass


def main(host: str, *options: str) -> int:
    identity = msgspec.structs.replace(Identity.of_this_process(), host=host)

    def claim(state_dir: Path, files: Files, *, takeover: bool) -> Ownership:
        return Ownership(state_dir, files, takeover=takeover, identity=identity, lock=NoLocks())

    cli.Ownership = claim  # type: ignore[assignment,misc]
    return cli.main(options)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
