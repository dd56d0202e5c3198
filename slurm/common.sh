# Sourced by the batch scripts: starts a server and task managers inside a Slurm job, watches them,
# ends them in the right order, and has the job requeued when its run is not complete.
#
# A batch script sets what its settings say, calls `start_server` and `await_server`, or
# `start_workers`, or all three, and then `run_job`, which exits with
#     0 complete   1 error   2 usage   3 stopped, to be gone on with   5 server lost
# SIGTERM to the script (Slurm's warning before the time limit: --signal=B:TERM@120) stops the work
# and requeues the job; SIGINT (scancel --batch --signal=INT JOB), or a server that somebody has
# drained (POST /drain), stops it for good.
# shellcheck shell=bash

# No -e: how each part ended is looked at.
set -uo pipefail
# Each part has its own process group, so that a signal reaches it and what it started.
set -m
# Slurm's own errors (a step that cannot be launched) are not taken for those of a task.
export SLURM_EXIT_ERROR=200

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$scripts")
# Of an array, the number alone may mean all of it.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# A requeued job repeats its command; what that says for one start, --accept-failures say, holds once.
export DISPATCHER_START="Slurm job $job${SLURM_CLUSTER_NAME:+ of $SLURM_CLUSTER_NAME}"

server='' workers='' server_was_up='' asked='' code=''
server_starts=0 workers_starts=0 workers_began_at=0
announced_before=''

STOPPED=3
ASKED_TO_END=143 # what worker.sh ends with then
POLL_S=1
LONG_ENOUGH_S=600 # what ran so long before it died gets all its restarts again

trap 'asked=TERM' TERM
trap 'asked=INT' INT

say() {
    printf '%s %s: %s\n' "$(date +%H:%M:%S)" "${SLURM_JOB_NAME:-dispatcher}" "$*" >&2
}

# -------------------------------------------------------------------- settings

# fill_in: gives the settings that are empty their defaults.
fill_in() {
    INPUT=${INPUT:-$project/examples/data/prompts.jsonl}
    OUTPUT=${OUTPUT:-output-slurm.jsonl}
    STATE=${STATE:-$OUTPUT.dispatch}
    if [ -z "${CONFIG:-}" ]; then # else it may say these
        TASK=${TASK:-$project/examples/chat_task.py:ChatTask}
        # Without a model: the small one of the quick start, on the CPU.
        BACKEND=${BACKEND:-$([ -n "${MODEL:-}" ] && echo vllm || echo local)}
    fi
    case ${BACKEND:-} in
    fake | local | openai | cerebras) GPUS_PER_TASK=${GPUS_PER_TASK:-0} ;;
    *) GPUS_PER_TASK=${GPUS_PER_TASK:-${TENSOR_PARALLEL:-1}} ;;
    esac
    TASKS_PER_NODE=${TASKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
    # launcher.sh and worker.sh go by these.
    export INPUT OUTPUT STATE MODEL=${MODEL:-} GPUS_PER_TASK
}

# words_of NAME: splits the setting as a shell would, quotes and all, into the array `words`.
words_of() {
    local text=${!1:-}
    words=()
    [ -n "${text//[[:space:]]/}" ] || return 0
    if ! printf '%s\n' "$text" | xargs printf '%s\n' >/dev/null 2>&1; then
        say "$1 has a quote that is not closed: $text"
        exit 2
    fi
    mapfile -d '' -t words < <(printf '%s\n' "$text" | xargs printf '%s\0')
}

# add_option NAME OPTION: appends the option to the array `command` if the setting has a value.
add_option() {
    [ -z "${!1:-}" ] || command+=("$2" "${!1}")
}

# -------------------------------------------------------------------- the parts

# start_server: starts the run's server beside this script, on the job's first node.
start_server() {
    if [ "$INPUT" = - ]; then
        say "INPUT=-: a job has no standard input; write the lines to a file"
        exit 2
    fi
    announced_before=$(cat "$STATE/server.json" 2>/dev/null)
    command=(python3 -m dispatcher.server --infile "$INPUT" --outfile "$OUTPUT" --state "$STATE")
    command+=(--host 0.0.0.0 --port 0)
    add_option INPUT_SUBSET --input-subset
    add_option INPUT_SPLIT --input-split
    add_option WORK_TIMEOUT --work-timeout
    add_option MAX_RETRIES --max-retries
    add_option SERVER_CONFIG --config
    words_of SERVER_ARGS
    server_starts=$((server_starts + 1))
    "$scripts/launcher.sh" "${command[@]}" "${words[@]}" </dev/null &
    server=$!
}

# await_server: returns 0 once the server has written where it is, 1 when it ended before or this
# script is asked to end.
await_server() {
    while [ -z "$asked" ] && is_running "$server"; do
        if has_announced; then
            server_was_up=1
            return 0
        fi
        pause 0.5
    done
    return 1
}

# has_announced: returns 0 once the server that was started last has written where it is.
has_announced() {
    [ "$(cat "$STATE/server.json" 2>/dev/null)" != "$announced_before" ]
}

# task_manager: sets `command` to a task manager of the run.
task_manager() {
    command=(python3 -m dispatcher.taskmanager.cli --dispatcher "@$STATE/server.json")
    add_option TASK --task
    add_option BACKEND --backend
    add_option MODEL --model
    add_option TENSOR_PARALLEL --tensor-parallel
    add_option MAX_MODEL_LEN --max-model-len
    add_option WORKERS --workers
    add_option BATCH_SIZE --batch-size
    add_option SERVER_TIMEOUT --server-timeout
    add_option CONFIG --config
    words_of WORKER_ARGS
    command+=("${words[@]}")
    export LOG_DIR=${LOG_DIR:-$STATE/logs}
}

