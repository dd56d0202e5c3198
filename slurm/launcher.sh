#!/usr/bin/env bash
# launcher.sh [--worker] COMMAND...: becomes COMMAND, in the environment that it needs. The one
# place for modules, container or virtual environment, caches and GPUs; all scripts go through it.
#
# Settings, from the environment:
#     MODULES            modules to load, separated by spaces
#     CONTAINER          image to run in, with Apptainer or Singularity (default: none)
#     CONTAINER_RUNTIME  apptainer or singularity (default: the one that is there)
#     CONTAINER_BINDS    further directories to show inside, separated by commas, as for --bind
#     CONTAINER_ARGS     further options of `apptainer exec`, separated by spaces
#     CONTAINER_GPU      --nv, --rocm or none (default: what this node has)
#     VENV               virtual environment (default: .venv beside slurm/, if it is there)
#     HF_HOME            model cache on a file system that all nodes see
#     HF_HUB_OFFLINE     1: ask no model hub (default: 1 when the model is here already)
#     GPUS_PER_TASK      with --worker: GPUs of this task; 0: leave them alone
#     CACHE_DIR          with --worker: this task's place for what model servers cache
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
devices=${DEVICES_DIR:-/dev}

fail() {
    printf 'launcher.sh: %s\n' "$*" >&2
    exit 2
}

load_modules() {
    [ -n "${MODULES:-}" ] || return 0
    local module init
    set +u # all of this reads variables that may not be there
    for init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh; do
        # shellcheck source=/dev/null
        type -t module >/dev/null || [ ! -r "$init" ] || source "$init"
    done
    type -t module >/dev/null || fail "MODULES=$MODULES, but there is no \`module\` command here"
    for module in $MODULES; do
        module load "$module" || fail "module load $module failed (MODULES)"
    done
    set -u
}

# -------------------------------------------------------------------- GPUs

# take_gpus COUNT: shows this task its own GPUs among those of the job on this node, by its number
# on the node. Where exactly COUNT are shown Slurm has done that already; where none are, the model
# server will say what it thinks of that.
take_gpus() {
    local count=$1 place=${SLURM_LOCALID:-0} name text first mine inside
    local names=() shown=()
    for name in ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES; do
        [ -z "${!name+set}" ] || names+=("$name")
    done
    if [ "${#names[@]}" -gt 0 ]; then
        text=${!names[0]}
        # What stands for "none".
        case $text in -1 | NoDevFiles) text='' ;; esac
        IFS=, read -r -a shown <<<"$text"
    else
        find_gpus
    fi
    if [ "${#shown[@]}" = 0 ] || [ "${#shown[@]}" = "$count" ]; then
        return 0
    fi
    first=$((place * count))
    if [ "${#shown[@]}" -lt $((first + count)) ]; then
        fail "task $((place + 1)) of this node needs the GPUs $((first + 1)) to" \
            "$((first + count)), but the job has ${#shown[@]} here (${names[0]}); ask for more" \
            "GPUs a node, start fewer tasks on it, or lower GPUS_PER_TASK"
    fi
    mine=$(IFS=, && echo "${shown[*]:first:count}")
    inside=$(seq -s, 0 $((count - 1)))
    for name in "${names[@]}"; do
        # What is inside of ROCR_VISIBLE_DEVICES is counted from 0 again.
        if [ "${names[0]}" = ROCR_VISIBLE_DEVICES ] && [ "$name" != "${names[0]}" ]; then
            export "$name=$inside"
        else
            export "$name=$mine"
        fi
    done
}

# find_gpus: sets `names` and `shown` from the devices of this node; leaves them empty without any.
find_gpus() {
    local found=()
    mapfile -t found < <(compgen -G "$devices/nvidia[0-9]*")
    names=(CUDA_VISIBLE_DEVICES)
    if [ "${#found[@]}" = 0 ] && [ -e "$devices/kfd" ]; then
        mapfile -t found < <(compgen -G "$devices/dri/renderD*")
        names=(HIP_VISIBLE_DEVICES)
    fi
    if [ "${#found[@]}" -gt 0 ]; then
        mapfile -t shown < <(seq 0 $((${#found[@]} - 1)))
    fi
}

# -------------------------------------------------------------------- caches

# go_offline: a model that is here is not asked for at the hub, where many workers that start at
# once run into limits and time-outs.
go_offline() {
    local cached=${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}/models--${MODEL//\//--}
    if [ -z "${HF_HUB_OFFLINE:-}" ] && { [ -d "$MODEL" ] || [ -d "$cached/snapshots" ]; }; then
        export HF_HUB_OFFLINE=1
    fi
}

keep_caches_here() {
    export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$CACHE_DIR/vllm}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$CACHE_DIR/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$CACHE_DIR/inductor}
}

# -------------------------------------------------------------------- container or environment

# container_prefix: sets `prefix` to what runs a command inside of CONTAINER.
container_prefix() {
    local runtime=${CONTAINER_RUNTIME:-} gpu=${CONTAINER_GPU:-} place words=()
    local input=${INPUT:-.}
    if [ -z "$runtime" ]; then
        runtime=$(command -v apptainer || command -v singularity) ||
            fail "CONTAINER=$CONTAINER, but neither apptainer nor singularity is on PATH; name" \
                "their module in MODULES"
    fi
    prefix=("$runtime" exec)
    if [ -z "$gpu" ]; then
        if compgen -G "$devices/nvidia[0-9]*" >/dev/null; then gpu=--nv; fi
        if [ -e "$devices/kfd" ]; then gpu=--rocm; fi
    fi
    case $gpu in --nv | --rocm) prefix+=("$gpu") ;; esac
    for place in "$project" "$PWD" "$(dirname "${input#hf:}")" "$(dirname "${OUTPUT:-.}")" \
        "$(dirname "${STATE:-.}")" "${MODEL:-}" "${HF_HOME:-}" "${CACHE_DIR:-}"; do
        [ ! -d "$place" ] || prefix+=(--bind "$(cd "$place" && pwd)")
    done
    [ -z "${CONTAINER_BINDS:-}" ] || prefix+=(--bind "$CONTAINER_BINDS")
    read -r -a words <<<"${CONTAINER_ARGS:-}"
    prefix+=(--pwd "$PWD" "${words[@]}" "$CONTAINER")
}

is_worker=''
if [ "${1:-}" = --worker ]; then
    is_worker=1
    shift
fi
[ "$#" -gt 0 ] || fail "usage: launcher.sh [--worker] COMMAND..."

load_modules
if [ -n "$is_worker" ]; then
    [ "${GPUS_PER_TASK:-0}" = 0 ] || take_gpus "$GPUS_PER_TASK"
    [ -z "${CACHE_DIR:-}" ] || keep_caches_here
    [ -z "${MODEL:-}" ] || go_offline
fi
export PYTHONUNBUFFERED=1
# The scripts' own Dispatcher, also where none is installed: an image needs its dependencies only.
[ ! -d "$project/dispatcher" ] || export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}

prefix=()
if [ -n "${CONTAINER:-}" ]; then
    container_prefix
elif [ -n "${VENV:-}" ]; then
    [ -x "$VENV/bin/python3" ] || fail "VENV=$VENV is no virtual environment on this node"
    export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
elif [ -x "$project/.venv/bin/python3" ]; then
    export VIRTUAL_ENV=$project/.venv PATH=$project/.venv/bin:$PATH
fi
# No shell stays behind: a signal reaches the command itself. Apptainer and Singularity pass it on
# to what runs inside when they have no terminal.
exec "${prefix[@]}" "$@"
