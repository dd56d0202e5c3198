"""`python -m dispatcher.taskmanager.backend.local_server`: llama.cpp's server around one model."""

from __future__ import annotations

import argparse
import os
import signal
from typing import NoReturn


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
    # llama.cpp's threads wait for each other by spinning; one core less keeps that from eating
    # the time of whatever else runs here, which made a busy machine ten times slower.
    threads = max(1, (os.cpu_count() or 2) - 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(f"local model ready at {server.listening_address}/v1", flush=True)
    # Until SIGTERM, which ends the process at once: llama.cpp's threads need no farewell.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
