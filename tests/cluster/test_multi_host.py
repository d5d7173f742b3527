"""Two hosts on one machine: network namespaces joined by a cable, a rank in each, the real launch script."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = {"tandem-a": "10.77.0.1", "tandem-b": "10.77.0.2"}
CABLE = "veth-tandem"
STEPS = 3
TIMEOUT_SECONDS = 240


def missing() -> str | None:
    if shutil.which("ip") is None:
        return "ip is not installed (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
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


def environment(**extra: str) -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Part of the standard library as tokens."""
    folder = tmp_path_factory.mktemp("corpus") / "prepared"
    prepare = [sys.executable, "-m", "trainer", "prepare", "--workers", "1", "--vocab", "1000"]
    source = [str(Path(json.__file__).parent), str(Path(contextlib.__file__).parent / "email")]
    subprocess.run(
        [*prepare, "--held-out", "0.1", "--input", *source, "--output", str(folder)],
        cwd=ROOT, env=environment(), check=True, timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    return folder


def overrides(corpus: Path, root: Path, tp_size: int) -> list[str]:
    return [
        f"data.sources.corpus={corpus}", f"run.root={root}", f"run.stop_step={STEPS}",
        f"parallel.tp_size={tp_size}",
        "evaluate.every_steps=0", "checkpoint.every_steps=0", "log.wandb=disabled",
    ]  # fmt: skip


def sent_bytes(host: str) -> int:
    (link,) = json.loads(ip("-n", host, "-json", "-statistics", "link", "show", CABLE))
    return int(link["stats64"]["tx"]["bytes"])


def steps(root: Path) -> list[tuple[int, float, float]]:
    lines = (root / "demo-btlm" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in records if r["kind"] == "step"]


def run_on_both_hosts(arguments: list[str]) -> None:
    """Returns when both launchers have ended with 0; ends them if not all do in time."""
    running = []
    try:
        for node, host in enumerate(HOSTS):
            environ = environment(
                HEAD=f"{HOSTS['tandem-a']}:29577", NODES="2", NODE=str(node), RANKS_PER_NODE="1",
                GLOO_SOCKET_IFNAME=CABLE,
            )  # fmt: skip
            command = ["ip", "netns", "exec", host, str(ROOT / "launch" / "multi_node.sh"), *arguments]
            running.append(subprocess.Popen(command, env=environ, text=True, start_new_session=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], "\n\n".join(outputs)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_two_hosts_train_like_one(hosts: None, corpus: Path, tmp_path: Path, tp_size: int) -> None:
    """The same bits, since two ranks add two numbers; and the gradients have crossed the cable."""
    config = "configs/demo-btlm.yaml"
    alone = [str(ROOT / "launch" / "local.sh"), "2", config, *overrides(corpus, tmp_path / "one", tp_size)]
    subprocess.run(alone, env=environment(), check=True, timeout=TIMEOUT_SECONDS)

    before = {host: sent_bytes(host) for host in HOSTS}
    run_on_both_hosts([config, *overrides(corpus, tmp_path / "two", tp_size)])
    for host in HOSTS:
        assert sent_bytes(host) - before[host] > STEPS * 1_000_000, (
            f"{host} has sent too little for {STEPS} steps"
        )

    assert len(steps(tmp_path / "two")) == STEPS
    assert steps(tmp_path / "two") == steps(tmp_path / "one")
