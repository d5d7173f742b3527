"""Two hosts on one machine: network namespaces joined by a cable, a rank in each, the real launch script."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tandem.trainer.config import load_config
from tandem.trainer.config.flops import num_parameters
from tests.cluster import network_hosts
from tests.cluster.network_hosts import LAUNCH_FOLDER, Host
from tests.ports import free_ports
from tests.promises import conftest
from tests.promises.conftest import fork_tandem, read_step_records, start_command, two_phase_config, wait_for_exit
from tests.timeouts import TEST_TIMEOUT_SECONDS

corpus = conftest.corpus
STEPS = 4
FP32_BYTES = 4
REASON = network_hosts.unsupported_reason()
pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    with network_hosts.connect_hosts("pair") as both:
        yield both


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    """For two data-parallel ranks: in every step each sends half of its gradients and half of the new weights."""
    tree = two_phase_config("btlm", corpus, tmp_path / "runs", steps=STEPS // 2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def test_two_hosts_train_like_one(pair: tuple[Host, Host], config: Path, tmp_path: Path) -> None:
    """The same bits, since two ranks add two numbers; and the gradients have crossed the cable."""
    before = {host: host.sent_bytes() for host in pair}
    log, [port] = tmp_path / "network_hosts.log", free_ports(1)
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["train", config, "run.name=one"]
    with log.open("wb") as written:
        launchers = [host.start_launcher(config, written, "run.name=two") for host in pair]
        alone = [
            fork_tandem(command, log=tmp_path / "one.log", environment={**launch, "RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"
        ]
        assert [wait_for_exit(rank) for rank in alone] == [0, 0], (tmp_path / "one.log").read_text()
        codes = [launcher.wait(TEST_TIMEOUT_SECONDS) for launcher in launchers]
    assert codes == [0, 0], log.read_text()
    model = load_config(config).model
    for host in pair:
        assert host.sent_bytes() - before[host] > STEPS * FP32_BYTES * num_parameters(model), (
            f"{host} has sent too little"
        )
    one, two = (read_step_records(config.parent / "runs" / name) for name in ("one", "two"))
    assert sorted(two) == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        assert [two[step][name] for step in sorted(two)] == [one[step][name] for step in sorted(one)], name


@pytest.mark.parametrize(
    ("variables", "said", "code"),
    [
        ({"NODES": "two"}, "NODES=two is not valid; use a number of machines or FEWEST:MOST", 2),
        ({"HEAD": "nowhere.invalid:29500"}, "HEAD=nowhere.invalid:29500 cannot be reached from this machine", 1),
        ({"HEAD": "10.0.0.1"}, "HEAD=10.0.0.1 is not valid; use address:port", 2),
        ({"HEAD": "0.0.0.0:29500"}, "HEAD=0.0.0.0:29500: 0.0.0.0 names no machine", 2),
        ({"HEAD": "8.8.8.8:29500"}, "HEAD=8.8.8.8:29500: 8.8.8.8 is a public address", 2),
        ({"NODES": "2:3"}, "is not divisible by the data-parallel size 3", 2),
        (
            {"NODES": "3:2"},
            "NODE=0 NODES=3:2 is not valid; use NODE from 0 to NODES - 1 (or MOST - 1), and FEWEST from 1 to MOST",
            2,
        ),
        ({"NODE": "2"}, "NODE=2 NODES=2 is not valid; use NODE from 0 to NODES - 1", 2),
        ({"NODE": "first"}, "NODE=first is not valid; use a whole number", 2),
        ({"NODE": "08"}, "NODE=08 is not valid; use a whole number", 2),
        ({"NODES": "2:"}, "NODES=2: is not valid; use a number of machines or FEWEST:MOST", 2),
        ({"JOIN_SECONDS": "0"}, "JOIN_SECONDS=0 is not valid; use a whole number of at least 1", 2),
        ({"LOST_SECONDS": "1m"}, "LOST_SECONDS=1m is not valid; use a whole number", 2),
        ({"RANKS_PER_NODE": "auto"}, "RANKS_PER_NODE=auto is not a number of ranks per machine; use a whole number", 2),
    ],
)
def test_a_mistake_is_one_line_before_any_rank_is_started(variables, said, code, config):
    """Also where it concerns a number of machines that the run would come down to later."""
    rightly = {"HEAD": "127.0.0.1:29500", "NODES": "2", "NODE": "0", "RANKS_PER_NODE": "1"}
    with start_command([LAUNCH_FOLDER / "multi_node.sh", config], **rightly | variables) as process:
        words = process.communicate(timeout=TEST_TIMEOUT_SECONDS)[0]
    assert process.returncode == code
    assert said in words
    assert len(words.splitlines()) == 1


def test_every_variable_of_the_script_stands_in_the_words_that_it_says_of_itself() -> None:
    script = LAUNCH_FOLDER / "multi_node.sh"
    words = subprocess.run(["bash", script], capture_output=True, text=True).stderr
    read = set(re.findall(r"\$\{([A-Z_]+):-", script.read_text())) - {"BASH_VERSION"}
    assert len(read) > 5
    assert [name for name in read if f"# {name} " not in words] == []
