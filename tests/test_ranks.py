"""The launcher of the multi-process tests: what it promises to them."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests import ranks

pytestmark = pytest.mark.dist


def sum_of_ranks(offset: int) -> tuple[float, str, int, bool]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value.item(), os.environ["LOCAL_RANK"], torch.get_num_threads(), "megatron" in sys.modules


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the second rank is unhappy")
    dist.barrier()


def hang_on_rank_one() -> None:
    while dist.get_rank() == 1:
        time.sleep(0.1)


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def test_results_come_back_by_rank_from_one_process_group(tmp_path):
    assert ranks.run(sum_of_ranks, 2, tmp_path, 10) == [(21.0, "0", 1, False), (21.0, "1", 1, False)]


def test_one_folder_serves_two_worlds(tmp_path):
    for world_size in (1, 2):
        assert len(ranks.run(sum_of_ranks, world_size, tmp_path, 0)) == world_size


def test_traceback_of_the_failing_rank_is_shown(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*fail_on_rank_one.*the second rank is unhappy"):
        ranks.run(fail_on_rank_one, 2, tmp_path)


def test_hanging_rank_is_killed_in_time_and_its_stack_shown(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 gave no result.*limit 10 s.*in hang_on_rank_one"):
        ranks.run(hang_on_rank_one, 2, tmp_path, timeout_seconds=10)
    assert time.monotonic() - start < 20


def test_rank_that_dies_without_a_word_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 1 gave no result \(exit code 7"):
        ranks.run(die_on_rank_one, 2, tmp_path)
