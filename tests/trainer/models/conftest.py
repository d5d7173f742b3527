"""A fixture that pretends to be any rank of any world, in one process."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tandem.trainer.distributed.mesh import Mesh, mesh_context


@pytest.fixture(scope="session")
def pretended() -> Callable[[int, int], AbstractContextManager[Mesh]]:
    """pretended(tp_rank, tp_size) is the mesh of one rank, in a process group whose collectives do nothing."""

    @contextmanager
    def place(tp_rank: int, tp_size: int) -> Iterator[Mesh]:
        dist.init_process_group("fake", store=FakeStore(), rank=tp_rank, world_size=tp_size)
        try:
            with mesh_context(tp_size) as mesh:
                assert (mesh.tp_rank, mesh.tp_size) == (tp_rank, tp_size)
                yield mesh
        finally:
            dist.destroy_process_group()

    return place
