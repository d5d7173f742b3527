#!/usr/bin/env bash
# The run inside a Slurm job: launch/slurm/run.sh CONFIG [section.field=value...], called by the .sbatch files beside it.
#
# One task for each GPU, no torchrun between: signals reach the ranks and their exit codes come back as they are. The ranks
# take SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID for rank, world size and local rank.
#
#   exit code of the run   0   finished: the job ends
#                         85   saved on a signal: the job goes back into the queue and continues from the checkpoint
#                      other   a mistake or a crash: the job ends with it, for a person to read the log
set -euo pipefail
readonly REQUEUE_EXIT_CODE=85 # trainer/runtime.py

if [[ ! -f launch/env.sh ]]; then
    echo "run.sh: $PWD is not the repository; submit from its root: sbatch launch/slurm/NAME.sbatch" >&2
    exit 2
fi
export RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:?submit with --ntasks-per-node}
# shellcheck source=launch/env.sh
source launch/env.sh
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node get different ports

# --wait, not --kill-on-bad-exit: after a rank has left, with whatever code, the others get two minutes to leave by
# themselves. Killed at once, they would turn the 85 of a saved run into the code of a signal.
# --distribution=block: neighbouring ranks share a node, hence tensor-parallel groups do.
# --cpus-per-task is named again because srun does not take it from sbatch since Slurm 22.05.
srun --kill-on-bad-exit=0 --wait=120 --distribution=block --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    python -m trainer train "$@" &
step=$!
# sbatch --signal=B:USR1@300 warns this shell alone; srun hands the signal to every rank. Never send it twice: the second
# one ends a rank at once.
trap 'kill -USR1 "$step" || true' USR1

code=0
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trapped signal interrupts wait
wait "$step" || code=$?
if [[ $code -eq $REQUEUE_EXIT_CODE ]]; then
    echo "run.sh: the run saved and left; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
