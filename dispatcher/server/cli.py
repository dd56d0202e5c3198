"""`dispatcher-server`: serve one run until its output is complete."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from dispatcher import logs
from dispatcher.config import (
    Parser,
    RunSettings,
    add_input_options,
    add_run_limits,
    number,
    run_settings_of,
    seconds,
)
from dispatcher.errors import (
    DispatcherError,
    ExitCode,
    StartStoppedError,
    StorageError,
    UsageError,
)
from dispatcher.input_options import INPUT_HELP
from dispatcher.progress import LogDisplay
from dispatcher.remedies import options_that_go_on
from dispatcher.run_command import (
    SERVER,
    add_resume_options,
    check_copied,
    note_start,
    read_start,
    resume_hint,
    take_handed_over,
    what_next,
)
from dispatcher.run_paths import input_option, output_option, state_option
from dispatcher.server import tls
from dispatcher.server.access import Gate
from dispatcher.server.app import OVERVIEW, listen, make_app, stop_listening
from dispatcher.server.connections import ConnectionLimits, raise_file_limit
from dispatcher.server.overview import PAGE_LOOKS_EVERY_S, Overview, full_status
from dispatcher.server.tls import Tls
from dispatcher.server_file import (
    ADMIN_TOKEN_FILE,
    DRAINED,
    ServerFile,
    new_token,
    page_hint,
    read_server_file,
    read_token_file,
    remove_partial_files,
    server_file_in,
    token_given,
    write_private,
    write_server_file,
)
from dispatcher.service import DispatchService
from dispatcher.storage.files import Files
from dispatcher.storage.ownership import Ownership

LINGER_S = 5.0
LINGER_FOR_WORKERS_S = 15.0
DRAIN_S = 20.0
_LOOK_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Network:
    """How the run is served. `token` is the one that the user gave, if any.

    With `speaks_tls` it is with the certificate that the user gave, else with the run's own.
    """

    host: str
    listener: socket.socket
    needs_token: bool
    token: str | None
    limits: ConnectionLimits
    speaks_tls: bool = False
    given_tls: Tls | None = None
    is_quiet: bool = False

    @property
    def url(self) -> str:
        """Where clients reach it."""
        scheme = "https" if self.speaks_tls else "http"
        return f"{scheme}://{_reachable(self.host)}:{self.listener.getsockname()[1]}"


@dataclass(slots=True)
class Announcement:
    """The run's server.json: tells the commands beside it where it is served."""

    path: Path
    content: ServerFile

    def write(self, state: str) -> None:
        """Write it anew. Raises OSError, and UsageError when it would go through a link."""
        self.content.state = state
        write_server_file(self.path, self.content)

    def write_if_possible(self, state: str) -> None:
        """Write it anew; the run goes on when that fails: results are worth more than this."""
        try:
            self.write(state)
        except (OSError, UsageError) as error:
            self.complain(error)

    def complain(self, error: Exception) -> None:
        """Say why it was not written."""
        print(f"dispatcher-server: cannot write {self.path}: {error}", file=sys.stderr)


