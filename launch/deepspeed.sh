#!/usr/bin/env bash
# One machine with DeepSpeed's launcher instead of torchrun: launch/deepspeed.sh RANKS CONFIG [section.field=value...]
#
# The exit code is that of the first rank that failed. Signals end the ranks without waiting for a save; if that matters, use
# local.sh.
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
store_file=$(mktemp)
exec {store}<>"$store_file"
rm "$store_file"
export TANDEM_STORE_FILE=/proc/$$/fd/$store
# --no_local_rank, because our command line has no --local_rank; the ranks read LOCAL_RANK.
exec deepspeed --num_gpus "$RANKS_PER_NODE" --no_local_rank --master_port "${MASTER_PORT:-29500}" \
    --no_python "${visible[@]}" python -m tandem.trainer train "${@:2}"
