"""`dispatcher pause`, `unpause`, `set` and `drain`: tell the server of a run what the page can.

They are the calls of docs/protocol.md that want the admin token. Each can be said twice.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from dispatcher.client import Address, Answer, WorkClient
from dispatcher.config import Parser, add_server_address, failure_limit, seconds
from dispatcher.errors import (
    AccessDeniedError,
    DispatcherError,
    ExitCode,
    StateError,
    StorageError,
    UsageError,
)
from dispatcher.runs.reading import read_owner
from dispatcher.server_file import (
    ADMIN_TOKEN_FILE,
    ADMIN_TOKEN_VARIABLE,
    SERVER_FILE,
    read_server_file,
    read_token_file,
    server_file_in,
    state_dir_of,
    token_given,
)
from dispatcher.storage.ownership import Identity

_ANSWER_S = 30.0
_ADMIN_TOKEN_OPTION = "--admin-token-file"
_STATE = "@answers.jsonl.dispatch"
_EXIT_CODES = "exit codes: 0 done, 1 error, also where there is nobody to be told, 2 usage"


def pause(argv: Sequence[str] | None = None) -> int:
    """Run `dispatcher pause`; return its exit code."""
    return _run("pause", argv)


def unpause(argv: Sequence[str] | None = None) -> int:
    """Run `dispatcher unpause`; return its exit code."""
    return _run("unpause", argv)


def set_limits(argv: Sequence[str] | None = None) -> int:
    """Run `dispatcher set`; return its exit code."""
    return _run("set", argv)


def drain(argv: Sequence[str] | None = None) -> int:
    """Run `dispatcher drain`; return its exit code."""
    return _run("drain", argv)


# -------------------------------------------------------------------- options


def parsers() -> dict[str, Parser]:
    """Return the options of each command by its name."""
    return {
        "pause": _pause_parser(),
        "unpause": _unpause_parser(),
        "set": _set_parser(),
        "drain": _drain_parser(),
    }


def _pause_parser() -> Parser:
    parser = _parser(
        "pause",
        "Have a run wait: nothing more is handed out until it is told to go on, also when its "
        "server is started again. What is under way ends and is taken, and task managers keep "
        "their models loaded.",
        "",
        " --reason 'the nodes are needed until noon'",
    )
    parser.add_argument(
        "--reason", metavar="TEXT", default="", help="why, for others to read wherever it is shown"
    )
    return parser


def _unpause_parser() -> Parser:
    parser = _parser(
        "unpause",
        "Let a run go on that somebody paused, and with --accept-failures also one that is paused "
        "because too many lines failed. A run whose server is not running goes on with the same "
        "options of its next start.",
        "",
        " --accept-failures",
    )
    parser.add_argument(
        "--accept-failures",
        action="store_true",
        help="the lines that failed so far stay as they are, and count no more against "
        "--max-failures",
    )
    return parser


def _set_parser() -> Parser:
    parser = _parser(
        "set",
        "Change limits of a run while it goes on.",
        " --work-timeout 3600",
        " --max-failures 5%",
    )
    parser.add_argument(
        "--work-timeout",
        type=seconds(0.001),
        metavar="S",
        help="seconds an item may take without progress before it is handed out again, those "
        "under way too; a server that is started again goes by its own --work-timeout "
        "(default: as it is)",
    )
    parser.add_argument(
        "--max-failures",
        type=failure_limit,
        metavar="N|P%|off",
        help="pause the run when more lines than this became __ERROR__ lines, and let it go on "
        "where fewer did; a server that is started again with the same --max-failures as before "
        "keeps to this one (default: as it is)",
    )
    return parser


def _drain_parser() -> Parser:
    return _parser(
        "drain",
        "End a run's server as SIGTERM does: it hands out nothing more, takes what comes in for "
        "up to 20 s, and ends with code 3. Nothing starts it again by itself; the run goes on as "
        "after any stop.",
        "",
    )


def _parser(name: str, description: str, *examples: str) -> Parser:
    lines = [f"  dispatcher {name} {_STATE}{options}" for options in examples]
    parser = Parser(
        prog=f"dispatcher {name}",
        description=description,
        epilog="\n".join(["examples:", *lines, "", _EXIT_CODES]),
    )
    add_server_address(parser)
    parser.add_argument(
        _ADMIN_TOKEN_OPTION,
        type=Path,
        metavar="FILE",
        help=f"file with the run's admin token (default: {ADMIN_TOKEN_FILE} beside server.json, if "
        f"that is named, else the variable {ADMIN_TOKEN_VARIABLE})",
    )
    return parser


# -------------------------------------------------------------------- orders


def _run(name: str, argv: Sequence[str] | None) -> int:
    try:
        args = parsers()[name].parse_args(argv)
        orders = list(_orders(name, args))
        left = ""
        with _Server(args) as server:
            for path, body in orders:
                answer = server.tell(path, body)
                # A pause that is left may be lifted by the next order.
                left = answer.message if name == "unpause" and answer.state == "paused" else ""
                if not left:
                    print(answer.message, flush=True)
        if left:
            raise StateError(left)
        return ExitCode.COMPLETE
    except DispatcherError as error:
        print(f"dispatcher {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = "whether the server heard it is not known; it can be said again"
        print(f"dispatcher {name}: interrupted; {again}", file=sys.stderr)
        return ExitCode.ERROR


def _orders(name: str, args: argparse.Namespace) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the calls that a command makes, in their order. Raises UsageError."""
    if name == "pause":
        yield "/pause", {"paused": True, "reason": args.reason}
    elif name == "unpause":
        yield "/pause", {"paused": False}
        if args.accept_failures:
            yield "/max_failures", {"accept": True}
    elif name == "drain":
        yield "/drain", {}
    else:
        if args.work_timeout is None and args.max_failures is None:
            raise UsageError("give --work-timeout, --max-failures, or both")
        if args.work_timeout is not None:
            yield "/work_timeout", {"timeout": args.work_timeout}
        if args.max_failures is not None:
            yield "/max_failures", {"limit": args.max_failures}