# start_workers: runs `command` on every node that the job has now, TASKS_PER_NODE times each.
start_workers() {
    local nodes
    nodes=$(squeue --noheader --jobs="$job" --format=%D 2>/dev/null | head -n 1)
    nodes=${nodes:-$SLURM_JOB_NUM_NODES}
    workers_starts=$((workers_starts + 1)) workers_began_at=$SECONDS
    # A dead node or task ends neither the step nor the job: the others take its items.
    srun --nodes="$nodes" --ntasks="$((nodes * TASKS_PER_NODE))" \
        --ntasks-per-node="$TASKS_PER_NODE" --overlap --export=ALL --cpu-bind=none --input=none \
        --label --no-kill --kill-on-bad-exit=0 --wait=0 "$scripts/worker.sh" "${command[@]}" &
    workers=$!
}

# -------------------------------------------------------------------- until it ends

# run_job: watches what was started until the run is complete or cannot go on, and exits.
run_job() {
    while [ -z "$code" ]; do
        if [ -n "$asked" ]; then
            say "asked to end (SIG$asked)"
            code=$STOPPED
        elif [ -n "$server" ] && ! is_running "$server"; then
            note_server_end
        elif [ -n "$workers" ] && ! is_running "$workers"; then
            note_workers_end
        else
            pause "$POLL_S"
        fi
    done
    # The server last: it takes what the others give back.
    end_workers
    end_server
    if [ "$code" = "$STOPPED" ] && was_drained; then
        say "the server was drained; sbatch the same again to go on"
    elif [ "$code" = "$STOPPED" ] && [ "$asked" = TERM ]; then
        requeue
    fi
    exit "$code"
}

note_server_end() {
    local ended=0
    wait "$server" || ended=$?
    server=''
    ! has_announced || server_was_up=1 # it may have ended before anybody looked
    if [ "$ended" = 0 ] || [ "$ended" = 2 ] || [ -z "$server_was_up" ]; then
        code=$ended
    elif [ "$ended" = "$STOPPED" ]; then
        # Whoever ends this job told the server first.
        code=$ended asked=${asked:-TERM}
    elif [ "$server_starts" -gt "${SERVER_RESTARTS:-5}" ]; then
        say "the server ended with code $ended once more; giving up"
        code=1
    else
        say "the server ended with code $ended; starting it again"
        pause 2
        start_server
    fi
}

note_workers_end() {
    local ended=0
    wait "$workers" || ended=$?
    workers=''
    [ $((SECONDS - workers_began_at)) -lt "$LONG_ENOUGH_S" ] || workers_starts=1
    if [ "$ended" = 0 ]; then
        # They were told that the run is complete; the server ends by itself.
        [ -n "$server" ] || code=0
    elif [ "$ended" = "$ASKED_TO_END" ]; then
        # In the grace period of a preemption Slurm tells the tasks, not this script.
        say "the task managers were asked to end"
        code=$STOPPED asked=${asked:-TERM}
    elif [ "$ended" -le 128 ]; then
        say "the task managers ended with code $ended"
        code=$ended
    elif [ "$workers_starts" -gt "${STEP_RESTARTS:-5}" ]; then
        say "the task managers were killed once more (code $ended); giving up"
        code=1
    else
        say "the task managers were killed (code $ended); starting them again"
        pause 1
        start_workers
    fi
}

end_workers() {
    [ -n "$workers" ] || return 0
    # At the end of the run each hears it from the server, unless it is still loading a model.
    [ "$code" != 0 ] || await_end "$workers" 20 || true
    if is_running "$workers"; then
        # Not by a signal to srun: it would kill its tasks.
        scancel --quiet --signal=TERM "$job"
        await_end "$workers" "${WORKERS_END_S:-20}" || kill -KILL -- "-$workers"
    fi
    workers=''
}

end_server() {
    [ -n "$server" ] || return 0
    kill -TERM -- "-$server" 2>/dev/null
    await_end "$server" "${SERVER_END_S:-30}" || kill -KILL -- "-$server"
    # It may have got the last results just now.
    if wait "$server"; then code=0; fi
    server=''
}

# was_drained: returns 0 if somebody had the server end that this job started.
was_drained() {
    has_announced && grep -q '"state": *"drained"' "$STATE/server.json" 2>/dev/null
}

# requeue: has Slurm start this job again, unless it was cancelled or is requeued already.
requeue() {
    local try state=''
    for try in 1 2 3; do
        state=$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null | head -n 1)
        [ -z "$state" ] || break
        sleep "$try"
    done
    if [ "$state" != RUNNING ]; then
        say "not complete; the job is ${state:-not known to Slurm any more}, so it is not requeued"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-100}" ]; then
        say "not complete after $SLURM_RESTART_COUNT requeues; sbatch the same again to go on"
    elif scontrol requeue "$job"; then
        say "not complete; requeued, to go on where it was"
    else
        say "not complete, and cannot be requeued; sbatch the same again to go on"
    fi
}

# -------------------------------------------------------------------- small things

is_running() {
    kill -0 "$1" 2>/dev/null
}

# pause SECONDS: a signal ends it.
pause() {
    sleep "$1" &
    wait "$!"
}

# await_end PID SECONDS: returns 1 if it still runs after so long.
await_end() {
    local end=$((SECONDS + $2))
    while is_running "$1"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}
