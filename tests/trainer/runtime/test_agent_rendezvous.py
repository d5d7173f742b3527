"""The ranks of one machine meet where nobody else can write, and machines meet through a store whose pickles run no code."""

import base64
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousStateError

from tandem.trainer.config import UserError
from tandem.trainer.runtime import addresses, agent_rendezvous
from tests.ports import free_ports
from tests.promises.conftest import clean_environment
from tests.ranks import FORKSERVER
from tests.timeouts import TEST_TIMEOUT_SECONDS, wait_until

NOBODY = 65534
WRITTEN = 77
RANK = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from tandem.trainer.distributed.rendezvous import create_store

def meet():
    store = create_store(rank, 2, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    dist.all_reduce(total := torch.tensor(rank + 1))
    assert total == 3
    return store

rank, launcher, folder = int(os.environ["RANK"]), os.getppid(), Path(sys.argv[1])
if sys.argv[2] == "fail once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    meet()
    sys.exit(rank)
meet()
dist.destroy_process_group()
store = meet()  # a second group in the same processes, as tools for several tp_size need it
(folder / f"rank-{rank}").write_text(str(os.getpid()))
while sys.argv[2] == "outlive" and os.getppid() == launcher:
    time.sleep(0.01)
store.set(str(rank), str(rank))
store.get(str(1 - rank))
dist.barrier()
(folder / f"done-{rank}").touch()
"""
REASON = None if os.geteuid() == 0 else "only root can act as another user"


def is_root_with_network_namespaces() -> bool:
    return (
        os.geteuid() == 0 and bool(shutil.which("ip")) and not subprocess.run(["unshare", "--net", "true"]).returncode
    )


@contextmanager
def launched(folder: Path, story: str, *prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks that run RANK, under the command of `tandem train --ranks 2`."""
    (folder / "rank.py").write_text(RANK)
    # What asks for torchrun's own rendezvous changes nothing. A level in small letters is no name for torch.
    command = [
        sys.executable,
        "-m",
        "tandem.trainer.runtime.agent",
        "--standalone",
        "--rdzv-backend=c10d",
        "--rdzv-id=7",
    ]
    command += ["--nnodes=1", "--nproc-per-node=2"]
    environment = {**clean_environment(), "PET_MAX_RESTARTS": "1", "LOGLEVEL": "error"}
    with (folder / "log").open("wb") as log, subprocess.Popen(
        [*prefix, *command, folder / "rank.py", folder, story], stdout=log, stderr=log, env=environment
    ) as launcher:  # fmt: skip
        try:
            yield launcher
        finally:
            launcher.terminate()  # it ends its ranks, too


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.file), "w"))