class _Server:
    """The server of a run, and the admin token for it.

    Raises UsageError or StateError when there is none, or when the token is missing.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._url: str = args.address
        token_file: Path | None = args.admin_token_file
        state_dir = state_dir_of(args.address)
        wants_token = True
        if state_dir is not None:
            self._url, wants_token = _read_place(Path(args.address[1:]), state_dir)
        if token_file is not None or state_dir is None:
            self._token = token_given(token_file, _ADMIN_TOKEN_OPTION, ADMIN_TOKEN_VARIABLE)
            self._token_from = str(token_file or ADMIN_TOKEN_VARIABLE)
        else:
            beside = state_dir / ADMIN_TOKEN_FILE
            self._token = _token_beside(beside) if wants_token else None
            self._token_from = str(beside)
        self._client = WorkClient(
            args.address,
            token=self._token,
            fingerprint=args.server_fingerprint,
            timeout_s=_ANSWER_S,
        )

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def tell(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Make a call; return what was done. Raises DispatcherError, which says why it was not."""
        answer = self._client.order(path, body)
        if answer is None:
            nobody = f"no dispatcher server answers at {self._url}"
            raise DispatcherError(self._client.stranger or nobody)
        if answer.status in (401, 403):
            raise AccessDeniedError(self._refused())
        if answer.status in (404, 405):
            raise DispatcherError(
                f"{self._url} does not know POST {path}: it is older than this command, or no "
                "dispatcher server"
            )
        if answer.status == 400:
            raise UsageError(f"{self._url} refused it: {answer.message}")
        if answer.status != 200:
            raise DispatcherError(f"{self._url} answered {answer.status}: {answer.message}")
        if answer.state == "complete":
            raise StateError(answer.message)
        return answer

    def _refused(self) -> str:
        if self._token is None:
            return (
                f"{self._url} wants the admin token of its run: name the run as "
                f"@STATE/{SERVER_FILE}, or give the token with {_ADMIN_TOKEN_OPTION} or in "
                f"{ADMIN_TOKEN_VARIABLE}"
            )
        return (
            f"{self._url} does not take the token of {self._token_from} for its run's admin "
            f"token, which is in {ADMIN_TOKEN_FILE} in that run's state directory"
        )


def _read_place(path: Path, state_dir: Path) -> tuple[str, bool]:
    """Return the URL of the server that should be running, and whether it wants a token."""
    try:
        found = read_server_file(path)
    except FileNotFoundError as error:
        missing = path if path != state_dir else server_file_in(path)
        raise StateError(
            f"there is no {missing}: no server of this run was started, or the run's state "
            "directory is another one"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if found.state == "complete":
        raise StateError(f"the run in {state_dir} is complete, there is nobody to be told")
    if found.state != "running":
        raise _ended(state_dir, f"was {found.state}")
    _check_here(state_dir, found.url)
    return found.url, found.token is not None


def _check_here(state_dir: Path, url: str) -> None:
    """Refuse to tell what cannot be that server: its port may be a stranger's. Raises StateError.

    Over TLS a stranger would be told nothing; on loopback, which is mostly without, anybody of
    this machine may listen where the server does on another one, or did.
    """
    owner, me = read_owner(state_dir), Identity.of_this_process()
    if owner is None:
        return
    if me.knows_dead(owner.identity):
        raise _ended(state_dir, f"({owner.identity}) has ended")
    if _is_loopback(Address.parse(url).host) and owner.identity.host != me.host:
        raise StateError(
            f"the server of the run in {state_dir} is reached from its own machine alone, "
            f"{owner.identity.host}: say it there"
        )


def _ended(state_dir: Path, how: str) -> StateError:
    return StateError(
        f"the server of the run in {state_dir} {how}, so there is nobody to be told; `dispatcher "
        f"runs {shlex.quote(str(state_dir))}` says how to go on"
    )


def _token_beside(path: Path) -> str:
    try:
        return read_token_file(path)
    except FileNotFoundError as error:
        raise StateError(
            f"there is no admin token in {path}; give it with {_ADMIN_TOKEN_OPTION}, or start the "
            "server again, which makes a new one"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
