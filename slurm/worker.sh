#!/usr/bin/env bash
# worker.sh COMMAND...: one task of a job's step. Runs COMMAND through launcher.sh, starts it again
# when it dies, and passes SIGTERM on to it.
#
# Exit codes: those of the command (0 complete, 2 usage, 3 stopped by itself, 5 server lost), 1 when
# it failed too often, 143 when this task was asked to end.
set -uo pipefail
# The command has its own process group: a signal to it reaches Python inside a container, too.
set -m
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

LONG_ENOUGH_S=600 # what ran so long before it died gets all its restarts again
restarts=0 most=${WORKER_RESTARTS:-3} pause_s=${WORKER_PAUSE_S:-5}
child='' asked=''

say() {
    printf '%s task %s: %s\n' "$(date +%H:%M:%S)" "${SLURM_PROCID:-0}" "$*" >&2
}

# pause SECONDS: a signal ends it.
pause() {
    sleep "$1" &
    wait "$!"
}

pass_on() {
    asked=1
    [ -z "$child" ] || kill -TERM -- "-$child" 2>/dev/null
}
trap pass_on TERM INT

# What model servers cache is kept from restart to restart, on this node, for this task alone. Not
# TMPDIR: there the task managers of a node keep off each other's ports.
local_dir=${LOCAL_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}
CACHE_DIR=$(mktemp -d "$local_dir/dispatcher-cache-XXXXXX") || exit 1
export CACHE_DIR
trap 'rm -rf -- "$CACHE_DIR"' EXIT

[ -z "${LOG_DIR:-}" ] || set -- "$@" --log-dir "$LOG_DIR/$SLURM_JOB_ID.${SLURM_PROCID:-0}"

while :; do
    began_at=$SECONDS
    "$scripts/launcher.sh" --worker "$@" </dev/null &
    child=$!
    [ -z "$asked" ] || kill -TERM -- "-$child" # it came when there was nobody to tell
    while :; do
        wait "$child"
        code=$?
        # A signal ends `wait` early.
        kill -0 "$child" 2>/dev/null || break
    done
    child=''
    [ "$code" != 0 ] || exit 0
    # The signal that ended it may reach this shell a moment later.
    [ -n "$asked" ] || pause 0.5
    [ -z "$asked" ] || exit 143
    case $code in 2 | 3 | 5) exit "$code" ;; esac
    [ $((SECONDS - began_at)) -lt "$LONG_ENOUGH_S" ] || restarts=0
    if [ "$restarts" -ge "$most" ]; then
        say "ended with code $code after $restarts restarts; giving up"
        exit 1
    fi
    restarts=$((restarts + 1))
    say "ended with code $code; starting it again in $pause_s s ($restarts of $most)"
    pause "$pause_s"
    [ -z "$asked" ] || exit 143
done
