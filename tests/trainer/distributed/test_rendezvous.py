"""Where rank 0 listens, which addresses are refused, and that no rank unpickles what another one sent."""

import os
import re
import socket
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from tandem.trainer.config import UserError
from tandem.trainer.distributed import mesh, rendezvous
from tandem.trainer.runtime import addresses
from tests.ports import free_ports
from tests.promises.conftest import fork_tandem, two_phase_config, wait_for_exit
from tests.timeouts import wait_until

TRAINER = Path(mesh.__file__).parents[1]
TIMEOUT = timedelta(seconds=30)


def listening() -> set[tuple[str, int]]:
    return {tuple(each.laddr) for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # set first, so that what a test sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def open_store(monkeypatch, host: str, port: object, rank: int = 0):
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    return rendezvous._open_store.__wrapped__(rank, 2, TIMEOUT)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_rank_0_listens_on_master_addr_only_and_gloo_on_its_interface(host, monkeypatch):
    [port] = free_ports(1)
    before = listening()
    store = open_store(monkeypatch, host, port)
    assert listening() - before == {(addresses.resolve(host, "", other_machines=False), port)}
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    other = open_store(monkeypatch, host, port, rank=1)
    store.set("key", "value")
    assert other.get("key") == b"value"


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("192.0.2.7", "29500", "this machine does not have the address; use one of its own"),
        ("8.8.8.8", "29500", "8.8.8.8 is a public address, and whoever reaches the ports of a run can disturb it"),
        ("2001:4860:4860::8888", "29500", "is a public address"),
        ("0.0.0.0", "29500", "0.0.0.0 names no machine; use an address"),
        ("::", "29500", ":: names no machine; use an address"),
        ("::ffff:0.0.0.0", "29500", "::ffff:0.0.0.0 names no machine; use an address"),
        ("no-such-host.invalid", "29500", "no-such-host.invalid has no address (Name or service not known)"),
        ("a..b", "29500", "a..b has no address (not a host name)"),
        ("", "29500", "is not valid; 2 ranks need an address of rank 0's machine and a port that is free there"),
        ("127.0.0.1", "", "is not valid; 2 ranks need an address of rank 0's machine and a port that is free there"),
        ("127.0.0.1", "0", "is not valid"),
        ("127.0.0.1", "29500x", "is not valid"),
        ("127.0.0.1", "70000", "port must be 0-65535"),
    ],
)
def test_an_address_where_no_run_can_meet_is_one_line(host, port, message, monkeypatch):
    monkeypatch.delenv("TRUSTED_NETWORK", raising=False)
    monkeypatch.setattr(addresses, "local_address", lambda *_: "127.0.0.1")  # a machine with a route to everywhere
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        open_store(monkeypatch, host, port)
    assert str(refusal.value).startswith(f"MASTER_ADDR={host} MASTER_PORT={port}")
    assert "\n" not in str(refusal.value)


def test_an_address_without_a_route_is_one_line(monkeypatch):
    def no_route(*_):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(addresses, "local_address", no_route)
    with pytest.raises(
        UserError, match=r"MASTER_PORT=29500: this machine has no route to it \(Network is unreachable\); use"
    ):
        open_store(monkeypatch, "10.99.9.9", 29500)


def test_a_second_name_of_an_interface_is_used(monkeypatch):
    """`ip address add ... label card:1` makes one; the addresses have it, the list of interfaces does not."""
    monkeypatch.setattr(addresses, "interface_of", lambda _: "card:1")
    assert rendezvous.use_interface("10.9.9.1") == rendezvous.use_interface("10.9.9.1") == "card:1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "card:1"


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:70000", "a..b:29500", f"{'x' * 70}:29500", ":29500"]
)
def test_a_head_that_cannot_be_an_address_and_a_port_is_one_line(text):
    with pytest.raises(UserError, match=r"^HEAD=.* is not valid; use address:port, for example"):
        addresses.parse_endpoint(text)


