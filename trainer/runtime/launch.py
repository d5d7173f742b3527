"""Who started this process, and which ranks, GPUs and threads it has.

`read_launch` decides all of this from the environment. The rest of the program reads its answer and none of the variables.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tandem.trainer.config import UserError
from tandem.trainer.runtime.processors import threads_per_rank, usable_processors

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
"""Rank, number of ranks and local rank in a task of srun."""
MPI_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
    "PALS_SIZE": "PALS_RANKID",
}
"""Number of ranks and rank of Open MPI, of MVAPICH2, of MPICH, Intel MPI and Flux, of IBM's jsrun, and of HPE's mpiexec."""
MACHINE_COUNTS = ("SKYPILOT_NUM_NODES", "AZUREML_NODE_COUNT", "PBS_NUM_NODES", "NHOSTS")
"""Number of machines of a job of SkyPilot, Azure ML, Torque and Grid Engine."""
MACHINE_FILES = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "OAR_NODEFILE")
"""Name a file with a line for each processor of the job, which starts with the machine: PBS, LSF and OAR."""
INTERACTIVE_STEP = "4294967290"
"""SLURM_STEP_ID in the shell of salloc. Source: SLURM_INTERACTIVE_STEP in slurm.h."""
HIDES_ALL_GPUS = ("", "-1", "NoDevFiles", "none", "void")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs on purpose. Slurm sets NoDevFiles in a step without GPUs."""
ONE_MACHINE = "or give --ranks to start ranks on this machine only"


