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

LAUNCH_FOLDER = Path(__file__).parents[2] / "launch"
VETH_NAME = "veth-tandem"
HOST_NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HEAD_ADDRESS = f"{ADDRESSES[0]}:29577"


def unsupported_reason() -> str | None:
    """What this machine cannot do; a root without `ip` can install it: that is a failure, not a skip."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return None
    probe = f"tandem-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


def run_ip(*arguments: str) -> str:
    assert shutil.which("ip"), "ip is not installed; apt-get install iproute2 (launch/test.sh does that)"
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True, eq=False)
class Host:
    namespace: str
    name: str
    node_index: int
    """Of `launch/multi_node.sh`."""
    file_overrides: dict[Path, Path] = field(default_factory=dict)
    """Files that this host sees with the content of another, in what is begun from then on."""
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_launcher(
        self, config: Path, log: IO[bytes], *overrides: str, **variables: str
    ) -> subprocess.Popen[bytes]:
        """`launch/multi_node.sh` on this host, with one rank; it ends with the hosts at the latest."""
        binds = "".join(f"mount --bind '{content}' '{file}'; " for file, content in self.file_overrides.items())
        inside = ["unshare", "--uts", "--mount", "sh", "-ec", f'hostname "$0"; {binds}exec "$@"', self.name]
        command = ["ip", "netns", "exec", self.namespace, *inside, LAUNCH_FOLDER / "multi_node.sh", config, *overrides]
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HEAD": HEAD_ADDRESS,
            "NODES": "2",
            "NODE": str(self.node_index),
            "RANKS_PER_NODE": "1",
            "GLOO_SOCKET_IFNAME": VETH_NAME,
        }
        launcher = subprocess.Popen(command, env=clean_environment() | environment | variables, stdout=log, stderr=log)
        self.launchers.append(launcher)
        return launcher

    def process_ids(self) -> list[int]:
        return list(map(int, run_ip("netns", "pids", self.namespace).split()))

    def rank_process_id(self) -> int | None:
        """The process that trains, if there is one now."""
        return next(filter(is_rank_process, self.process_ids()), None)

    def kill(self) -> None:
        """Every process of the host is gone, without a word."""
        for process in self.process_ids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()

    def set_link_state(self, state: str) -> None:
        """The cable is 'up', or 'down' at this end: then both hosts see no carrier."""
        run_ip("-n", self.namespace, "link", "set", VETH_NAME, state)

    def sent_bytes(self) -> int:
        (link,) = json.loads(run_ip("-n", self.namespace, "-json", "-statistics", "link", "show", VETH_NAME))
        return int(link["stats64"]["tx"]["bytes"])


@contextlib.contextmanager
def connect_hosts(purpose: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts, each with a loopback and its end of the cable; nothing else leads out of them. What runs there ends here."""
    hosts = [Host(f"{purpose}-{os.getpid()}-{node}", name, node) for node, name in enumerate(HOST_NAMES)]
    with contextlib.ExitStack() as cleanup:
        for host in hosts:
            run_ip("netns", "add", host.namespace)
            cleanup.callback(run_ip, "netns", "delete", host.namespace)
            cleanup.callback(host.kill)
        ends = [["name", VETH_NAME, "netns", host.namespace] for host in hosts]
        run_ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            run_ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", VETH_NAME)
            run_ip("-n", host.namespace, "link", "set", "lo", "up")
            host.set_link_state("up")
        yield hosts[0], hosts[1]


def is_rank_process(process: int) -> bool:
    """Whether the process is a rank, not its launcher."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    launcher = b"tandem.trainer.runtime.agent" in command
    return b"tandem.trainer" in command and not launcher
