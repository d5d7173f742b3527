#!/usr/bin/env bash
# Run inside a Slurm job: launch/slurm/run.sh CONFIG [section.field=value...]. The .sbatch files in this folder call it.
#
# srun starts one task per GPU, without torchrun, so that signals reach the ranks and their exit codes come back unchanged. The ranks
# read SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID as rank, world size and local rank.
#
#   exit code of the run   0   finished: the job ends
#                          2   a mistake, or run.max_repeat_failures starts in a row failed at one step: the job ends with 2
#                   126, 127   no Python: the job ends with that code
#                         85   saved after a signal, or the watchdog ended a hang: the job is requeued
#                      other   a crash, or 128 + n if signal n killed a rank: requeued. With hundreds of GPUs most crashes are
#                              hardware, and other nodes can repeat the step from the last checkpoint.
#
# srun returns 128 + n if any task was killed, whatever the other tasks returned, and otherwise the highest code. That would hide the
# 2 of one rank if others froze and were killed. So a rank that exits with 2 sets Requeue=0 on the job.
set -euo pipefail
echo() { builtin echo "$@" || true; } # a full disk behind the log must not end the script
readonly USER_ERROR_EXIT_CODE=2 REQUEUE_EXIT_CODE=85 # trainer/__main__.py, trainer/runtime/signals.py

# sbatch --signal=B:USR1@300 signals only this shell; srun passes the signal to every rank. Trap it from here on, because a
# warning before the ranks exist must not end the job either.
warned='' step=''
trap 'warned=yes; kill -USR1 "$step" 2>/dev/null || true' USR1 USR2

[[ $# -ge 1 ]] || { echo "run.sh: no config is named; submit with sbatch launch/slurm/train.sbatch CONFIG [section.field=value...]" >&2; exit 2; }
[[ -n ${SLURM_NTASKS_PER_NODE:-} ]] || { echo "run.sh: SLURM_NTASKS_PER_NODE is not set; submit with sbatch --ntasks-per-node" >&2; exit 2; }
export RANKS_PER_NODE=$SLURM_NTASKS_PER_NODE
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../env.sh"

# Retry a command for $1 seconds, because Slurm's controller may be restarting.
retry() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 5
    done
}
export -f retry # for the shells of the ranks
readonly PATIENCE_SECONDS=${SLURM_PATIENCE_SECONDS:-300}

# shellcheck disable=SC2317 # called by retry
requeue() {
    scontrol requeue "$SLURM_JOB_ID" && return
    if [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") == *' Requeue=0 '* ]]; then
        echo "run.sh: Slurm refuses to requeue the job: it was submitted with --no-requeue, or a rank exited with code 2 (its message is above)" >&2
        exit "$USER_ERROR_EXIT_CODE"
    fi
    return 1
}

requeue_and_exit() {
    echo "run.sh: $1; requeueing the job (start $((${SLURM_RESTART_COUNT:-0} + 2)) follows)"
    retry "$PATIENCE_SECONDS" requeue && exit 0
    echo "run.sh: the job was not requeued (scontrol's reason is above); submit the same command again to continue the run" >&2
    exit "$REQUEUE_EXIT_CODE"
}

# If Python cannot import the program, every start fails the same way, before the run can count its starts.
check_import() {
    local output
    output=$(python -c "import $1" 2>&1) && return
    echo "run.sh: cannot import $1 with $(command -v python || echo 'python, which is missing') (${output##*$'\n'}); run $repository/launch/install.sh" >&2
    exit "$USER_ERROR_EXIT_CODE"
}
check_import tandem.trainer.__main__
[[ -z $warned ]] || requeue_and_exit "the warning signal came before the ranks started"

# NodeAddr is the address that Slurm itself uses; the node's name may not resolve.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into a pipe: a reader that ends early would end the script
head=$(sed -n 1p <<<"$nodes")
node=$(retry "$PATIENCE_SECONDS" scontrol --oneliner show node "$head") ||
    { echo "run.sh: Slurm does not know the address of $head (scontrol's reason is above); submit the same command again" >&2; exit 1; }
MASTER_ADDR=$(sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' <<<"$node")
# If NodeAddr is a name, /etc/hosts of the node itself may give it a loopback address. Then use the node's address on the route to
# the second node.
other=$(sed -n 2p <<<"$nodes")
if [[ -n $other && $MASTER_ADDR != 127.* && $(getent ahosts "$MASTER_ADDR") =~ ^(127\.|::1 ) ]]; then
    other=$(scontrol --oneliner show node "$other" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_ADDR=$(python -c 'import sys; from tandem.trainer.runtime import addresses; print(addresses.local_address(sys.argv[1], 1))' "$other")
fi
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # jobs that share a node get different ports

# SLURM_WAIT (--wait) instead of --kill-on-bad-exit: after one rank exits, the others have two minutes to exit too; then Slurm kills
# them. If it killed them at once, srun would return a signal's code instead of the 85 of a saved run.
# --distribution=block: neighbouring ranks, and so tensor-parallel groups, share a node.
# --cpus-per-task: since Slurm 22.05 srun does not inherit it from sbatch.
# The trap keeps the shell around a rank alive, because Slurm signals both; the rank itself starts without the trap.
set_default SLURM_WAIT 120
# shellcheck disable=SC2016 # for the shell of the rank
srun --kill-on-bad-exit=0 --distribution=block --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    trap : TERM USR1 USR2 INT
    # So that a single task is a rank too, and not a shell that starts the ranks of its machine.
    TANDEM_LAUNCHER=srun python -m tandem.trainer train "$@" && exit
    code=$?
    # 90 s stay within SLURM_WAIT; a container may have no scontrol.
    [[ $code -ne 2 ]] || ! command -v scontrol >/dev/null ||
        retry 90 scontrol update JobId="$SLURM_JOB_ID" Requeue=0
    exit "$code"' rank "$@" &
step=$!
[[ -z $warned ]] || kill -USR1 "$step" # a warning that came before `step` was set

code=0
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trapped signal interrupts wait
wait "$step" || code=$?
case $code in
0 | "$USER_ERROR_EXIT_CODE" | 126 | 127) exit "$code" ;;
"$REQUEUE_EXIT_CODE") requeue_and_exit "the run saved and exited" ;;
*)
    check_import tandem.trainer.train # imports all heavy libraries, which takes seconds; only after a failure
    requeue_and_exit "the run failed (exit code $code)"
    ;;
esac
