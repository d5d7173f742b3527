#!/usr/bin/env bash
# Several machines without a scheduler: the same line on each, but for NODE, within fifteen minutes of the first.
#
#   HEAD=10.0.0.1:29500 NODES=2 NODE=0 launch/multi_node.sh CONFIG [section.field=value...]
#
# HEAD            address:port of machine 0, reachable from all
# NODES           number of machines
# NODE            which of them this is, from 0
# RANKS_PER_NODE  ranks on each machine; default 8
#
# Code, config, data and `run.root` lie at the same paths on every machine. SIGTERM or SIGUSR1 to torchrun on any machine saves
# and ends the run; the same lines continue it.
set -euo pipefail
[[ $# -ge 1 && -n ${HEAD:-} && -n ${NODES:-} && -n ${NODE:-} ]] || { grep '^#  ' "$0" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export RANKS_PER_NODE=${RANKS_PER_NODE:-8}
# shellcheck source=launch/env.sh
source launch/env.sh
# Static rendezvous: no machine guesses from its host name whether it is the head, and rank 0 is where NODE is 0.
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$RANKS_PER_NODE" \
    --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}" -m trainer train "$@"
