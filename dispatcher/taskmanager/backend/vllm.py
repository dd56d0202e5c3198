"""vLLM, launched on this node: start, wait until it serves, end."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.launched import LaunchedBackend
from dispatcher.taskmanager.backend.openai_compatible import Endpoint
from dispatcher.taskmanager.backend.process import ServerProcess

_LAUNCHES = 3
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class VLLMSettings:
    """What the engine is started with. `command` is the user's own way to start a server."""

    model: str
    tensor_parallel: int = 1
    max_model_len: int | None = None
    chat_template: str | None = None
    enforce_eager: bool = False
    extra_args: Sequence[str] = ()
    command: Sequence[str] | None = None
    quiet: bool = False


class VLLMBackend(LaunchedBackend):
    """One vLLM server of this process's own, on a loopback port, behind its own API key."""

    def __init__(
        self,
        settings: VLLMSettings,
        *,
        startup_timeout_s: float,
        request_timeout_s: float,
        log_dir: Path,
    ) -> None:
        super().__init__()
        self._settings = settings
        self._startup_timeout_s = startup_timeout_s
        self._request_timeout_s = request_timeout_s
        self._log_dir = log_dir

    async def launch(self) -> Endpoint:
        """Start the engine and return when it serves. Raises BackendError with its last words."""
        for last_try in (*[False] * (_LAUNCHES - 1), True):
            port, api_key = _free_port(), secrets.token_urlsafe(24)
            env = {"VLLM_API_KEY": api_key}
            if self._settings.quiet:
                env["VLLM_LOGGING_LEVEL"] = "WARNING"
            process = ServerProcess(
                "vLLM", launch_command(self._settings, port), self._log_dir / "vllm.log", env
            )
            await self.run_process(process)
            try:
                await self._wait_until_serving(process, port, api_key)
            except BackendError:
                # Between choosing the port and listening on it another program can take it.
                if last_try or "address already in use" not in process.last_lines().lower():
                    raise
                continue
            return Endpoint(
                f"http://127.0.0.1:{port}/v1",
                self._settings.model,
                api_key,
                self._request_timeout_s,
            )
        raise AssertionError("unreachable")

    async def _wait_until_serving(self, process: ServerProcess, port: int, api_key: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._startup_timeout_s
        async with aiohttp.ClientSession(trust_env=False) as session:
            while loop.time() < deadline:
                process.check_alive()
                if await _is_serving(session, port, api_key):
                    return
                await asyncio.sleep(_POLL_S)
        raise BackendError(
            f"vLLM was not ready within {self._startup_timeout_s:.0f} s (--startup-timeout); its "
            f"log {process.log_path} ends with:\n{process.last_lines()}"
        )


async def _is_serving(session: aiohttp.ClientSession, port: int, api_key: str) -> bool:
    """Ask for what only our server gives with this key: /health would answer for any other."""
    try:
        async with session.get(
            f"http://127.0.0.1:{port}/v1/models",
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=aiohttp.ClientTimeout(total=5),
        ) as reply:
            return reply.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def launch_command(settings: VLLMSettings, port: int) -> list[str]:
    """Return the command line that serves the model on a port of the loopback interface."""
    if settings.command:
        command = [*settings.command]
        # `vllm serve` takes the model as its argument, the older module form as an option.
        command += [settings.model] if command[-1] == "serve" else ["--model", settings.model]
    elif (found := shutil.which("vllm")) is not None:
        command = [found, "serve", settings.model]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", settings.model]
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