@dataclass(frozen=True)
class Launch:
    """What the environment states about this process."""

    launcher: str | None
    """torchrun, deepspeed, srun or "another launcher"; None if this process is not a rank of a launcher."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """The largest number of ranks on one machine."""
    num_gpus: int | None
    """GPUs of this machine. None if it has some, but does not show how many."""
    num_devices: int
    """GPUs that CUDA_VISIBLE_DEVICES leaves to this process."""
    hidden_by: str | None
    """The value of CUDA_VISIBLE_DEVICES if it hides all GPUs of this machine."""
    processors: int
    """Processors that this process may use."""
    num_threads: int
    """Threads of each rank."""
    refusal: str | None
    """Why `tandem train` cannot start here. Without a launcher, --ranks overrides it."""

    def describe(self) -> str:
        """Describe the launch in one line."""
        each = " each" if self.world_size > 1 else ""
        place = (
            "on this machine"
            if self.world_size == self.local_world_size
            else f"in all, {self.local_world_size} per machine"
        )
        devices = f"1 GPU{each}" if self.num_devices else "on the CPU"
        if self.num_devices > self.local_world_size:
            devices += f" ({self.num_devices - self.local_world_size} of {self.num_devices} unused)"
        if self.hidden_by is not None:
            devices += f" (CUDA_VISIBLE_DEVICES={self.hidden_by} hides the GPUs)"
        ranks, threads = _count(self.world_size, "rank"), _count(self.num_threads, "thread")
        return f"{self.launcher or 'no launcher'}, {ranks} {place}, {devices}, {threads}{each}"


def current_launch() -> Launch:
    """Decide the launch of this process. Raises: UserError as `read_launch` does."""
    return read_launch(os.environ, num_gpus=find_gpus(), processors=usable_processors(), has_terminal=os.isatty(0))


def read_launch(
    environment: Mapping[str, str], *, num_gpus: int | None, processors: int, has_terminal: bool = False
) -> Launch:
    """Decide who launched this process, and what it has. An empty variable counts as not set.

    Raises: UserError if variables contradict each other or are not numbers, or if mpirun started several processes.
    """
    given = {name: value for name, value in environment.items() if value}
    launcher = _find_launcher(given, has_terminal)
    rank, world_size, local_rank = 0, 1, 0
    if launcher:
        names = SLURM_VARIABLES if launcher == "srun" else RANK_VARIABLES
        rank, world_size, local_rank = (_number(given, name) for name in names)
        if rank >= world_size:
            raise UserError(f"{names[0]}: {rank} is not below {names[1]}={world_size}; correct or unset both")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    num_devices = count_visible(visible, num_gpus)
    is_hidden = num_gpus != 0 and not num_devices
    if is_hidden and visible is not None and visible.strip() not in HIDES_ALL_GPUS:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: {visible} names no GPU of this machine, so CUDA would show none; list each index once, as "
            "in 0,1, or set it to nothing to train on the CPU"
        )
    local_world_size = _local_world_size(given, launcher, world_size, num_devices)
    if not local_rank < local_world_size <= world_size:
        raise UserError(
            f"local rank {local_rank} of {local_world_size} does not fit into {world_size} ranks; correct or unset the "
            "variables of the launcher"
        )
    if "OMP_NUM_THREADS" in given:  # OpenMP accepts a number for each level of nesting
        threads = _number({"OMP_NUM_THREADS": given["OMP_NUM_THREADS"].split(",")[0]}, "OMP_NUM_THREADS", least=1)
    else:
        threads = threads_per_rank(local_world_size, given, processors, is_slurm_task=launcher == "srun")
    return Launch(
        launcher, rank, world_size, local_rank, local_world_size, num_gpus, num_devices, visible if is_hidden else None,
        processors, threads,
        _launcher_refusal(given, launcher, world_size, local_rank, num_devices) if launcher else _machines_refusal(given),
    )  # fmt: skip


def ranks_to_start(launch: Launch, requested: int | None, tp_size: int) -> int:
    """Return how many ranks `tandem train` must start on this machine, or 0 if this process itself is a rank.

    Without `requested`, there is one rank per GPU, or `tp_size` ranks without a GPU.
    Raises: UserError if it can start none.
    """
    if requested is None:
        if launch.refusal:
            raise UserError(launch.refusal)
        num_ranks = launch.num_devices or tp_size
        return 0 if launch.launcher or num_ranks == 1 else num_ranks
    if requested < 1:
        raise UserError(f"--ranks: {requested} is less than 1; use 1 or more")
    if launch.launcher:
        remedy = "leave out --ranks, or start the command without a launcher"
        raise UserError(f"--ranks: {launch.launcher} has already started {_count(launch.world_size, 'rank')}; {remedy}")
    if launch.num_gpus is not None and 0 < launch.num_devices < requested:
        raise UserError(
            f"--ranks: {requested} is more than the {_count(launch.num_devices, 'GPU')} that this process may use; start one "
            "rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return requested


def set_num_threads(environment: MutableMapping[str, str], launch: Launch, num_ranks: int) -> None:
    """Set OMP_NUM_THREADS if it is not set, for this rank or for `num_ranks` to start. Call this before torch is imported."""
    if not environment.get("OMP_NUM_THREADS"):
        threads = threads_per_rank(num_ranks, environment, launch.processors) if num_ranks else launch.num_threads
        environment["OMP_NUM_THREADS"] = str(threads)


def is_later_rank() -> bool:
    """Whether rank 0 usually meets the same error as this process."""
    try:
        return current_launch().rank > 0
    except UserError:
        return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") != "0"


def find_gpus(root: Path = Path("/")) -> int | None:
    """Count this machine's NVIDIA GPUs by their files below `root`, without importing torch.

    Files that this process may not open are not counted: Slurm and container runtimes deny access to other jobs' GPUs.
    Some sandboxes have device files but nothing in /proc. WSL has a single /dev/dxg for all GPUs, which gives None.
    """
    if files := list(root.glob("dev/nvidia[0-9]*")):
        return sum(os.access(file, os.R_OK | os.W_OK) for file in files)
    if gpus := list(root.glob("proc/driver/nvidia/gpus/*")):
        return len(gpus)
    return None if any((root / name).exists() for name in ("dev/nvidiactl", "dev/dxg")) else 0


def count_visible(visible: str | None, num_gpus: int | None) -> int:
    """Return how many of the machine's GPUs CUDA shows if CUDA_VISIBLE_DEVICES has this value.

    CUDA stops at the first entry that is not a GPU, and shows none if an entry is repeated. It shows only one MIG instance.
    Source: `_parse_visible_devices` in torch/cuda/__init__.py; CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    if visible is None or num_gpus == 0:
        return 1 if num_gpus is None else num_gpus
    entries = visible.split(",")
    if prefix := next((prefix for prefix in ("GPU-", "MIG-") if visible.startswith(prefix)), None):
        names = list(takewhile(lambda entry: entry.startswith(prefix), entries))
        num_found = len(names[: 1 if prefix == "MIG-" else num_gpus])
        return num_found if len(set(names)) == len(names) else 0
    numbers = (
        re.match(r"\s*([+-]?\d+)", entry) for entry in entries
    )  # like C's strtoul, which ignores text after a number
    indices = list(takewhile(lambda index: index >= 0, (int(number[1]) if number else -1 for number in numbers)))
    num_found = len(list(takewhile(lambda index: num_gpus is None or index < num_gpus, indices)))
    return num_found if len(set(indices)) == len(indices) else 0


def _find_launcher(given: Mapping[str, str], has_terminal: bool) -> str | None:
    """Return the launcher of which this process is a rank, or None.

    Notebooks, schedulers and interactive shells leave variables of a single rank, or of machines instead of ranks. They have
    not launched this process.
    """
    for launcher, mark in (("torchrun", "TORCHELASTIC_RUN_ID"), ("deepspeed", "CROSS_RANK")):
        if mark in given and "RANK" in given:
            return launcher
    num_tasks = _number(given, "SLURM_STEP_NUM_TASKS", "1") if "SLURM_PROCID" in given else 1
    has_ranks = all(name in given for name in RANK_VARIABLES)
    for name, rank_name in MPI_VARIABLES.items():
        size, is_task = _number(given, name, "1"), given.get(rank_name) == given.get("SLURM_PROCID")
        if size > 1 and not has_ranks and not (size == num_tasks and is_task):  # srun sets PMI_SIZE too
            raise UserError(
                f"{name}: mpirun started {size} processes, but its variables are not read; start the ranks with "
                "torchrun or srun, or set RANK, WORLD_SIZE and LOCAL_RANK"
            )
    if num_tasks > 1 or given.get("TANDEM_LAUNCHER") == "srun":
        for name, of_srun in zip(RANK_VARIABLES, SLURM_VARIABLES, strict=True):
            if name in given and _number(given, name) != _number(given, of_srun):
                raise UserError(
                    f"{name}: {given[name]} contradicts {of_srun}={given[of_srun]}; unset {name}, or unset SLURM_PROCID if "
                    "srun did not start this rank"
                )
        return None if has_terminal else "srun"
    for name, other, alone in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if name in given and other not in given and given[name] != alone:
            raise UserError(f"{name}: it is {given[name]}, but {other} is not set; unset {name}, or set both")
    return "another launcher" if has_ranks and _number(given, "WORLD_SIZE") > 1 else None


