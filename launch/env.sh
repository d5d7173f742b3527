# shellcheck shell=bash
# The environment variables of the launch scripts, each with its reason. The scripts source this file. A variable that is already
# set keeps its value. RANKS_PER_NODE is the number of processes that share the cores of this machine.

[[ ${RANKS_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] ||
    { echo "tandem: RANKS_PER_NODE=$RANKS_PER_NODE is not a number of ranks per machine; use a whole number of at least 1" >&2; exit 2; }

set_default() { [[ -n ${!1+set} ]] || export "$1=$2"; }

# The environment that launch/install.sh made, if it exists.
repository=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
[[ ! -d $repository/.venv/bin ]] || export PATH=$repository/.venv/bin:$PATH

# Python must not import modules of the working folder, for example a user's random.py or tandem.py. `python -m` and `python -`
# search it first, and so does an empty entry or `.` in PYTHONPATH.
export PYTHONSAFEPATH=1
if [[ -n ${PYTHONPATH:-} ]]; then
    IFS=: read -ra entries <<<"$PYTHONPATH"
    PYTHONPATH=
    for entry in "${entries[@]}"; do
        [[ $entry =~ ^(\./+)*\.?$ ]] || PYTHONPATH+=${PYTHONPATH:+:}$entry
    done
fi

# --- on every machine

# The scripts start the ranks, so what another launcher, a notebook or a scheduler left behind must not reach them.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID CROSS_RANK LOCAL_SIZE TANDEM_STORE_FILE
# If every rank starts a thread per processor, the threads compete. The file counts the processors that affinity, cgroups and Slurm
# leave to this process. Without Python it fails, but then the ranks cannot start either.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    OMP_NUM_THREADS=$(python3 -I "$repository/trainer/runtime/processors.py" "${RANKS_PER_NODE:-1}" 2>/dev/null) || OMP_NUM_THREADS=1
    export OMP_NUM_THREADS
fi
# Show logs at once, through pipes and schedulers too.
set_default PYTHONUNBUFFERED 1
# Print the Python stack of every thread after a crash in native code.
set_default PYTHONFAULTHANDLER 1
# If rank 0 disappears, torch prints a C++ stack on every other rank at each access to its store. Our message is one sentence.
set_default TORCH_CPP_LOG_LEVEL ERROR
# No operator of DeepSpeed is used, so it must not build any at start-up.
set_default DS_BUILD_OPS 0

# --- on GPUs (no effect elsewhere)

# Phases have different shapes. Expandable segments avoid fragmentation when the shape changes.
set_default PYTORCH_ALLOC_CONF expandable_segments:True
# Reproducible matrix products (debug.deterministic) need this workspace of a few MiB.
set_default CUBLAS_WORKSPACE_CONFIG :4096:8
# WARN names the network and the version in use. Use INFO to debug a cluster.
set_default NCCL_DEBUG WARN
# Keep the last collectives of every rank and write them if one hangs. Only they show which rank was missing.
set_default TORCH_FR_BUFFER_SIZE 2000
set_default TORCH_NCCL_DUMP_ON_TIMEOUT 1

# --- between hosts: set these yourself if the default interface is not the fast one
#
# NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface of the cluster network, for example bond0
# NCCL_IB_HCA                              InfiniBand adapters to use
# MASTER_ADDR, MASTER_PORT                 host and port of rank 0; the scripts below set them
