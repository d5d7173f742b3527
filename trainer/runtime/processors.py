"""How many processors this process may use, and how many threads each rank gets. Imports only the standard library.

launch/env.sh runs this file to set OMP_NUM_THREADS: `python3 -I processors.py RANKS`.
"""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

MAX_THREADS_PER_RANK = 8
"""More do not help while GPUs do the work."""


def usable_processors(root: Path = Path("/")) -> int:
    """Return the processors that the affinity, the CPU quotas of cgroups and Slurm leave to this process, at least 1."""
    share = os.environ.get("SLURM_CPUS_ON_NODE", "")  # not every Slurm binds processes to their share
    limits = [len(os.sched_getaffinity(0)), *_cgroup_limits(root), int(share) if share.isdecimal() else math.inf]
    return max(1, int(min(limits)))


def threads_per_rank(
    num_ranks: int, environment: Mapping[str, str], processors: int, *, is_slurm_task: bool = False
) -> int:
    """Return an equal share of the processors for each of this machine's ranks, from 1 to MAX_THREADS_PER_RANK.

    No rank gets more than SLURM_CPUS_PER_TASK. The processors of a task of srun are its own and are not shared out again.
    """
    task_share = environment.get("SLURM_CPUS_PER_TASK", "")
    limit = int(task_share) if task_share.isdecimal() else MAX_THREADS_PER_RANK
    share = processors if is_slurm_task and task_share.isdecimal() else processors // num_ranks
    return max(1, min(share, limit, MAX_THREADS_PER_RANK))


def _cgroup_limits(root: Path) -> Iterator[float]:
    """Yield the CPU quota, in processors, of each cgroup around this process that has one.

    Source: cgroups(7) and the kernel's Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (v1).
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # In a container, the path may be the host's, and then only the mount itself exists.
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents[: len(folder.parts) - len(mount.parts)]):
            files = [group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"] if controllers else [group / "cpu.max"]
            try:
                quota, period = " ".join(file.read_text() for file in files).split()
            except OSError:
                continue
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


if __name__ == "__main__":
    print(threads_per_rank(int(sys.argv[1]), os.environ, usable_processors()))
