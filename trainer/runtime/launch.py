"""Who started this process, and which ranks and GPUs it has."""

import os
from itertools import takewhile
from pathlib import Path


def num_gpus(root: Path = Path("/")) -> int:
    """Count this machine's visible NVIDIA GPUs by their files below `root`, without importing torch.

    GPUs that a container is not allowed to open are counted too. Some sandboxes have device files but nothing in /proc. WSL has
    a single /dev/dxg for all GPUs, which counts as one.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return len(list(takewhile(lambda name: name and not name.startswith("-"), names)))  # CUDA stops at -1 as well
    for pattern in ("dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*"):
        if found := list(root.glob(pattern)):
            return len(found)
    return int(any((root / name).exists() for name in ("dev/nvidiactl", "dev/dxg")))


def is_launched() -> bool:
    """Whether torchrun, deepspeed or srun started this process."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def launch_environment() -> dict[str, int]:
    """Return rank, world_size and local_rank from torchrun, deepspeed or srun, or 0, 1 and 0 without a launcher."""
    names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        names = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
    defaults = {"rank": 0, "world_size": 1, "local_rank": 0}
    return {key: int(os.environ.get(name, defaults[key])) for key, name in names.items()}


def max_local_world_size() -> int:
    """Return the largest number of ranks that this launch has on one machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):  # torchrun, deepspeed, srun
        if given := os.environ.get(name):
            return max(int(nodes.split("(")[0]) for nodes in given.split(","))  # Slurm writes 8(x2),4
    return int(os.environ.get("WORLD_SIZE", 1))
