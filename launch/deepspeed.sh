#!/usr/bin/env bash
# One machine with DeepSpeed's launcher instead of torchrun: launch/deepspeed.sh RANKS CONFIG [section.field=value...]
#
# The exit code is that of the first rank that failed. A signal (SIGTERM, SIGUSR1, Ctrl-C, a closed terminal) saves the run, and the
# exit code is 85. If SIGTERM, Ctrl-C or Ctrl-\ arrives more than five seconds after the first signal, it ends the ranks.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/deepspeed.sh
set -euo pipefail
[[ $# -ge 2 ]] || { echo "usage: launch/deepspeed.sh RANKS CONFIG [section.field=value...]" >&2; exit 2; }

export RANKS_PER_NODE=$1
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
# DeepSpeed reads this as the number of devices if there are no GPUs; otherwise it counts them.
export LOCAL_SIZE=$RANKS_PER_NODE
# DeepSpeed ignores CUDA_VISIBLE_DEVICES if it is told the number of ranks, and gives the ranks a value of its own. `env` restores it.
visible=()
[[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || visible=(env "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
# The ranks meet in a deleted file, which other users cannot open, so none of them listens at --master_port.
store_file=$(mktemp 2>/dev/null) ||
    { echo "tandem: TMPDIR=${TMPDIR:-/tmp}: no file can be made there; set TMPDIR to a folder that you can write to" >&2; exit 2; }
exec {store}<>"$store_file"
rm "$store_file"
export TANDEM_STORE_FILE=/proc/$$/fd/$store
# DeepSpeed's processes would not wait for a save. They are in a session of their own, which no terminal signals, and ignore
# SIGUSR1; the ranks heed it. It is repeated, because ranks that are still starting ignore it too.
python -m tandem.trainer train --check-only --ranks "$RANKS_PER_NODE" "${@:2}" # before DeepSpeed's launcher, which takes seconds
launcher='' stopped_at=''
# shellcheck disable=SC2317 # called by the traps
stop() {
    [[ -z $stopped_at || $1 != TERM || $((SECONDS - stopped_at)) -lt 6 ]] || kill -TERM -- "-$launcher" 2>/dev/null || true
    stopped_at=${stopped_at:-$SECONDS}
}
trap 'stop TERM' TERM INT QUIT # before the start, because bash ignores SIGQUIT
trap 'stop HUP' HUP USR2 XCPU
trap '' USR1
# --no_local_rank, because our command line has no --local_rank; the ranks read LOCAL_RANK.
setsid deepspeed --num_gpus "$RANKS_PER_NODE" --no_local_rank --master_port "${MASTER_PORT:-29500}" \
    --no_python "${visible[@]}" python -m tandem.trainer train "${@:2}" &
launcher=$!
trap 'stop HUP' USR1
code=0
while kill -0 "$launcher" 2>/dev/null; do
    [[ -z $stopped_at ]] || kill -USR1 -- "-$launcher" 2>/dev/null || true
    sleep 1
done
wait "$launcher" || code=$?
exit "$code"
