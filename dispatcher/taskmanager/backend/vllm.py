"""vLLM, launched on this node: start, wait until it serves, end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.gpus import check_gpus, engine_environment
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.launched import LaunchedBackend, LaunchOptions
from dispatcher.taskmanager.backend.ports import PortLease, lease_port
from dispatcher.taskmanager.backend.process import ServerProcess

_PORTS_TRIED = 3
_POLL_S = 0.5
_PROGRESS_S = 15.0
_CALL_TIMEOUT_S = 5.0
_NOISE = r'^nanobind: | - leaked | - \.\.\. skipped |"(GET|POST) \S+ HTTP/[\d.]+" 200|^\s*$'
"""What hides the reason of an end: what libraries say at exit, and calls that went well."""

_MODULE = "vllm.entrypoints.openai.api_server"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VLLMSettings:
    """What the engine is started with.

    `command` is the user's own way to start a server; `environment` is set for this engine alone,
    to show it its GPUs say.
    """

    model: str
    tensor_parallel: int = 1
    max_model_len: int | None = None
    chat_template: str | None = None
    enforce_eager: bool = False
    extra_args: Sequence[str] = ()
    command: Sequence[str] | None = None
    quiet: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class PortTakenError(BackendError):
    """Somebody else's program got the port before the engine did."""


class VLLMBackend(LaunchedBackend):
    """One vLLM server of this process's own, on a loopback port, behind its own API key."""

    def __init__(self, settings: VLLMSettings, options: LaunchOptions) -> None:
        check_gpus({**os.environ, **settings.environment}, settings.tensor_parallel)
        super().__init__(options)
        self._settings = settings
        self._as_module = False
        self._lease: PortLease | None = None

    async def launch(self) -> Endpoint:
        """Start the engine and return when it serves. Raises BackendError with its last words."""
        ports_tried = 1
        while True:
            try:
                return await self._launch_once()
            except PortTakenError:
                if ports_tried == _PORTS_TRIED:
                    raise
                ports_tried += 1
            except BackendError as error:
                if self._as_module or not is_nameless_distribution(self._settings, str(error)):
                    raise
                log.warning(
                    "`vllm serve` does not know its own distribution here; starting it as "
                    "`python -m %s` instead",
                    _MODULE,
                )
                self._as_module = True

    async def close(self) -> None:
        """End the engine with all its children, and give its port back."""
        await super().close()
        self._release_port()

    def _release_port(self) -> None:
        if self._lease is not None:
            self._lease.release()

    async def _launch_once(self) -> Endpoint:
        await self._end_process()
        self._release_port()
        self._lease = lease_port()
        settings, port, api_key = self._settings, self._lease.port, secrets.token_urlsafe(24)
        process = ServerProcess(
            "vLLM",
            launch_command(settings, port, as_module=self._as_module),
            self.options.log_dir / "vllm.log",
            launch_environment(settings, api_key, os.environ),
            noise=_NOISE,
        )
        await self.run_process(process)
        base_url = f"http://127.0.0.1:{port}/v1"
        try:
            served = await wait_until_serving(
                process, base_url, api_key, self.options.startup_timeout_s
            )
        except BackendError:
            if "address already in use" in process.last_lines().lower():
                raise PortTakenError(str(process.failure(f"found port {port} taken"))) from None
            raise
        # With --served-model-name among the user's options it goes by another name.
        name = settings.model if settings.model in served else next(iter(served), settings.model)
        return Endpoint(base_url, name, api_key, self.options.request_timeout_s)


# -------------------------------------------------------------------- how it is started


def launch_command(settings: VLLMSettings, port: int, *, as_module: bool = False) -> list[str]:
    """Return the command line that serves the model on a port of the loopback interface."""
    found = shutil.which("vllm")
    if settings.command:
        command = [*settings.command]
        # `vllm serve` takes the model as its argument, the older module form as an option.
        command += [settings.model] if command[-1] == "serve" else ["--model", settings.model]
    elif found is not None and not as_module:
        command = [found, "serve", settings.model]
    else:
        command = [_python_beside(found), "-m", _MODULE, "--model", settings.model]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if settings.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(settings.tensor_parallel)]
    if settings.max_model_len is not None:
        command += ["--max-model-len", str(settings.max_model_len)]
    if settings.chat_template is not None:
        command += ["--chat-template", settings.chat_template]
    if settings.enforce_eager:
        command += ["--enforce-eager"]
    return [*command, *settings.extra_args]


