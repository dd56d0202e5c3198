#!/usr/bin/env bash
# Sets up .venv and answers examples/data/prompts.jsonl with a small real model on the CPU.
# Further arguments go to `dispatcher run`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
echo "Installing into .venv (the first time takes a minute or two) ..."
make_environment local
exec .venv/bin/dispatcher run \
    --task examples/chat_task.py:ChatTask \
    --input examples/data/prompts.jsonl \
    --output output.jsonl \
    --backend local \
    --task-arg temperature=0 "$@"
