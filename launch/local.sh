#!/usr/bin/env bash
# One machine, through torchrun: launch/local.sh RANKS CONFIG [section.field=value...]
#
# Use one rank per GPU, or any small number on a CPU. A mistake ends with one line and exit code 2. A signal (SIGTERM, SIGUSR1, Ctrl-C,
# a closed terminal) saves the run, and the exit code is 85. Failed ranks are restarted up to MAX_RESTARTS times (default 100), and
# the run continues from its last checkpoint.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/local.sh
set -euo pipefail
[[ $# -ge 2 ]] || { echo "usage: launch/local.sh RANKS CONFIG [section.field=value...]" >&2; exit 2; }

export RANKS_PER_NODE=$1
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
exec python -m tandem.trainer train --ranks "$RANKS_PER_NODE" "${@:2}"
