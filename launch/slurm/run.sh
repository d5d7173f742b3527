#!/usr/bin/env bash
# The run inside a Slurm job: launch/slurm/run.sh CONFIG [section.field=value...], called by the .sbatch files beside it.
#
# One task for each GPU, no torchrun between: signals reach the ranks and their exit codes come back as they are. The ranks
# take SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID for rank, world size and local rank.
#
#   exit code of the run   0   finished: the job ends
#                          2   a mistake, or run.max_repeat_failures starts in a row have failed at one step: the job ends with it
#                   126, 127   no python: the job ends with it
#                         85   saved on a signal, or ended by the watchdog of a hang: the job goes back into the queue
#                      other   a crash, or 128 + n where signal n has killed a rank: the same. With hundreds of GPUs most
#                              crashes are hardware, and from the last checkpoint other nodes can do the step.
#
# srun returns 128 + n if any task was killed, whatever the others said, else the highest code. So that the 2 of one rank is
# not lost where others froze and were killed, a rank that leaves with 2 takes from the job the right to go back.
set -euo pipefail
readonly USER_ERROR_EXIT_CODE=2 REQUEUE_EXIT_CODE=85 # trainer/__main__.py, trainer/runtime.py

# sbatch --signal=B:USR1@300 warns this shell alone; srun hands the signal to every rank. Trapped from here on, for a
# warning that comes before there are ranks must not end the job either.
warned='' step=''
trap 'warned=yes; kill -USR1 "$step" 2>/dev/null || true' USR1

if [[ ! -f launch/env.sh ]]; then
    echo "run.sh: $PWD is not the repository; submit from its root: sbatch launch/slurm/NAME.sbatch" >&2
    exit "$USER_ERROR_EXIT_CODE"
fi
[[ $# -ge 1 ]] || { echo "run.sh: no config; sbatch launch/slurm/train.sbatch CONFIG [section.field=value...]" >&2; exit 2; }
export RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:?submit with --ntasks-per-node}
# shellcheck source=launch/env.sh
source launch/env.sh

# Slurm's controller may be starting again itself: what it does not answer it is asked again for $1 seconds.
asked_again() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 5
    done
}
export -f asked_again # for the shells of the ranks
readonly PATIENCE_SECONDS=${SLURM_PATIENCE_SECONDS:-300}

# shellcheck disable=SC2317 # called by asked_again
requeued() {
    scontrol requeue "$SLURM_JOB_ID" && return
    if scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q ' Requeue=0 '; then
        echo "run.sh: Slurm refuses; if not for --no-requeue, then because a rank has left with exit code 2, said above" >&2
        exit "$USER_ERROR_EXIT_CODE"
    fi
    return 1
}

back_into_the_queue() {
    echo "run.sh: $1; back into the queue (start $((${SLURM_RESTART_COUNT:-0} + 2)) follows)"
    asked_again "$PATIENCE_SECONDS" requeued && exit 0
    echo "run.sh: not back in the queue (scontrol's reason above); submit the same again: the run goes on" >&2
    exit "$REQUEUE_EXIT_CODE"
}

# Where python cannot import the program every start would fail alike, and before the run can count it.
check_import() {
    local said
    said=$(python -c "import $1" 2>&1) && return
    echo "run.sh: $(command -v python || echo 'no python') cannot import $1 (${said##*$'\n'}); launch/install.sh makes .venv" >&2
    exit "$USER_ERROR_EXIT_CODE"
}
check_import tandem.trainer.__main__
[[ -z $warned ]] || back_into_the_queue "warned before the ranks were started"

# NodeAddr is where Slurm itself reaches the node, if its name alone leads nowhere.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
node=$(asked_again "$PATIENCE_SECONDS" scontrol --oneliner show node "$head") ||
    { echo "run.sh: Slurm does not say where $head is (scontrol's reason above); submit the same again" >&2; exit 1; }
MASTER_ADDR=$(sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' <<<"$node")
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node get different ports

# SLURM_WAIT (--wait), not --kill-on-bad-exit: after a rank has left, with whatever code, the others get two minutes to leave
# by themselves; a frozen one is then killed. Killed at once, they would turn the 85 of a saved run into that of a signal.
# --distribution=block: neighbouring ranks share a node, hence tensor-parallel groups do.
# --cpus-per-task is named again because srun does not take it from sbatch since Slurm 22.05.
# The trap keeps the shell around a rank alive, for Slurm signals both; the rank itself starts without it.
set_default SLURM_WAIT 120
# shellcheck disable=SC2016 # for the shell of the rank
srun --kill-on-bad-exit=0 --distribution=block --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    trap : TERM USR1 INT
    python -m tandem.trainer train "$@" && exit
    code=$?
    # Within SLURM_WAIT, the last try included; a container may have no scontrol.
    [[ $code -ne 2 ]] || ! command -v scontrol >/dev/null ||
        asked_again 90 scontrol update JobId="$SLURM_JOB_ID" Requeue=0
    exit "$code"' rank "$@" &
step=$!
[[ -z $warned ]] || kill -USR1 "$step" # in the moment before the shell knew the step

code=0
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trapped signal interrupts wait
wait "$step" || code=$?
case $code in
0 | "$USER_ERROR_EXIT_CODE" | 126 | 127) exit "$code" ;;
"$REQUEUE_EXIT_CODE") back_into_the_queue "the run saved and left" ;;
*)
    check_import tandem.trainer.train # with all heavy libraries: seconds that a start which succeeds need not wait
    back_into_the_queue "the run failed (exit code $code)"
    ;;
esac