def _local_world_size(given: Mapping[str, str], launcher: str | None, world_size: int, num_devices: int) -> int:
    if launcher == "srun":
        nodes = given.get("SLURM_STEP_TASKS_PER_NODE", str(world_size))  # for example 8(x2),4
        if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", nodes):
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE: {nodes} is not a list such as 8(x2),4; start the ranks with srun"
            )
        return max(int(tasks.split("(")[0]) for tasks in nodes.split(","))
    name = next(
        (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if launcher and name in given), None
    )  # LOCAL_SIZE: deepspeed
    if name:
        return _number(given, name)
    return min(world_size, num_devices) if num_devices > 1 else world_size


def _launcher_refusal(
    given: Mapping[str, str], launcher: str, world_size: int, local_rank: int, num_devices: int
) -> str | None:
    if world_size > 1 and (
        missing := next((name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given), None)
    ):
        remedy = "set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there"
        return f"{missing}: not set, so the {world_size} ranks cannot find each other; {remedy}"
    gpus = re.search(r"(?:^|:)(\d+)$", given.get("SLURM_GPUS_PER_TASK", ""))  # in h100:2 and 2, but not in h100
    if launcher == "srun" and gpus and int(gpus[1]) > 1:
        return f"SLURM_GPUS_PER_TASK: {gpus[1]} is more than a rank can use; start srun with --gpus-per-task=1"
    if 1 < num_devices <= local_rank:
        remedy = "start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        return f"LOCAL_RANK: {local_rank} has no GPU, because this process may use {num_devices}; {remedy}"
    return None


def _machines_refusal(given: Mapping[str, str]) -> str | None:
    """Return why starting the ranks of this machine only would be a mistake: the job has several machines or tasks."""
    if "SLURM_PROCID" in given and (num_tasks := _number(given, "SLURM_STEP_NUM_TASKS", "1")) > 1:
        remedy = "start the run with srun without --pty"
        return f"SLURM_STEP_NUM_TASKS: srun started {num_tasks} tasks, but only one has this terminal; {remedy}, {ONE_MACHINE}"
    is_step = "SLURM_STEP_NUM_TASKS" in given and given.get("SLURM_STEP_ID") != INTERACTIVE_STEP
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        if not is_step and (machines := _number(given, name, "1")) > 1:
            remedy = "use launch/slurm/run.sh of the repository, which starts ranks on all of them with srun"
            return f"{name}: the job has {machines} nodes, but this shell is on one; {remedy}, {ONE_MACHINE}"
    # Kubeflow and others number machines in RANK and WORLD_SIZE; PET_NNODES may be a range; SM_HOSTS is SageMaker's JSON list.
    counts = {
        "WORLD_SIZE": given.get("WORLD_SIZE", "1"),
        "PET_NNODES": given.get("PET_NNODES", "1").split(":")[-1],
        "SM_HOSTS": str(given.get("SM_HOSTS", "").count(",") + 1),
        "NUM_NODES": given.get("NUM_NODES", "1") if "NODE_RANK" in given else "1",  # RunPod
        **{name: given.get(name, "1") for name in MACHINE_COUNTS},
        **{name: str(_count_machines(given[name])) for name in MACHINE_FILES if name in given},
    }
    for name in counts:
        if (machines := _number(counts, name)) > 1:
            remedy = "start launch/multi_node.sh of the repository on each"
            return f"{name}: the job has {machines} machines, but no launcher started ranks on them; {remedy}, {ONE_MACHINE}"
    return None


def _count_machines(file: str) -> int:
    try:
        return len({line.split()[0] for line in Path(file).read_text().splitlines() if line.strip()})
    except (OSError, ValueError):  # an old variable, or a job whose other machines do not have the file
        return 1


def _number(given: Mapping[str, str], name: str, default: str | None = None, *, least: int = 0) -> int:
    value = given.get(name, default)
    if value is None:
        raise UserError(f"{name}: not set, but other variables of its launcher are; set it, or unset the others")
    if not re.fullmatch(r"\s*\d{1,9}\s*", value, re.ASCII) or int(value) < least:
        raise UserError(f"{name}: {value!r} is not a whole number of at least {least}; correct or unset it")
    return int(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
