"""Two hosts on one machine: network namespaces joined by a cable, a rank in each, the real launch script."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.promises import conftest
from tests.promises.conftest import begun, steps_of, two_phases
from trainer.config import load
from trainer.costs import parameters

LAUNCH = Path(__file__).parents[2] / "launch"
HOSTS = {"tandem-a": "10.77.0.1", "tandem-b": "10.77.0.2"}
CABLE = "veth-tandem"
corpus = conftest.corpus
STEPS = 4
TIMEOUT_SECONDS = 150
FP32_BYTES = 4


def missing() -> str | None:
    """What this machine cannot do; a root without `ip` can install it: that is a failure, not a skip."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return None
    tried = subprocess.run(["ip", "netns", "add", "tandem-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "tandem-probe"], capture_output=True)
    return None if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


REASON = missing()
pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_SECONDS),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


def ip(*arguments: str) -> str:
    assert shutil.which("ip"), "ip is not installed; apt-get install iproute2 (launch/test.sh does that)"
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Both namespaces, each with a loopback and its end of the cable; nothing else leads out of them."""
    with contextlib.ExitStack() as undo:
        for host in HOSTS:
            ip("netns", "add", host)
            undo.callback(ip, "netns", "delete", host)
        first, second = HOSTS
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", CABLE, "up")
        yield


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    """For two data-parallel ranks: in every step each sends half of its gradients and half of the new weights."""
    tree = two_phases("btlm", corpus, tmp_path / "runs", steps=STEPS // 2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def sent_bytes(host: str) -> int:
    (link,) = json.loads(ip("-n", host, "-json", "-statistics", "link", "show", CABLE))
    return int(link["stats64"]["tx"]["bytes"])


def on_host(node: int, config: Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    host = list(HOSTS)[node]
    return begun(
        ["ip", "netns", "exec", host, LAUNCH / "multi_node.sh", config, "run.name=two"],
        HEAD=f"{HOSTS['tandem-a']}:29577", NODES="2", NODE=str(node), RANKS_PER_NODE="1", GLOO_SOCKET_IFNAME=CABLE,
    )  # fmt: skip


def test_two_hosts_train_like_one(hosts: None, config: Path) -> None:
    """The same bits, since two ranks add two numbers; and the gradients have crossed the cable."""
    before = {host: sent_bytes(host) for host in HOSTS}
    one_host = [LAUNCH / "local.sh", "2", config, "run.name=one"]
    with begun(one_host) as alone, on_host(0, config) as head, on_host(1, config) as other:
        for process in (alone, head, other):
            said, _ = process.communicate(timeout=TIMEOUT_SECONDS)
            assert process.returncode == 0, said
    model = load(config).model
    for host in HOSTS:
        assert sent_bytes(host) - before[host] > STEPS * FP32_BYTES * parameters(model), f"{host} has sent too little"
    one, two = (steps_of(config.parent / "runs" / name) for name in ("one", "two"))
    assert sorted(two) == list(range(1, STEPS + 1))
    for name in ("loss", "gradient_norm"):
        assert [two[step][name] for step in sorted(two)] == [one[step][name] for step in sorted(one)], name