_EXAMPLES = """\
examples:
  dispatcher-server --infile prompts.jsonl --outfile answers.jsonl
  dispatcher-server --infile prompts.jsonl --outfile answers.jsonl --host 0.0.0.0 --port 8000 \\
      --max-retries 5 --work-timeout 600
  dispatcher-server --resume answers.jsonl.dispatch    # go on, from any directory

exit codes: 0 complete, 1 error, 2 usage, 3 stopped and resumable"""


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        prog="dispatcher-server",
        description="Hand out the lines of a file to task managers, take their results and "
        "write them in input order. The same command, or --resume, goes on where it was stopped.",
        epilog=_EXAMPLES,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--infile", type=input_option, required=True, metavar="INPUT", help=INPUT_HELP
    )
    add_input_options(files)
    files.add_argument(
        "--outfile", type=output_option, required=True, help="output, one result a line"
    )
    files.add_argument(
        "--state",
        type=state_option,
        metavar="DIR",
        help="state directory (default: OUTFILE.dispatch)",
    )
    files.add_argument(
        "--checkpoint",
        type=state_option,
        dest="state",
        metavar="PATH",
        help="older name of --state",
    )
    files.add_argument(
        "--takeover",
        action="store_true",
        help="take the run from another server that may still live, after 11 s in which it can "
        "notice (otherwise a start waits up to 30 s for a sign of life, and gives up at one)",
    )
    files.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    wire = parser.add_argument_group("network")
    wire.add_argument("--host", default="127.0.0.1", help="address to listen on")
    wire.add_argument(
        "--port", type=number(int, 0, 65535), default=8000, help="port to listen on; 0: any"
    )
    wire.add_argument(
        "--retry",
        type=seconds(0),
        default=300.0,
        metavar="S",
        help="seconds after which a client that got nothing should ask again",
    )
    wire.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the token that clients must show (default: the variable "
        "DISPATCHER_TOKEN, else the one in STATE/server.json, else a new one)",
    )
    wire.add_argument(
        "--no-auth",
        action="store_true",
        help="ask for no token: everybody who reaches the port may take work and hand in results",
    )
    wire.add_argument(
        "--tls",
        type=tls.option,
        default=tls.AUTO,
        metavar=tls.OPTION_FORMS,
        help="encrypt: auto does where --host is not loopback, with --no-auth too; on and auto "
        "use a certificate that the server makes for the run, whose fingerprint clients find in "
        "STATE/server.json; CERT,KEY are PEM files of another one. Older clients, which speak "
        "plain HTTP, need off",
    )
    wire.add_argument(
        "--max-connections",
        type=number(int, 1, 1 << 20),
        default=ConnectionLimits().max_connections,
        metavar="N",
        help="connections open at once; further ones are closed",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="say nothing of how the run goes (otherwise a line a minute on standard error)",
    )
    logs.add_log_options(parser)
    add_resume_options(parser, has_task=False)
    add_run_limits(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # Open items and leases are many small objects without cycles: looking for cycles among them
    # after every few hundred costs a tenth of the server's time.
    gc.set_threshold(50_000, 20, 50)
    try:
        settings, args = _read(argv)
        logs.start_logging(args.log_format, with_content=args.log_content)
        token = None if args.no_auth else token_given(args.token_file)
        given = tls.given_tls(args.tls)
        limits = _limits(args.max_connections)
        with _listen(args.host, args.port) as listener:
            speaks_tls = tls.is_wanted(args.tls, listener.getsockname()[0])
            network = Network(
                args.host, listener, not args.no_auth, token, limits, speaks_tls, given, args.quiet
            )
            note_start(settings)
            ownership = Ownership(settings.state_dir, Files(), takeover=args.takeover)
            return uvloop.run(serve(settings, network, ownership))
    except DispatcherError as error:
        print(f"dispatcher-server: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the signal was taken over: nothing was begun
        return ExitCode.STOPPED


def _read(argv: Sequence[str] | None) -> tuple[RunSettings, argparse.Namespace]:
    """Return the run's settings and the other options; who started it says what it is part of."""
    handed_over = take_handed_over()
    start = read_start(SERVER, build_parser(), argv, output="outfile")
    args = start.args
    check_copied(start, args.infile)
    command, args.accept_changes = handed_over or (start.describe(), False)
    return run_settings_of(args, args.infile, args.outfile, command), args


def _limits(max_connections: int) -> ConnectionLimits:
    possible = raise_file_limit(max_connections)
    if possible < max_connections:
        print(
            f"dispatcher-server: at most {possible} connections at once, as this process may not "
            "open more files (ulimit -n)",
            file=sys.stderr,
        )
    return ConnectionLimits(max_connections=possible)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=4096)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DispatcherError(
                f"port {port} of {host} is in use by another program; choose another --port, or "
                "--port 0 for any that is free"
            ) from error
        raise DispatcherError(f"cannot listen on {host} port {port}: {error.strerror}") from error


async def serve(settings: RunSettings, network: Network, ownership: Ownership) -> int:
    """Serve the run: take up what is on disk, answer until it ends, leave cleanly."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    token = _token(settings, network)
    service = DispatchService(settings, ownership=ownership)
    try:
        await _start(service, stop)
        admin_token = _admin_token(settings) if token is not None else None
        encryption = network.given_tls
        if network.speaks_tls and encryption is None:
            encryption = await asyncio.to_thread(tls.own_tls, settings.state_dir)
        # Before the first call is answered: a worker that finds its token refused looks here.
        fingerprint = encryption.fingerprint if encryption is not None else None
        announcement = _announce(service, network, token, fingerprint)
        app = make_app(service, network.limits)
        context = encryption.context if encryption is not None else None
        telling: asyncio.Task[None] | None = None
        runner = await listen(app, Gate(token, admin_token), network.listener, context)
        try:
            _print_start(service, announcement)
            logs.know(run=service.run_id)
            if not network.is_quiet:
                telling = asyncio.create_task(_tell_progress(service))
            return await _serve_until_end(service, announcement, stop, app[OVERVIEW])
        finally:
            if telling is not None:
                telling.cancel()
            await service.drain()
            await stop_listening(runner)
    finally:
        await service.close()


async def _start(service: DispatchService, stop: asyncio.Event) -> None:
    """Start the service, unless a signal comes first: copying a pipe may take hours.

    Raises what DispatchService.start does, and StartStoppedError.
    """
    starting = asyncio.ensure_future(service.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        program = (service.settings.command or {}).get("program", SERVER)
        settings = service.settings
        raise StartStoppedError(
            "stopped before anything was handed out; "
            f"{what_next(program, settings.state_dir, settings.infile)}"
        )
    await starting


def _token(settings: RunSettings, network: Network) -> str | None:
    """Return the token that clients must show: kept across restarts, as workers know it."""
    if not network.needs_token:
        return None
    path = server_file_in(settings.state_dir)
    try:
        before = read_server_file(path).token
    except (FileNotFoundError, NotADirectoryError):
        before = None  # a new run, or one that the start refuses
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return network.token or before or new_token()


def _admin_token(settings: RunSettings) -> str:
    """Return the token for what changes settings, from its file, which is made if need be."""
    path = settings.state_dir / ADMIN_TOKEN_FILE
    try:
        return read_token_file(path)
    except FileNotFoundError:
        token = new_token()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    try:
        write_private(path, token.encode() + b"\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return token


def _announce(
    service: DispatchService, network: Network, token: str | None, fingerprint: str | None
) -> Announcement:
    """Write server.json; without it, nobody could know a token that nobody gave.

    Raises StorageError, and UsageError when something else stands in its place.
    """
    state_dir = service.settings.state_dir
    remove_partial_files(state_dir)
    state = "complete" if service.finished.is_set() else "running"
    content = ServerFile(
        network.url, token, service.run_id, service.epoch, os.getpid(), state, fingerprint
    )
    announcement = Announcement(server_file_in(state_dir), content)
    try:
        announcement.write(state)
    except OSError as error:
        if token is not None and token != network.token:
            raise StorageError(
                f"cannot write {announcement.path}: {error.strerror}; workers would not learn the "
                "token: make room, or give one with --token-file"
            ) from error
        announcement.complain(error)
    return announcement


def _print_start(service: DispatchService, announcement: Announcement) -> None:
    settings, content = service.settings, announcement.content
    if service.finished.is_set():
        print(f"dispatcher-server: the run is complete, {settings.outfile} is whole", flush=True)
        return
    print(f"dispatcher-server: run {content.run} at {content.url}", flush=True)
    if content.token is not None:
        print(
            f"  workers connect with --dispatcher @{announcement.path}; older clients, which send "
            "no token, need a server with --no-auth",
            flush=True,
        )
    else:
        print(
            "  --no-auth: everybody who reaches this port may take work and hand in results; "
            f"workers connect with --dispatcher @{announcement.path}",
            flush=True,
        )
    if content.fingerprint is not None:
        wanted = " and the token" if content.token is not None else ""
        print(
            f"  TLS: without that file, workers need --dispatcher {content.url} "
            f"--server-fingerprint {content.fingerprint}{wanted}; older clients, which speak "
            "plain HTTP, need a server with --tls off",
            flush=True,
        )
    print(f"  {settings.infile} -> {settings.outfile}", flush=True)
    hint = page_hint(content.url, announcement.path, wants_token=content.token is not None)
    print(f"  {hint}", flush=True)


async def _serve_until_end(
    service: DispatchService, announcement: Announcement, stop: asyncio.Event, overview: Overview
) -> int:
    waits = (stop, service.drain_asked, service.finished, service.stopped)
    await _first_of(*(event.wait() for event in waits))
    if service.failure is not None:
        raise service.failure
    if service.finished.is_set():
        announcement.write_if_possible("complete")
        await _linger(service, stop, overview)
        counters = service.queue.counters
        print(f"dispatcher-server: complete, {counters.done} lines, {counters.failed} with errors")
        return ExitCode.COMPLETE
    await _drain(service)
    if service.failure is not None:  # perhaps another server has the run, and server.json, now
        raise service.failure
    if service.finished.is_set():
        announcement.write_if_possible("complete")
        return ExitCode.COMPLETE
    # Who starts servers by itself, as the scripts of slurm/ do, leaves a drained one alone.
    ended = DRAINED if service.drain_asked.is_set() else "stopped"
    announcement.write_if_possible(ended)
    settings = service.settings
    program = (settings.command or {}).get("program", SERVER)
    pause = service.queue.pause
    unpause = f" {options_that_go_on(pause.by)}" if pause is not None else ""
    hint = resume_hint(program, settings.state_dir)
    print(f"dispatcher-server: {ended}; go on with: {hint}{unpause}")
    return ExitCode.STOPPED


async def _tell_progress(service: DispatchService) -> None:
    """Say once a minute how the run goes."""
    display = LogDisplay()
    while not service.finished.is_set() and service.failure is None:
        display.show(full_status(service), time.monotonic())
        await asyncio.sleep(_LOOK_EVERY_S)


async def _linger(service: DispatchService, stop: asyncio.Event, overview: Overview) -> None:
    """Stay a while, so that workers hear that there is nothing more to do, and an open page."""
    complete_at = time.monotonic()

    async def everybody_told() -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while loop.time() - start < LINGER_FOR_WORKERS_S:
            alive = {w.name for w in service.queue.workers.values() if w.vanished_at is None}
            if loop.time() - start >= LINGER_S and alive <= service.workers_told:
                return
            await asyncio.sleep(0.1)

    await _first_of(everybody_told(), stop.wait())
    # Told to end, as `dispatcher run` does at once: a page would say for ever that nobody answers.
    while overview.asked_at < complete_at <= overview.asked_at + 2 * PAGE_LOOKS_EVERY_S:
        if time.monotonic() > complete_at + 2 * PAGE_LOOKS_EVERY_S:
            break
        await asyncio.sleep(0.05)


async def _drain(service: DispatchService) -> None:
    """Hand out nothing more, but take what workers finish or give back in the next seconds."""
    await service.drain()

    async def nothing_held() -> None:
        while service.queue.leases:  # noqa: ASYNC110 (the pure queue has no event to wait for)
            await asyncio.sleep(0.05)

    await _first_of(
        nothing_held(), service.finished.wait(), service.stopped.wait(), timeout_s=DRAIN_S
    )


async def _first_of(*waits: object, timeout_s: float | None = None) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
