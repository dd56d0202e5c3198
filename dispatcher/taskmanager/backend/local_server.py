"""`python -m dispatcher.taskmanager.backend.local_server`: llama.cpp's server around one model."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import urllib.error
import urllib.request
from typing import NoReturn

_POLL_S = 0.1
_PROBE_TIMEOUT_S = 60.0


def main() -> NoReturn:
    """Serve the model on a free port of the loopback interface until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="tokens of context a request")
    args = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.n_parallel = args.parallel
    params.n_ctx = args.context * args.parallel
    params.port = 0
    # Its counters show a long answer from a hang.
    params.endpoint_metrics = True
    # llama.cpp's threads wait for each other by spinning; one core less keeps that from eating
    # the time of whatever else runs here, which made a busy machine ten times slower.
    threads = max(1, (os.cpu_count() or 2) - 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    while not answers(server.listening_address):
        time.sleep(_POLL_S)
    # In one write, and on a line of its own: llama.cpp's threads log to the same file.
    os.write(1, f"\nlocal model ready at {server.listening_address}/v1\n".encode())
    # Until SIGTERM, which ends the process at once: llama.cpp's threads need no farewell.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        signal.pause()


def answers(address: str) -> bool:
    """Ask for one token: listening is not serving."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with without_proxy.open(request, timeout=_PROBE_TIMEOUT_S) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