def launch_environment(
    settings: VLLMSettings, api_key: str, env: Mapping[str, str]
) -> dict[str, str]:
    """Return what is set for the engine beside this process's own environment `env`."""
    own = settings.environment
    added = {"VLLM_API_KEY": api_key, **own, **engine_environment({**env, **own})}
    # It would report home, from nodes that often cannot; a user who wants that sets them.
    added |= {name: "1" for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK") if name not in env}
    if settings.quiet:
        added["VLLM_LOGGING_LEVEL"] = "WARNING"
    return added


def is_nameless_distribution(settings: VLLMSettings, output: str) -> bool:
    """Say whether our `vllm serve` failed because its wheel is called otherwise than vllm."""
    return not settings.command and "No package metadata was found for vllm" in output


def _python_beside(script: str | None) -> str:
    """Return the Python of the environment that a command belongs to; else our own."""
    if script is not None:
        python = Path(script).resolve().with_name("python")
        if os.access(python, os.X_OK):
            return str(python)
    return sys.executable


# -------------------------------------------------------------------- until it serves


async def wait_until_serving(
    process: ServerProcess, base_url: str, api_key: str, timeout_s: float
) -> list[str]:
    """Return the names of the models it serves, once it does; tell now and then how far it is.

    Raises BackendError, with the last lines of its log, when it ends or takes too long.
    """
    began_at = time.monotonic()
    told_at = began_at
    async with aiohttp.ClientSession(trust_env=False) as session:
        while (now := time.monotonic()) < began_at + timeout_s:
            process.check_alive()
            served = await _models_of(session, base_url, api_key)
            if served is not None:
                await _check_ours(session, process, base_url)
                log.info("vLLM serves after %.0f s", now - began_at)
                return served
            if now >= told_at + _PROGRESS_S:
                told_at = now
                log.info("vLLM is starting (%.0f s): %s", now - began_at, stage_of(process.tail()))
            await asyncio.sleep(_POLL_S)
    raise process.failure(f"was not ready within {timeout_s:.0f} s (--startup-timeout)")


async def _models_of(
    session: aiohttp.ClientSession, base_url: str, api_key: str
) -> list[str] | None:
    """Return the models that the server shows to our key; None when it does not, or not yet."""
    status, body = await _get(session, f"{base_url}/models", api_key)
    if status != 200:
        return None
    try:
        return [str(model["id"]) for model in msgspec.json.decode(body)["data"]]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


async def _check_ours(
    session: aiohttp.ClientSession, process: ServerProcess, base_url: str
) -> None:
    """Make sure that the key is what let us in: another's server might take any."""
    status, _ = await _get(session, f"{base_url}/models", None)
    if status == 401:
        return
    process.check_alive()
    raise PortTakenError(
        f"the server at {base_url} answers without the API key that vLLM was given: it is another "
        "program's, or --vllm-command does not pass on the environment variable VLLM_API_KEY"
    )


async def _get(
    session: aiohttp.ClientSession, url: str, api_key: str | None
) -> tuple[int | None, bytes]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    try:
        async with session.get(url, headers=headers, timeout=timeout) as reply:
            return reply.status, await reply.read()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None, b""


_PREFIX = re.compile(r"^(\(\S+ pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR) \S+ \S+ \[\S+\]\s*)?")
_TELLING = re.compile(
    r"load|weight|shard|download|compil|captur|graph|profil|kv cache|warm|tokeniz|initiali[sz]|"
    r"start|engine",
    re.IGNORECASE,
)
_STAGE_CHARACTERS = 100


def stage_of(output: str) -> str:
    """Return what an engine that is starting does, in the words of the end of its log."""
    for line in reversed(re.split(r"[\r\n]+", output)):
        text = _PREFIX.sub("", line.strip()).strip()
        if _TELLING.search(text) and "Warning" not in text:
            return text[:_STAGE_CHARACTERS]
    return "no word from it yet"