def attack(ports: list[int], files: list[str], evil: bytes) -> None:
    """As another user, overwrite all that a rendezvous may read. Exits with WRITTEN if something could be written."""
    "".encode("idna")  # loads what this user may not read
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    written: list[object] = []

    def overwrite_keys(port: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
        for key in store.list_keys():
            store.set(key, base64.b64encode(evil).decode())
            written.append(key)

    for port in ports:
        with socket.create_connection(("127.0.0.1", port)) as garbage, suppress(OSError):
            garbage.sendall(evil)
        thread = threading.Thread(target=overwrite_keys, args=(port,), daemon=True)  # what is no store never answers
        thread.start()
        thread.join(1.5)
    for file in files:
        with suppress(OSError), open(file, "wb") as store_file:
            store_file.write(evil)
            written.append(file)
    os._exit(WRITTEN if written else 0)


def attacked(ports: list[int], files: list[str], evil: bytes) -> int | None:
    process = FORKSERVER.Process(target=attack, args=(ports, files, evil))
    process.start()
    process.join(TEST_TIMEOUT_SECONDS)
    return process.exitcode


def listening(pid: int) -> set[tuple[str, int]]:
    return {tuple(each.laddr) for each in psutil.Process(pid).net_connections("tcp") if each.status == "LISTEN"}


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_another_user_can_neither_write_to_the_store_of_one_machine_nor_run_code(tmp_path):
    """And the ranks can still use it, for their last save, after the launcher was killed."""
    tmp_path.chmod(0o777)
    with launched(tmp_path, "outlive") as launcher:
        pid_files = [tmp_path / "rank-0", tmp_path / "rank-1"]
        wait_until(lambda: launcher.poll() is not None or all(file.exists() and file.read_text() for file in pid_files))
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        ranks = [int(file.read_text()) for file in pid_files]
        assert listening(launcher.pid) == set()
        open_ports = set.union(*map(listening, ranks))
        assert {host for host, _ in open_ports} == {"127.0.0.1"}
        files = [
            f"/proc/{pid}/fd/{each.name}"
            for pid in (launcher.pid, *ranks)
            for each in Path(f"/proc/{pid}/fd").iterdir()
        ]
        targets = [target for target in map(os.readlink, files) if not target.startswith("/dev/")]
        assert sum("memfd:tandem-store" in os.readlink(file) for file in files) >= 3
        assert (
            attacked(
                [port for _, port in open_ports],
                [*files, *targets],
                pickle.dumps(Evil(tmp_path / "evil")),
            )
            == 0
        )
        os.kill(launcher.pid, signal.SIGKILL)
        wait_until(lambda: all((tmp_path / f"done-{rank}").exists() for rank in (0, 1)))
    assert not (tmp_path / "evil").exists()


@pytest.mark.skipif(not is_root_with_network_namespaces(), reason="needs root, ip and network namespaces")
def test_a_launch_asks_no_name_server_and_restarted_ranks_find_one_another(tmp_path):
    """On a machine whose name does not resolve, each question would take many seconds. Whatever is sent counts as one."""
    (tmp_path / "resolv.conf").write_text("nameserver 10.55.0.1\n")
    setup = f"""
        hostname odd-name.example
        mount --bind {tmp_path}/resolv.conf "$(readlink -f /etc/resolv.conf)"
        ip link set lo up
        ip link add card type veth peer name wall
        echo 1 >/proc/sys/net/ipv6/conf/card/disable_ipv6
        ip link set wall up
        ip address add 10.9.9.1/24 dev card
        ip link set card up
        ip route add default via 10.9.9.2
        ip neighbour add 10.9.9.2 lladdr 02:00:00:00:00:01 dev card
        "$@"
        ip -statistics link show card | tail -1 >{tmp_path}/sent
    """
    namespaces = ["unshare", "--net", "--uts", "--mount", "bash", "-ec", setup, "bash"]
    with launched(tmp_path, "fail once", *namespaces) as launcher:
        assert launcher.wait(TEST_TIMEOUT_SECONDS) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "sent").read_text().split()[1] == "0"


def parameters(port: int, **changes: Any) -> RendezvousParameters:
    given = {"is_host": True, "read_timeout": 5, "join_timeout": 30, "last_call_timeout": 1, **changes}
    return RendezvousParameters("tandem", f"127.0.0.1:{port}", "tandem", 1, 2, "127.0.0.1", **given)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_what_strangers_write_to_the_store_of_several_machines_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")  # a shared store would listen on all networks
    tmp_path.chmod(0o777)
    [port] = free_ports(1)
    before = listening(os.getpid())
    handler = agent_rendezvous.create_handler(parameters(port))
    assert handler.next_rendezvous().world_size == 1  # it reads its own state
    assert listening(os.getpid()) - before == {("127.0.0.1", port)}
    assert attacked([port], [], pickle.dumps(Evil(tmp_path / "evil"))) == WRITTEN
    with pytest.raises(RendezvousStateError, match=r"contains .*open; another program wrote to the store"):
        wait_until(lambda: handler.num_nodes_waiting() < 0)
    handler._stop_heartbeats()
    assert not (tmp_path / "evil").exists()


def test_a_taken_port_is_one_line(capsys):
    [port] = free_ports(1)
    first = addresses.listen("127.0.0.1", port, "first")
    with (
        first,
        pytest.raises(UserError, match=f"^HEAD=127.0.0.1:{port}: another process of this machine uses the port"),
    ):
        agent_rendezvous.create_handler(parameters(port))
