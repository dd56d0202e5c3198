"""`dispatcher-server`: serve one run until its output is complete."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop
from aiohttp import web

from dispatcher.config import Parser, RunSettings, add_run_limits, number, parse, run_settings_of
from dispatcher.errors import DispatcherError, ExitCode, UsageError
from dispatcher.server.app import make_app
from dispatcher.service import DispatchService
from dispatcher.storage.files import Files

LINGER_S = 5.0
LINGER_FOR_WORKERS_S = 15.0
DRAIN_S = 20.0
SERVER_FILE = "server.json"


class ServerFile(msgspec.Struct):
    """`<state>/server.json`: where the run is served, for the commands beside it."""

    url: str
    run: str
    epoch: int
    pid: int
    state: str


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        prog="dispatcher-server",
        description="Hand out the lines of a file to task managers, take their results and "
        "write them in input order. Start it again with the same arguments to go on.",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--infile", type=Path, required=True, help="input, one item a line")
    files.add_argument("--outfile", type=Path, required=True, help="output, one result a line")
    files.add_argument(
        "--state", type=Path, metavar="DIR", help="state directory (default: OUTFILE.dispatch)"
    )
    files.add_argument(
        "--checkpoint", type=Path, dest="state", metavar="PATH", help="older name of --state"
    )
    files.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    wire = parser.add_argument_group("network")
    wire.add_argument("--host", default="127.0.0.1", help="address to listen on")
    wire.add_argument(
        "--port", type=number(int, 0, 65535), default=8000, help="port to listen on; 0: any"
    )
    wire.add_argument(
        "--retry",
        type=number(float, 0),
        default=300.0,
        metavar="S",
        help="seconds after which a client that got nothing should ask again",
    )
    wire.add_argument(
        "--no-auth",
        action="store_true",
        help="accept every client (all clients are accepted at present)",
    )
    add_run_limits(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # Open items and leases are many small objects without cycles: looking for cycles among them
    # after every few hundred costs a tenth of the server's time.
    gc.set_threshold(50_000, 20, 50)
    try:
        args = parse(build_parser(), argv)
        settings = run_settings_of(args, args.infile, args.outfile)
        with _listen(args.host, args.port) as listener:
            return uvloop.run(serve(settings, args.host, listener))
    except DispatcherError as error:
        print(f"dispatcher-server: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the signal was taken over: nothing was begun
        return ExitCode.STOPPED


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


async def serve(settings: RunSettings, host: str, listener: socket.socket) -> int:
    """Serve the run: take up what is on disk, answer until it ends, leave cleanly."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    service = DispatchService(settings)
    try:
        await service.start()
        runner = web.AppRunner(
            make_app(service),
            access_log=None,
            shutdown_timeout=1.0,
            # A call that waits for work must end with its client, or it would take items for
            # nobody. What a cancelled call had decided is written all the same.
            handler_cancellation=True,
        )
        await runner.setup()
        await web.SockSite(runner, listener, backlog=4096).start()
        try:
            return await _serve_until_end(service, host, listener, stop)
        finally:
            await service.drain()
            await runner.cleanup()
    finally:
        await service.close()


async def _serve_until_end(
    service: DispatchService, host: str, listener: socket.socket, stop: asyncio.Event
) -> int:
    settings = service.settings
    url = f"http://{_reachable(host)}:{listener.getsockname()[1]}"
    where = ServerFile(url, service.run_id, service.epoch, os.getpid(), "running")
    if service.finished.is_set():
        print(f"dispatcher-server: the run is complete, {settings.outfile} is whole", flush=True)
    else:
        print(f"dispatcher-server: run {service.run_id} at {url}", flush=True)
        print(f"  {settings.infile} -> {settings.outfile}", flush=True)
    _write_server_file(settings, where)
    await _first_of(stop.wait(), service.finished.wait(), service.stopped.wait())
    if service.failure is not None:
        raise service.failure
    if service.finished.is_set():
        _write_server_file(settings, msgspec.structs.replace(where, state="complete"))
        await _linger(service, stop)
        counters = service.queue.counters
        print(f"dispatcher-server: complete, {counters.done} lines, {counters.failed} with errors")
        return ExitCode.COMPLETE
    await _drain(service)
    if service.finished.is_set():
        _write_server_file(settings, msgspec.structs.replace(where, state="complete"))
        return ExitCode.COMPLETE
    _write_server_file(settings, msgspec.structs.replace(where, state="stopped"))
    print("dispatcher-server: stopped; start it again with the same arguments to go on")
    return ExitCode.STOPPED


async def _linger(service: DispatchService, stop: asyncio.Event) -> None:
    """Stay a while, so that workers hear that there is nothing more to do."""

    async def everybody_told() -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while loop.time() - start < LINGER_FOR_WORKERS_S:
            alive = {w.name for w in service.queue.workers.values() if w.vanished_at is None}
            if loop.time() - start >= LINGER_S and alive <= service.workers_told:
                return
            await asyncio.sleep(0.1)

    await _first_of(everybody_told(), stop.wait())


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


def _write_server_file(settings: RunSettings, content: ServerFile) -> None:
    path = settings.state_dir / SERVER_FILE
    # Only a pointer for people and commands; a full disk must not end a run over it.
    with contextlib.suppress(OSError):
        Files().write_whole(path, msgspec.json.encode(content) + b"\n", mode=0o600)
