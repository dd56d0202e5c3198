"""`dispatcher watch`: show how a run goes, from any machine that reaches its server."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from dispatcher.client import AsyncWorkClient
from dispatcher.config import Parser, add_server_address, number
from dispatcher.errors import DispatcherError, ExitCode
from dispatcher.progress import Display, make_display, model_lines
from dispatcher.run_facts import Rates, facts_of, facts_of_summary
from dispatcher.server_file import DRAINED, read_server_file, state_dir_of, token_given
from dispatcher.storage.files import Files
from dispatcher.storage.run_state import load_run_file

_STATUS_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 2.0
"""At most, as a server whose run is complete answers for 5 s more."""

_EXAMPLES = """\
examples:
  dispatcher watch @answers.jsonl.dispatch/server.json
  dispatcher watch http://127.0.0.1:8000 --every 10

exit codes: 0 the run is complete, or Ctrl-C, 1 error, 2 usage"""


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        prog="dispatcher watch",
        description="Show how a run goes until it is complete: on a terminal a live view, "
        "elsewhere a line a minute. It only looks; Ctrl-C ends the looking and not the run.",
        epilog=_EXAMPLES,
    )
    add_server_address(parser)
    parser.add_argument(
        "--every",
        type=number(float, 0.1, 3600),
        default=1.0,
        metavar="S",
        help="seconds between two views",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the server's token (default: the one in server.json, if that is named, "
        "else the variable DISPATCHER_TOKEN)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        args = build_parser().parse_args(argv)
        return uvloop.run(_watch(args))
    except DispatcherError as error:
        print(f"dispatcher watch: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.COMPLETE


async def _watch(args: argparse.Namespace) -> int:
    state_dir = state_dir_of(args.address)
    token = token_given(args.token_file) if _is_needed(args) else None
    client = AsyncWorkClient(
        args.address, token=token, fingerprint=args.server_fingerprint, timeout_s=_STATUS_TIMEOUT_S
    )
    display = make_display(sys.stdout)
    try:
        await Watch(client, display, args.address, state_dir, args.every).run()
    finally:
        display.close()
        await client.close()
    return ExitCode.COMPLETE


def _is_needed(args: argparse.Namespace) -> bool:
    return args.token_file is not None or not args.address.startswith("@")


class Watch:
    """Looks at a run until it is complete. `state_dir` is None where only its address is known."""

    def __init__(
        self,
        client: AsyncWorkClient,
        display: Display,
        address: str,
        state_dir: Path | None,
        every_s: float,
    ) -> None:
        self._client = client
        self._address = address
        self._display = display
        self._state_dir = state_dir
        self._every_s = every_s
        self._is_away = False

    async def run(self) -> None:
        """Look, and show what is due; again."""
        shown_at = float("-inf")
        while True:
            status = await self._client.status()
            if status.get("state") == "complete":
                return self._show_end(status)
            if not status and (summary := await asyncio.to_thread(self._summary)) is not None:
                return self._show_summary(summary)
            self._note_whether_away(status)
            now = time.monotonic()
            if status and now - shown_at >= self._every_s:
                shown_at = now
                self._display.show(status, now)
            await asyncio.sleep(min(self._every_s, _LOOK_EVERY_S))

    def _show_end(self, status: dict[str, Any]) -> None:
        facts = facts_of(status, Rates())
        self._display.show_facts(facts, status.get("models"))
        self._note_end(facts.done, facts.failed, facts.causes, status)

    def _show_summary(self, summary: dict[str, Any]) -> None:
        facts = facts_of_summary(summary)
        self._display.show_facts(facts)
        self._note_end(facts.done, facts.failed, facts.causes, summary)

    def _note_end(self, done: int, failed: int, causes: str, status: dict[str, Any]) -> None:
        self._display.note(f"the run is complete: {done} lines, {failed} with errors")
        if failed:
            self._display.note(f"errors: {causes}")
        for line in model_lines(status):
            self._display.note(line)

    def _note_whether_away(self, status: dict[str, Any]) -> None:
        if bool(status) != self._is_away:
            return
        self._is_away = not status
        self._display.note(self._why_away() if self._is_away else "the server answers again")

    def _why_away(self) -> str:
        if self._state_dir is not None:
            try:
                if read_server_file(self._state_dir).state in ("stopped", DRAINED):
                    return "the server was stopped; waiting for it to be started again"
            except (OSError, DispatcherError):
                pass
        return f"no server answers at {self._address}; waiting for one (Ctrl-C ends that)"

    def _summary(self) -> dict[str, Any] | None:
        """Return the summary in run.yaml once that says that the run is complete."""
        if self._state_dir is None:
            return None
        try:
            run_file = load_run_file(self._state_dir, Files()) or {}
        except DispatcherError:
            return None  # it may be about to be replaced
        return dict(run_file.get("summary", {})) if run_file.get("state") == "complete" else None
