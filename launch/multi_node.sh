#!/usr/bin/env bash
# Several machines without a scheduler: the same line on each, but for NODE, within fifteen minutes of the first.
#
#   HEAD=10.0.0.1:29500 NODES=2 NODE=0 launch/multi_node.sh CONFIG [section.field=value...]
#
# HEAD               address:port of machine 0, reachable from all
# NODES              number of machines; or FEWEST:MOST, for example 14:16, to go on without machines that fail
# NODE               which of them this is, from 0; machine 0 is where they meet
# RANKS_PER_NODE     ranks on each machine; default 8
# MAX_RESTARTS       how often ranks of this machine may fail and are started again; default 100
# JOIN_SECONDS       how long machines wait for one another, at the start and after a failure; default 900
# LOST_SECONDS       a machine that gives no sign for so long is lost, clocks that differ included; default 60, at least 15
# LAST_CALL_SECONDS  how long FEWEST machines then wait for more; default 30
#
# Code, config, data and `run.root` lie at the same paths on every machine. SIGTERM or SIGUSR1 to torchrun on machine 0 saves
# and ends the run; on another machine it saves and takes that machine away. The same lines continue the run. Where machine 0
# itself fails, all end with code 1, to be started again by whatever started them.
set -euo pipefail
[[ $# -ge 1 && -n ${HEAD:-} && -n ${NODES:-} && -n ${NODE:-} ]] || { grep -E '^# ( |[A-Z_]+ ) ' "$0" >&2; exit 2; }
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

for name in NODE MAX_RESTARTS JOIN_SECONDS LOST_SECONDS LAST_CALL_SECONDS; do
    least=0
    [[ $name != *_SECONDS ]] || least=1
    [[ ${!name:-$least} =~ ^(0|[1-9][0-9]*)$ && ${!name:-$least} -ge $least ]] ||
        { echo "tandem: $name=${!name}: must be a number from $least on; give one" >&2; exit 2; }
done
export RANKS_PER_NODE=${RANKS_PER_NODE:-8}
# shellcheck source=launch/env.sh
source launch/env.sh
# A mistake in the config ends here, in one line and exit code 2; torchrun would try it again. Names of hosts are not asked:
# the address of this machine is the one from which it reaches the head.
address=$(python - "$HEAD" "$NODES" "$NODE" "$RANKS_PER_NODE" "$@" <<'PYTHON'
import socket, sys

from tandem.trainer.config import UserError, check_world_size, load_config

head, nodes, node, ranks_per_node, config, *overrides = sys.argv[1:]
host, _, port = head.rpartition(":")
try:
    fewest, colon, most = nodes.partition(":")
    if not all(number.isdigit() and int(number) for number in (fewest, most if colon else fewest, port)) or not host:
        raise UserError(f"HEAD={head} NODES={nodes}: not address:port and a number of machines, or FEWEST:MOST of them")
    if not int(node) < int(most or fewest) >= int(fewest) > 0:
        raise UserError(f"NODE={node} NODES={nodes}: must be 0 <= NODE < MOST >= FEWEST > 0; mend the one or the other")
    tree = load_config(config, overrides)
    for count in range(int(fewest), int(most or fewest) + 1):
        check_world_size(tree, count * int(ranks_per_node))
    family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(where)  # sends nothing
        print(way.getsockname()[0])
except UserError as error:
    sys.exit(print(f"tandem: {error}", file=sys.stderr) or 2)
except OSError as error:
    # Not 2: at the start of a machine the network may be late, and who started this should try again.
    sys.exit(f"tandem: HEAD={head}: cannot be reached from here ({error.strerror}); mend the address or the network")
PYTHON
)
is_host=0
[[ $NODE -ne 0 ]] || is_host=1
# Machines agree in a store on the head, again after every failure. What waits for an answer of the store waits as long as for
# other machines, so that a network that is away for some minutes costs no machine its launcher.
join=${JOIN_SECONDS:-900} lost=${LOST_SECONDS:-60}
settings=is_host=$is_host,join_timeout=$join,read_timeout=$join,last_call_timeout=${LAST_CALL_SECONDS:-30}
settings+=,keep_alive_interval=5,keep_alive_max_attempt=$((lost < 15 ? 3 : lost / 5))
exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --local-addr "$address" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id tandem --rdzv-conf "$settings" -m tandem.trainer train "$@"
