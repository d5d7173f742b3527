"""The launcher of the multi-process tests: what it promises to them."""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from tandem.kernels.swiglu import swiglu
from tests import ranks

pytestmark = pytest.mark.dist
SEEN = "TANDEM_TEST_SEEN"
left_behind: list[str] = []


def sum_of_ranks(offset: int) -> tuple[float, str, int]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value.item(), os.environ["LOCAL_RANK"], torch.get_num_threads()


def facts() -> dict[str, Any]:
    """What a rank finds; then it leaves marks in this module, in one of the server's and in the environment."""
    found = {
        "environment": os.environ.get(SEEN),
        "marks": left_behind + getattr(torch, SEEN, []),
        "draws": (torch.rand(()).item(), numpy.random.rand(), random.random()),
        "server": sys.modules["tests.forkserver_preload"].SERVER_PID,
        "parent": os.getppid(),
        "threads of the parent": len(os.listdir(f"/proc/{os.getppid()}/task")),
        "annotation": kind_of_error(lambda: swiglu(torch.zeros(3, 5))),
    }
    left_behind.append("in this module")
    setattr(torch, SEEN, ["in the server's"])
    os.environ[SEEN] = "left behind"
    return found


def kind_of_error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "none"


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the second rank is unhappy")
    dist.barrier()


def hang_on_rank_one(folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    while dist.get_rank() == 1:
        time.sleep(0.1)


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def test_results_come_back_by_rank_from_one_process_group(tmp_path):
    assert ranks.run(sum_of_ranks, 2, tmp_path, 10) == [(21.0, "0", 1), (21.0, "1", 1)]


def test_one_folder_serves_two_worlds(tmp_path):
    for world_size in (1, 2):
        assert len(ranks.run(sum_of_ranks, world_size, tmp_path, 0)) == world_size


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> list[list[dict[str, Any]]]:
    """The facts of two worlds in a row; for the second this process's environment is another."""
    folder = tmp_path_factory.mktemp("worlds")
    found = [ranks.run(facts, 2, folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SEEN, "set by the test")
        return [*found, ranks.run(facts, 2, folder)]


def test_every_rank_is_a_fork_of_one_server_that_has_imported_everything(worlds):
    (server,) = {rank["server"] for world in worlds for rank in world}
    assert {rank["parent"] for world in worlds for rank in world} == {server}
    assert server != os.getpid()
    assert {rank["threads of the parent"] for world in worlds for rank in world} == {1}, "a fork would lose the others"


def test_worlds_share_no_state(worlds):
    assert [rank["marks"] for world in worlds for rank in world] == [[]] * 4


def test_no_two_ranks_draw_alike_without_a_seed(worlds):
    for draws in zip(*(rank["draws"] for world in worlds for rank in world), strict=True):
        assert len(set(draws)) == 4


def test_the_environment_of_the_test_reaches_the_ranks(worlds):
    assert [[rank["environment"] for rank in world] for world in worlds] == [[None] * 2, ["set by the test"] * 2]


def test_annotations_are_checked_in_ranks(worlds):
    assert {rank["annotation"] for world in worlds for rank in world} == {"TypeCheckError"}


def test_traceback_of_the_failing_rank_is_shown(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*fail_on_rank_one.*the second rank is unhappy"):
        ranks.run(fail_on_rank_one, 2, tmp_path)


def test_hanging_rank_is_killed_in_time_and_its_stack_shown(tmp_path):
    """And no process outlives the call."""
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 gave no result.*limit 10 s.*in hang_on_rank_one"):
        ranks.run(hang_on_rank_one, 2, tmp_path, tmp_path, timeout_seconds=10)
    assert time.monotonic() - start < 20
    processes = [Path("/proc") / file.stem for file in tmp_path.glob("*.pid")]
    assert len(processes) == 2
    assert not any(process.exists() for process in processes)


def test_rank_that_dies_without_a_word_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 1 gave no result \(exit code 7"):
        ranks.run(die_on_rank_one, 2, tmp_path)
