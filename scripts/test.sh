#!/usr/bin/env bash
# Sets up .venv and runs the linter, the type checker and the tests on two processes, fast ones
# first; last the fault tests, which print what they counted.
# Further arguments go to pytest and replace the three default runs.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment local,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ "$#" -gt 0 ]; then
    exec .venv/bin/pytest "$@"
fi
.venv/bin/pytest -q -n 2 --dist worksteal -m "not slow and not model and not vllm"
# By file, so that the engines of vLLM, which take all cores, start once and not side by side.
.venv/bin/pytest -q -n 2 --dist loadfile -m "(slow or model or vllm) and not fault"
.venv/bin/pytest -q -n 2 --dist worksteal -m "fault" -rP
