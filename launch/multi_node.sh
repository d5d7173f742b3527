#!/usr/bin/env bash
# Several machines without a scheduler. Start the same line on each, with its own NODE, within fifteen minutes of the first.
#
#   HEAD=10.0.0.1:29500 NODES=2 NODE=0 launch/multi_node.sh CONFIG [section.field=value...]
#
# HEAD               address:port of machine 0, reachable from all; it must be free, and not a public address
# NODES              number of machines; or FEWEST:MOST, for example 14:16, to continue without machines that fail
# NODE               the number of this machine, from 0; the others connect to machine 0
# RANKS_PER_NODE     ranks on each machine; default 8
# MAX_RESTARTS       how often failed ranks of this machine are restarted; default 100
# JOIN_SECONDS       how long machines wait for one another, at the start and after a failure; default 900
# LOST_SECONDS       a machine without a heartbeat for this long is lost; clocks must agree within it; default 60, at least 15
# LAST_CALL_SECONDS  how long FEWEST machines then wait for more; default 30
# TRUSTED_NETWORK    1 to allow a HEAD with a public address
#
# Machine 0 listens at HEAD, and every rank at ports of the same network. Keep strangers out of that network: whoever reaches these
# ports cannot run code there, but can stop the run or change its weights.
#
# Code, config, data and `run.root` have the same paths on every machine. A signal (SIGTERM, Ctrl-C) on machine 0 saves and ends
# the run; on another machine it saves and removes that machine. The same lines continue the run. If machine 0 fails, all
# machines end with code 1; start the same lines again.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/multi_node.sh
set -euo pipefail
[[ $# -ge 1 && -n ${HEAD:-} && -n ${NODES:-} && -n ${NODE:-} ]] || { grep -E '^# ( |[A-Z_]+ ) ' "$0" >&2; exit 2; }

for name in NODE MAX_RESTARTS JOIN_SECONDS LOST_SECONDS LAST_CALL_SECONDS; do
    least=0
    [[ $name != *_SECONDS ]] || least=1
    [[ ${!name:-$least} =~ ^(0|[1-9][0-9]{0,8})$ && ${!name:-$least} -ge $least ]] ||
        { echo "tandem: $name=${!name} is not valid; use a whole number of at least $least, with at most nine digits" >&2; exit 2; }
done
export RANKS_PER_NODE=${RANKS_PER_NODE:-8}
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
# Check the config here, where a mistake is one line and exit code 2; torchrun would retry. The address of this machine is the one
# from which it reaches the head, so host names need not resolve.
address=$(python - "$HEAD" "$NODES" "$NODE" "$RANKS_PER_NODE" "$@" <<'PYTHON'
import sys

from tandem.trainer.__main__ import check_start
from tandem.trainer.config import UserError, check_world_size, load_config
from tandem.trainer.runtime.addresses import local_address, parse_endpoint, resolve

head, nodes, node, ranks_per_node, config, *overrides = sys.argv[1:]
try:
    host, port = parse_endpoint(head)
    fewest, colon, most = nodes.partition(":")
    if not all(number.isascii() and number.isdecimal() and int(number) for number in (fewest, most if colon else fewest)):
        raise UserError(f"NODES={nodes} is not valid; use a number of machines or FEWEST:MOST")
    if not int(node) < int(most or fewest) >= int(fewest) > 0:
        raise UserError(f"NODE={node} NODES={nodes} is not valid; use NODE from 0 to NODES - 1 (or MOST - 1), and FEWEST from 1 to MOST")
    tree = load_config(config, overrides)
    for count in range(int(fewest), int(most or fewest) + 1):
        check_world_size(tree, count * int(ranks_per_node))
    check_start(tree, starts_rank_0=int(node) == 0)
    address = local_address(host, port)
    resolve(host, f"HEAD={head}", other_machines=most != "1")  # refuses a public address
    print(address)
except UserError as error:
    sys.exit(print(f"tandem: {error}", file=sys.stderr) or 2)
except OSError as error:
    # Not exit code 2: the network of a machine that has just booted may be late, and a supervisor should retry.
    sys.exit(f"tandem: HEAD={head} cannot be reached from this machine ({error.strerror}); check the address and the network")
PYTHON
)
is_host=0
[[ $NODE -ne 0 ]] || is_host=1
# Machines agree through a store on the head, again after every failure. Reads from the store wait as long as for other machines, so
# that a network that is down for some minutes ends no launcher.
join=${JOIN_SECONDS:-900} lost=${LOST_SECONDS:-60}
settings=is_host=$is_host,join_timeout=$join,read_timeout=$join,last_call_timeout=${LAST_CALL_SECONDS:-30}
settings+=,keep_alive_interval=5,keep_alive_max_attempt=$((lost < 15 ? 3 : lost / 5))
exec python -m tandem.trainer.runtime.agent --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --local-addr "$address" \
    --rdzv-endpoint "$HEAD" --rdzv-conf "$settings" -m tandem.trainer train "$@"
