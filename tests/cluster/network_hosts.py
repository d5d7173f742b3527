"""Two hosts on this machine: network namespaces joined by a cable, each with a host name of its own.

The one idea: `ip netns exec` gives a process the network of a host and `unshare --uts` its name; the file system is shared, as
a run's folder is between real hosts, but for what a host is to see otherwise.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.promises.conftest import clean_environment

LAUNCH = Path(__file__).parents[2] / "launch"
CABLE = "veth-tandem"
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HEAD = f"{ADDRESSES[0]}:29577"


def missing() -> str | None:
    """What this machine cannot do; a root without `ip` can install it: that is a failure, not a skip."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return None
    probe = f"tandem-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


def ip(*arguments: str) -> str:
    assert shutil.which("ip"), "ip is not installed; apt-get install iproute2 (launch/test.sh does that)"
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True, eq=False)
class Host:
    namespace: str
    name: str
    node: int
    """Of `launch/multi_node.sh`."""
    others: dict[Path, Path] = field(default_factory=dict)
    """Files that this host sees with the content of another, in what is begun from then on."""
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def begun(self, config: Path, log: IO[bytes], *overrides: str, **variables: str) -> subprocess.Popen[bytes]:
        """`launch/multi_node.sh` on this host, with one rank; it ends with the hosts at the latest."""
        binds = "".join(f"mount --bind '{content}' '{file}'; " for file, content in self.others.items())
        inside = ["unshare", "--uts", "--mount", "sh", "-ec", f'hostname "$0"; {binds}exec "$@"', self.name]
        command = ["ip", "netns", "exec", self.namespace, *inside, LAUNCH / "multi_node.sh", config, *overrides]
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HEAD": HEAD, "NODES": "2", "NODE": str(self.node), "RANKS_PER_NODE": "1", "GLOO_SOCKET_IFNAME": CABLE,
        }  # fmt: skip
        launcher = subprocess.Popen(command, env=clean_environment() | environment | variables, stdout=log, stderr=log)
        self.launchers.append(launcher)
        return launcher

    def processes(self) -> list[int]:
        return list(map(int, ip("netns", "pids", self.namespace).split()))

    def rank(self) -> int | None:
        """The process that trains, if there is one now."""
        return next(filter(is_rank, self.processes()), None)

    def kill(self) -> None:
        """Every process of the host is gone, without a word."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()

    def plug(self, state: str) -> None:
        """The cable is 'up', or 'down' at this end: then both hosts see no carrier."""
        ip("-n", self.namespace, "link", "set", CABLE, state)

    def sent_bytes(self) -> int:
        (link,) = json.loads(ip("-n", self.namespace, "-json", "-statistics", "link", "show", CABLE))
        return int(link["stats64"]["tx"]["bytes"])


@contextlib.contextmanager
def joined(purpose: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts, each with a loopback and its end of the cable; nothing else leads out of them. What runs there ends here."""
    hosts = [Host(f"{purpose}-{os.getpid()}-{node}", name, node) for node, name in enumerate(NAMES)]
    with contextlib.ExitStack() as undo:
        for host in hosts:
            ip("netns", "add", host.namespace)
            undo.callback(ip, "netns", "delete", host.namespace)
            undo.callback(host.kill)
        ends = [["name", CABLE, "netns", host.namespace] for host in hosts]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.plug("up")
        yield hosts[0], hosts[1]


def is_rank(process: int) -> bool:
    """Whether the process is a rank, not its launcher."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    launcher = any(b"torchrun" in word or b"torch.distributed.run" in word for word in command)
    return b"tandem.trainer" in command and not launcher