def test_a_name_that_means_the_loopback_interface_is_refused_if_others_must_connect(monkeypatch):
    """Debian and Ubuntu give a machine's own name 127.0.1.1 in /etc/hosts."""
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert addresses.resolve("node-1", "HEAD=node-1:29500", other_machines=False) == "127.0.1.1"
    assert addresses.resolve("127.0.1.1", "", other_machines=True) == "127.0.1.1"
    with pytest.raises(UserError, match=r"^HEAD=node-1:29500: node-1 is 127.0.1.1 on this machine"):
        addresses.resolve("node-1", "HEAD=node-1:29500", other_machines=True)


def test_on_a_trusted_network_rank_0_may_have_an_address_that_only_others_see(monkeypatch):
    monkeypatch.setenv("TRUSTED_NETWORK", "1")
    assert addresses.resolve("8.8.8.8", "", other_machines=True) == "8.8.8.8"
    [port] = free_ports(1)
    with addresses.listen("192.0.2.7", port, "") as listener:
        assert listener.getsockname() == ("0.0.0.0", port)


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1", "another process of this machine uses the port"), ("192.0.2.7", "this machine does not have")],
)
def test_tandem_train_ends_with_2_and_one_line(host, reason, tmp_path, corpus):
    tree = two_phase_config("btlm", corpus, tmp_path / "runs")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with socket.create_server(("127.0.0.1", 0)) as another_run:
        port = str(another_run.getsockname()[1])
        launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": port}
        rank = fork_tandem(["train", tmp_path / "config.yaml"], log=tmp_path / "log", environment=launch)
        assert wait_for_exit(rank) == 2
    [line] = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(f"tandem: MASTER_ADDR={host} MASTER_PORT={port}: {reason}")


def test_a_port_that_torchrun_chose_is_chosen_again_if_it_is_taken(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tandem")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConnectionError, match="another process"):
        open_store(monkeypatch, "127.0.0.1", taken.getsockname()[1])


def test_plain_torchrun_is_warned_of(monkeypatch, caplog):
    rendezvous.create_store(0, 1, TIMEOUT)
    assert not caplog.text
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a0d0c1a4")
    rendezvous.create_store(1, 1, TIMEOUT)
    assert not caplog.text
    rendezvous.create_store(0, 1, TIMEOUT)
    [record] = caplog.records
    assert "start the ranks with `tandem train --ranks N` or launch/multi_node.sh" in record.message


def test_a_user_can_name_an_interface_that_exists(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME=mine: there is no interface mine; unset it"):
        rendezvous.create_store(0, 1, TIMEOUT)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "mine")])
    rendezvous.create_store(0, 1, TIMEOUT)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    rendezvous.create_store(0, 1, TIMEOUT)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_machine_without_a_loopback_interface_is_refused(monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with pytest.raises(UserError, match="the loopback interface of this machine is down"):
        rendezvous.create_store(0, 1, TIMEOUT)


def test_a_long_wait_is_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(addresses, "WAIT_MESSAGE_SECONDS", 0.01)
    with addresses.waiting_message("for rank 7"):
        wait_until(lambda: caplog.messages)
    assert caplog.messages == ["for rank 7"]


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, {"a": {1}}, Path("a")])
def test_a_value_that_json_would_change_is_not_sent(value):
    with pytest.raises((AssertionError, TypeError)):
        mesh._encode(value)


@pytest.mark.parametrize("value", [None, [1, "é\udc80", 2**64], {"a": [0.1, True]}])
def test_a_value_arrives_as_it_was(value):
    assert mesh._decode(mesh._encode(value)) == value


def test_no_rank_unpickles():
    """Except torchrun's own state, through `StateUnpickler`, and an import's tensors, with `weights_only`."""
    pattern = re.compile(r"import .*pickle|import (marshal|shelve|dill)|_object\(|object_list|torch\.load\b")
    found = {
        file.name for file in TRAINER.rglob("*.py") for line in file.read_text().splitlines() if pattern.search(line)
    }
    assert found == {"agent_rendezvous.py", "weight_files.py"}
    loads = re.findall(r"torch\.load\(.*", (TRAINER / "checkpoint/hf/weight_files.py").read_text())
    assert loads == ['torch.load(path, map_location="cpu", weights_only=True, mmap=True)']
