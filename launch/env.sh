# shellcheck shell=bash
# Every environment variable the launch scripts set, each with its reason. Sourced, never run; what the caller has already
# set wins. RANKS_PER_NODE is the number of processes that share this machine's cores.

[[ ${RANKS_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] ||
    { echo "tandem: RANKS_PER_NODE=$RANKS_PER_NODE: ranks on each machine; must be a number from 1 on; give one" >&2; exit 2; }

set_default() { [[ -n ${!1+set} ]] || export "$1=$2"; }

# The environment that launch/install.sh made, when there is one.
[[ ! -d .venv/bin ]] || export PATH=$PWD/.venv/bin:$PATH

# --- on every machine

# Ranks that each start a thread per core fight over the cores; more than 8 help nobody while GPUs do the work.
cores_per_rank=$(($(nproc --all) / ${RANKS_PER_NODE:-1}))
cores_per_rank=$((cores_per_rank < 1 ? 1 : cores_per_rank > 8 ? 8 : cores_per_rank))
set_default OMP_NUM_THREADS "$cores_per_rank"
# Logs appear when they are written, also through pipes and schedulers.
set_default PYTHONUNBUFFERED 1
# A crash in native code leaves the Python stack of every thread.
set_default PYTHONFAULTHANDLER 1
# Compiled kernels go to the node's own disk: hundreds of ranks locking one shared home directory stall at the start.
set_default TRITON_CACHE_DIR "${TMPDIR:-/tmp}/tandem-$(id -u)/triton"
set_default TORCHINDUCTOR_CACHE_DIR "${TMPDIR:-/tmp}/tandem-$(id -u)/inductor"
# When rank 0 is gone, torch warns on every other one with a C++ stack for each look into its store; ours says it in a sentence.
set_default TORCH_CPP_LOG_LEVEL ERROR
# Nothing is installed for DeepSpeed to compile: a build at start-up would be a mistake.
set_default DS_BUILD_OPS 0

# torchrun hands SIGUSR1 to its ranks too, instead of dying of it, and lets them save: a step, a save under way and the last
# one are some tens of seconds, its own limit is 30. So long it also waits for a rank that is frozen.
set_default PET_SIGNALS_TO_HANDLE SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
set_default PET_SHUTDOWN_TIMEOUT 180
# Ranks that fail are started again by torchrun, and the run goes on from its last checkpoint; after a signal to torchrun or a
# mistake, which all ranks learn of, they are not, and run.max_repeat_failures ends a loop.
set_default PET_MAX_RESTARTS "${MAX_RESTARTS:-100}"
# Each start of the ranks meets in a store of its own: torch 2.13's torchrun keeps one for all of them, where gloo finds the
# addresses of ranks that are gone, and tells only the machines of the first start where it is.
set_default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1

# --- on GPUs (without effect elsewhere)

# Phases have different shapes: segments that grow leave no unusable holes between the two.
set_default PYTORCH_ALLOC_CONF expandable_segments:True
# The price of reproducible matrix products (debug.deterministic); a few MiB.
set_default CUBLAS_WORKSPACE_CONFIG :4096:8
# Warnings name the network and version in use; INFO is for a person at a broken cluster.
set_default NCCL_DEBUG WARN
# The last collectives of every rank are kept, and written when one hangs: the only way to learn who was missing.
set_default TORCH_FR_BUFFER_SIZE 2000
set_default TORCH_NCCL_DUMP_ON_TIMEOUT 1

# --- between hosts: set these yourself where the default interface is not the fast one
#
# NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface of the cluster network, for example bond0
# NCCL_IB_HCA                              InfiniBand adapters to use
# MASTER_ADDR, MASTER_PORT                 host and port of rank 0; the scripts below set them
