"""Process groups exist only inside the block that creates them."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tandem.trainer.distributed.mesh import mesh_context, process_groups
from tests import ranks

SOON_SECONDS = 10.0


def in_and_out(times: int) -> list[tuple[bool, int, int]]:
    """For each block, return: whether the old groups are restored, the number of groups created, and the threads left over."""
    found = []
    for _ in range(times):
        before, threads = process_groups(), num_threads()
        with mesh_context(2):
            more = len(process_groups() - before)
            dist.barrier()  # a rank that exits early would break connections that another is still making
        deadline = time.monotonic() + SOON_SECONDS
        # The first block starts threads that stay; an ended thread is still listed for a moment.
        while found and num_threads() > threads and time.monotonic() < deadline:
            time.sleep(0.01)
        found.append((process_groups() == before, more, num_threads() - threads))
    return found


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.dist
def test_groups_and_their_threads_are_gone_after_the_block(tmp_path):
    for found in ranks.run(in_and_out, 2, tmp_path, 3):
        assert all(same and more > 0 for same, more, _ in found)
        assert [threads for *_, threads in found[1:]] == [0, 0]
