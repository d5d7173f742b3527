"""The environments that launchers, schedulers, containers and notebooks leave, and what is decided in each."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from tandem.trainer.config import UserError
from tandem.trainer.distributed.mesh import check_own_devices
from tandem.trainer.runtime import launch, process, processors

ROOT = Path(__file__).parents[3]
TORCHRUN = "TORCHELASTIC_RUN_ID=x MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
DEEPSPEED = "CROSS_RANK=0 CROSS_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
ADDRESS = "MASTER_ADDR=10.0.0.1 MASTER_PORT=29500"
JOB = "SLURM_JOB_ID=7 SLURM_NTASKS=8"
TASK = f"{JOB} SLURM_STEP_ID=0 SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=16 SLURM_STEP_NUM_NODES=2"
ONE_TASK = f"{JOB} SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1"
BATCH = f"{JOB} SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0"
SRUN_8 = f"{JOB} SLURM_PROCID=3 SLURM_LOCALID=3 SLURM_STEP_NUM_TASKS=8 SLURM_STEP_TASKS_PER_NODE=8 {ADDRESS}"
ONE_MACHINE = "or give --ranks to start ranks on this machine only"
HIDE = "or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
RUN_SH = f"use launch/slurm/run.sh of the repository, which starts ranks on all of them with srun, {ONE_MACHINE}"
MULTI_NODE = (
    f"but no launcher started ranks on them; start launch/multi_node.sh of the repository on each, {ONE_MACHINE}"
)
MPIRUN = "but its variables are not read; start the ranks with torchrun or srun, or set RANK, WORLD_SIZE and LOCAL_RANK"
NO_ADDRESS = "set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there"
START_8 = "starts 8 ranks, 8 threads each"

# Each row: name, environment, facts and options (the machine has 8 GPUs and 96 processors if they do not differ), decision.
ALONE = [
    ("a plain shell", "", {}, START_8),
    ("a plain shell, tensor parallel 2", "", {"tp_size": 2}, START_8),
    ("one GPU", "", {"gpus": 1}, "no launcher, 1 rank on this machine, 1 GPU, 8 threads"),
    ("no GPU", "", {"gpus": 0}, "no launcher, 1 rank on this machine, on the CPU, 8 threads"),
    ("no GPU, tensor parallel 2", "", {"gpus": 0, "tp_size": 2}, "starts 2 ranks, 8 threads each"),
    ("WSL: GPUs, but not how many", "", {"gpus": None}, "no launcher, 1 rank on this machine, 1 GPU, 8 threads"),
    ("WSL with two GPUs named", "CUDA_VISIBLE_DEVICES=0,1", {"gpus": None}, "starts 2 ranks, 8 threads each"),
    ("--ranks 1", "", {"ranks": 1}, "starts 1 rank, 8 threads each"),
    ("--ranks 0", "", {"ranks": 0}, "refused: --ranks: 0 is less than 1; use 1 or more"),
    (
        "more ranks than GPUs", "CUDA_VISIBLE_DEVICES=0,1", {"ranks": 4},
        f"refused: --ranks: 4 is more than the 2 GPUs that this process may use; start one rank per GPU, {HIDE}",
    ),
]  # fmt: skip
LAUNCHED = [
    (
        "torchrun", f"{TORCHRUN} RANK=0 WORLD_SIZE=8 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8", {},
        "torchrun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "torchrun on several machines", f"{TORCHRUN} RANK=12 WORLD_SIZE=16 LOCAL_RANK=4 LOCAL_WORLD_SIZE=8", {},
        "torchrun, 16 ranks in all, 8 per machine, 1 GPU each, 8 threads each",
    ),
    (
        "torchrun with one rank", f"{TORCHRUN} RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1", {},
        "torchrun, 1 rank on this machine, 1 GPU (7 of 8 unused), 8 threads",
    ),
    (
        "torchrun, which sets one thread", f"{TORCHRUN} RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 OMP_NUM_THREADS=1",
        {"gpus": 0}, "torchrun, 2 ranks on this machine, on the CPU, 1 thread each",
    ),
    (
        "torchrun inside a step of Slurm", f"{TASK} {TORCHRUN} RANK=0 WORLD_SIZE=8 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8", {},
        "torchrun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "torchrun, ranks that see one GPU each",
        f"{TORCHRUN} RANK=3 WORLD_SIZE=8 LOCAL_RANK=3 LOCAL_WORLD_SIZE=8 CUDA_VISIBLE_DEVICES=3", {},
        "torchrun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "torchrun with more ranks than GPUs", f"{TORCHRUN} RANK=3 WORLD_SIZE=4 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4", {"gpus": 2},
        f"refused: LOCAL_RANK: 3 has no GPU, because this process may use 2; start one rank per GPU, {HIDE}",
    ),
    (
        "torchrun and --ranks", f"{TORCHRUN} RANK=0 WORLD_SIZE=8 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8", {"ranks": 8},
        "refused: --ranks: torchrun has already started 8 ranks; leave out --ranks, or start the command without a launcher",
    ),
    (
        "deepspeed", f"{DEEPSPEED} RANK=0 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_SIZE=4", {},
        "deepspeed, 4 ranks on this machine, 1 GPU each (4 of 8 unused), 8 threads each",
    ),
    (
        "deepspeed on two machines", f"{DEEPSPEED} RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_SIZE=8", {},
        "deepspeed, 16 ranks in all, 8 per machine, 1 GPU each, 8 threads each",
    ),
    (
        "deepspeed under srun, one task per machine",
        f"{SRUN_8} {DEEPSPEED} RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_SIZE=8", {},
        "deepspeed, 16 ranks in all, 8 per machine, 1 GPU each, 8 threads each",
    ),
    (
        "another launcher, for example of Azure", f"OMPI_COMM_WORLD_SIZE=8 RANK=1 WORLD_SIZE=8 LOCAL_RANK=1 {ADDRESS}", {},
        "another launcher, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "another launcher on two machines", f"RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 {ADDRESS}", {},
        "another launcher, 16 ranks in all, 8 per machine, 1 GPU each, 8 threads each",
    ),
    (
        "another launcher, no address", "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", {},
        f"refused: MASTER_ADDR: not set, so the 2 ranks cannot find each other; {NO_ADDRESS}",
    ),
    (
        "another launcher, no port", "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=10.0.0.1", {},
        f"refused: MASTER_PORT: not set, so the 2 ranks cannot find each other; {NO_ADDRESS}",
    ),
]  # fmt: skip
SLURM = [
    (
        "srun", f"{TASK} SLURM_STEP_TASKS_PER_NODE=8(x2) SLURM_CPUS_PER_TASK=12 {ADDRESS}", {"processors": 12},
        "srun, 16 ranks in all, 8 per machine, 1 GPU each, 8 threads each",
    ),
    (
        "srun with unequal nodes", f"{TASK} SLURM_STEP_TASKS_PER_NODE=7,8(x1),1 SLURM_CPUS_PER_TASK=4 {ADDRESS}", {},
        "srun, 16 ranks in all, 8 per machine, 1 GPU each, 4 threads each",
    ),
    (
        "srun, no share of processors", f"{TASK} SLURM_STEP_TASKS_PER_NODE=8(x2) {ADDRESS}", {"processors": 40},
        "srun, 16 ranks in all, 8 per machine, 1 GPU each, 5 threads each",
    ),
    (
        "srun on one node, no address", SRUN_8.replace(ADDRESS, ""), {},
        f"refused: MASTER_ADDR: not set, so the 8 ranks cannot find each other; {NO_ADDRESS}",
    ),
    (
        "srun --gpus-per-task=1", f"{SRUN_8} SLURM_GPUS_PER_TASK=1 CUDA_VISIBLE_DEVICES=0", {"gpus": 1},
        "srun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "srun --gpus-per-task=h100", f"{SRUN_8} SLURM_GPUS_PER_TASK=h100 CUDA_VISIBLE_DEVICES=0", {"gpus": 1},
        "srun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "srun --gpus-per-task=h100:2", f"{SRUN_8} SLURM_GPUS_PER_TASK=h100:2 CUDA_VISIBLE_DEVICES=0,1", {"gpus": 2},
        "refused: SLURM_GPUS_PER_TASK: 2 is more than a rank can use; start srun with --gpus-per-task=1",
    ),
    (
        "srun with more tasks than GPUs", SRUN_8, {"gpus": 2},
        f"refused: LOCAL_RANK: 3 has no GPU, because this process may use 2; start one rank per GPU, {HIDE}",
    ),
    (
        "srun --mpi=pmi2", f"{SRUN_8} PMI_RANK=3 PMI_SIZE=8", {},
        "srun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "srun without GPUs", f"{SRUN_8} CUDA_VISIBLE_DEVICES=NoDevFiles", {},
        "srun, 8 ranks on this machine, on the CPU (CUDA_VISIBLE_DEVICES=NoDevFiles hides the GPUs), 8 threads each",
    ),
    (
        "srun of a script that sets RANK itself", f"{SRUN_8} RANK=3 WORLD_SIZE=8 LOCAL_RANK=3", {},
        "srun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "sbatch that exports WORLD_SIZE", f"{SRUN_8} WORLD_SIZE=8", {},
        "srun, 8 ranks on this machine, 1 GPU each, 8 threads each",
    ),
    (
        "srun from a shell with RANK=0", f"{SRUN_8} RANK=0 WORLD_SIZE=1 LOCAL_RANK=0", {},
        "refused: RANK: 0 contradicts SLURM_PROCID=3; unset RANK, or unset SLURM_PROCID if srun did not start this rank",
    ),
    (
        "srun from a shell with WORLD_SIZE=1", f"{SRUN_8} WORLD_SIZE=1", {},
        "refused: WORLD_SIZE: 1 contradicts SLURM_STEP_NUM_TASKS=8; unset WORLD_SIZE, or unset SLURM_PROCID if srun did not "
        "start this rank",
    ),
    (
        "srun and --ranks", SRUN_8, {"ranks": 8},
        "refused: --ranks: srun has already started 8 ranks; leave out --ranks, or start the command without a launcher",
    ),
    (
        "one task of launch/slurm/run.sh", f"{ONE_TASK} TANDEM_LAUNCHER=srun SLURM_CPUS_PER_TASK=6", {},
        "srun, 1 rank on this machine, 1 GPU (7 of 8 unused), 6 threads",
    ),
    ("srun --pty bash", ONE_TASK, {"terminal": True}, START_8),
    ("srun --pty bash, one processor", f"{ONE_TASK} SLURM_CPUS_PER_TASK=1", {"processors": 1}, "starts 8 ranks, 1 thread each"),
    ("srun --pty bash, an unbound share", f"{ONE_TASK} SLURM_CPUS_PER_TASK=4", {}, "starts 8 ranks, 4 threads each"),
    ("srun --pty bash, no GPU, tensor parallel 2", ONE_TASK, {"gpus": 0, "tp_size": 2}, "starts 2 ranks, 8 threads each"),
    (
        "srun --ntasks=8 --pty bash", SRUN_8, {"terminal": True},
        "refused: SLURM_STEP_NUM_TASKS: srun started 8 tasks, but only one has this terminal; start the run with srun without "
        f"--pty, {ONE_MACHINE}",
    ),
    ("srun --ntasks=8 --pty bash, --ranks 8", SRUN_8, {"terminal": True, "ranks": 8}, START_8),
    ("a Jupyter kernel in a step of Slurm", f"{ONE_TASK} JPY_PARENT_PID=7", {}, START_8),
    ("one of several steps of one node", f"{ONE_TASK} SLURM_JOB_NUM_NODES=4", {}, START_8),
    ("the shell of sbatch", f"{BATCH} SLURM_JOB_NUM_NODES=1 SLURM_CPUS_PER_TASK=12", {}, START_8),
    (
        "the shell of sbatch on four nodes", f"{BATCH} SLURM_JOB_NUM_NODES=4 SLURM_NNODES=4", {},
        f"refused: SLURM_JOB_NUM_NODES: the job has 4 nodes, but this shell is on one; {RUN_SH}",
    ),
    (
        "the shell of sbatch on four nodes, --ranks 8", f"{BATCH} SLURM_JOB_NUM_NODES=4", {"ranks": 8},
        START_8,
    ),
    ("the shell of salloc", f"{JOB} SLURM_NNODES=1", {}, START_8),
    (
        "the shell of salloc on a node of two", f"{ONE_TASK.replace('STEP_ID=0', 'STEP_ID=4294967290')} SLURM_NNODES=2",
        {"terminal": True},
        f"refused: SLURM_NNODES: the job has 2 nodes, but this shell is on one; {RUN_SH}",
    ),
    (
        "a damaged list of tasks", f"{SRUN_8.replace('NODE=8', 'NODE=8x2')}", {},
        "refused: SLURM_STEP_TASKS_PER_NODE: 8x2 is not a list such as 8(x2),4; start the ranks with srun",
    ),
    (
        "no local rank", SRUN_8.replace("SLURM_LOCALID=3", ""), {},
        "refused: SLURM_LOCALID: not set, but other variables of its launcher are; set it, or unset the others",
    ),
]  # fmt: skip
LEFT_BEHIND = [
    ("a notebook with one rank", "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost", {}, START_8),
    ("Kubeflow with one machine", f"RANK=0 WORLD_SIZE=1 PET_NNODES=1 {ADDRESS}", {}, START_8),
    (
        "Kubeflow with four machines", f"RANK=2 WORLD_SIZE=4 {ADDRESS}", {},
        f"refused: WORLD_SIZE: the job has 4 machines, {MULTI_NODE}",
    ),
    ("Kubeflow with four machines, --ranks 8", f"RANK=2 WORLD_SIZE=4 {ADDRESS}", {"ranks": 8}, START_8),
    (
        "an elastic PyTorchJob", "PET_NNODES=1:4 PET_NPROC_PER_NODE=8", {},
        f"refused: PET_NNODES: the job has 4 machines, {MULTI_NODE}",
    ),
    ("SageMaker with one machine", 'SM_HOSTS=\'["algo-1"]\' SM_NUM_GPUS=8', {}, START_8),
    (
        "SageMaker with two machines", 'SM_HOSTS=\'["algo-1","algo-2"]\'', {},
        f"refused: SM_HOSTS: the job has 2 machines, {MULTI_NODE}",
    ),
    (
        "mpirun", "OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_RANK=3", {},
        f"refused: OMPI_COMM_WORLD_SIZE: mpirun started 8 processes, {MPIRUN}",
    ),
    (
        "mpirun of Intel MPI in a job of Slurm", f"{SRUN_8} PMI_SIZE=64 PMI_RANK=3", {},
        f"refused: PMI_SIZE: mpirun started 64 processes, {MPIRUN}",
    ),
    ("mpirun with one process", "OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0", {}, START_8),
    (
        "jsrun", "JSM_NAMESPACE_SIZE=8 JSM_NAMESPACE_RANK=3 JSM_NAMESPACE_LOCAL_RANK=3", {},
        f"refused: JSM_NAMESPACE_SIZE: mpirun started 8 processes, {MPIRUN}",
    ),
    ("HPE's mpiexec", "PALS_SIZE=8 PALS_RANKID=3", {}, f"refused: PALS_SIZE: mpirun started 8 processes, {MPIRUN}"),
    *(
        (f"four machines in {name}", f"{name}=4", {}, f"refused: {name}: the job has 4 machines, {MULTI_NODE}")
        for name in ("SKYPILOT_NUM_NODES", "AZUREML_NODE_COUNT", "PBS_NUM_NODES", "NHOSTS")
    ),
    ("RunPod with two machines", "NUM_NODES=2 NODE_RANK=1", {}, f"refused: NUM_NODES: the job has 2 machines, {MULTI_NODE}"),
    ("a user's NUM_NODES", "NUM_NODES=many", {}, START_8),
    ("one machine of SkyPilot", "SKYPILOT_NUM_NODES=1 SKYPILOT_NODE_RANK=0", {}, START_8),
    ("an old file of machines", "PBS_NODEFILE=/no/such/file", {}, START_8),
    ("a lone RANK=0", "RANK=0", {}, START_8),
    ("a lone RANK=1", "RANK=1", {}, "refused: RANK: it is 1, but WORLD_SIZE is not set; unset RANK, or set both"),
    ("accelerate with one process", "ACCELERATE_MIXED_PRECISION=bf16", {}, START_8),
    ("only LOCAL_RANK", "LOCAL_RANK=3", {}, START_8),
    ("an old MASTER_ADDR", ADDRESS, {}, START_8),
    ("a mark of torchrun without a rank", TORCHRUN, {}, START_8),
    ("an old LOCAL_WORLD_SIZE", "LOCAL_WORLD_SIZE=4 LOCAL_SIZE=4", {}, START_8),
    ("an old RANK", "RANK=3", {}, "refused: RANK: it is 3, but WORLD_SIZE is not set; unset RANK, or set both"),
    (
        "an old WORLD_SIZE", "WORLD_SIZE=8", {},
        "refused: WORLD_SIZE: it is 8, but RANK is not set; unset WORLD_SIZE, or set both",
    ),
    ("empty variables", "RANK= WORLD_SIZE= LOCAL_RANK= SLURM_PROCID= OMP_NUM_THREADS=", {}, START_8),
    (
        "a rank that is too high", f"RANK=8 WORLD_SIZE=8 LOCAL_RANK=0 {ADDRESS}", {},
        "refused: RANK: 8 is not below WORLD_SIZE=8; correct or unset both",
    ),
    (
        "a rank that is no number", f"RANK=one WORLD_SIZE=8 LOCAL_RANK=0 {ADDRESS}", {},
        "refused: RANK: 'one' is not a whole number of at least 0; correct or unset it",
    ),
    (
        "a negative rank", f"RANK=-1 WORLD_SIZE=8 LOCAL_RANK=0 {ADDRESS}", {},
        "refused: RANK: '-1' is not a whole number of at least 0; correct or unset it",
    ),
    (
        "a local rank that is too high", f"{TORCHRUN} RANK=1 WORLD_SIZE=8 LOCAL_RANK=4 LOCAL_WORLD_SIZE=4", {},
        "refused: local rank 4 of 4 does not fit into 8 ranks; correct or unset the variables of the launcher",
    ),
]  # fmt: skip
DEVICES = [
    (
        "hidden GPUs", "CUDA_VISIBLE_DEVICES=-1", {},
        "no launcher, 1 rank on this machine, on the CPU (CUDA_VISIBLE_DEVICES=-1 hides the GPUs), 8 threads",
    ),
    (
        "hidden GPUs, an empty value", "CUDA_VISIBLE_DEVICES=", {},
        "no launcher, 1 rank on this machine, on the CPU (CUDA_VISIBLE_DEVICES= hides the GPUs), 8 threads",
    ),
    ("-1 after a GPU", "CUDA_VISIBLE_DEVICES=0,-1", {}, "no launcher, 1 rank on this machine, 1 GPU, 8 threads"),
    ("spaces", "CUDA_VISIBLE_DEVICES=' 2 , 3'", {}, "starts 2 ranks, 8 threads each"),
    ("an index that does not exist", "CUDA_VISIBLE_DEVICES=0,8,1", {}, "no launcher, 1 rank on this machine, 1 GPU, 8 threads"),
    ("UUIDs", "CUDA_VISIBLE_DEVICES=GPU-8932f937,GPU-17a4", {}, "starts 2 ranks, 8 threads each"),
    ("MIG instances", "CUDA_VISIBLE_DEVICES=MIG-1,MIG-2", {}, "no launcher, 1 rank on this machine, 1 GPU, 8 threads"),
    ("a container's variable", "NVIDIA_VISIBLE_DEVICES=void", {"gpus": 2}, "starts 2 ranks, 8 threads each"),
    (
        "an old index on a machine without GPUs", "CUDA_VISIBLE_DEVICES=0,1", {"gpus": 0},
        "no launcher, 1 rank on this machine, on the CPU, 8 threads",
    ),
    *(
        (
            f"no GPU by mistake: {value}", f"CUDA_VISIBLE_DEVICES={value}", {},
            f"refused: CUDA_VISIBLE_DEVICES: {value} names no GPU of this machine, so CUDA would show none; list each index "
            "once, as in 0,1, or set it to nothing to train on the CPU",
        )
        for value in ("all", "0,0", "8", "cuda:0", "GPU-1,GPU-1")
    ),
]  # fmt: skip
THREADS = [
    ("few processors", "", {"processors": 20}, "starts 8 ranks, 2 threads each"),
    ("fewer processors than ranks", "", {"processors": 3}, "starts 8 ranks, 1 thread each"),
    ("threads are given", "OMP_NUM_THREADS=12", {"gpus": 1}, "no launcher, 1 rank on this machine, 1 GPU, 12 threads"),
    ("nested threads are given", "OMP_NUM_THREADS=12,2", {"gpus": 1}, "no launcher, 1 rank on this machine, 1 GPU, 12 threads"),
    (
        "no threads are given", "OMP_NUM_THREADS=0", {"gpus": 1},
        "refused: OMP_NUM_THREADS: '0' is not a whole number of at least 1; correct or unset it",
    ),
]  # fmt: skip
TABLE = [*ALONE, *LAUNCHED, *SLURM, *LEFT_BEHIND, *DEVICES, *THREADS]


def decide(environment: dict[str, str], *, gpus=8, processors=96, terminal=False, ranks=None, tp_size=1) -> str:
    """What `tandem train` does in this environment, in words."""
    try:
        found = launch.read_launch(environment, num_gpus=gpus, processors=processors, has_terminal=terminal)
        num_ranks = launch.ranks_to_start(found, ranks, tp_size)
    except UserError as refusal:
        return f"refused: {refusal}"
    if not num_ranks:
        return found.describe()
    launch.set_num_threads(environment, found, num_ranks)
    threads = environment["OMP_NUM_THREADS"]
    return f"starts {num_ranks} rank{'s' * (num_ranks > 1)}, {threads} thread{'s' * (threads != '1')} each"


@pytest.mark.parametrize(
    ("environment", "facts", "decision"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_every_environment_is_understood_or_refused(environment, facts, decision):
    assert decide(dict(word.split("=", 1) for word in shlex.split(environment)), **facts) == decision


@pytest.mark.parametrize("name", ["PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "OAR_NODEFILE"])
def test_machines_are_counted_in_the_file_of_the_scheduler(name, tmp_path):
    (tmp_path / "hosts").write_text("a\na\n")
    assert decide({name: str(tmp_path / "hosts")}) == START_8
    (tmp_path / "hosts").write_text("a\na\nb\nb\n\n")
    assert decide({name: str(tmp_path / "hosts")}) == f"refused: {name}: the job has 2 machines, {MULTI_NODE}"


@pytest.mark.parametrize(
    ("files", "denied", "expected"),
    [
        ([], [], 0),
        (["proc/driver/nvidia/gpus/0000:01:00.0", "proc/driver/nvidia/gpus/0000:02:00.0"], [], 2),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm"], [], 2),
        (["dev/nvidia5", "dev/nvidiactl", "proc/driver/nvidia/gpus/a", "proc/driver/nvidia/gpus/b"], [], 1),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidia2"], ["nvidia0", "nvidia2"], 1),
        (["dev/nvidia0", "proc/driver/nvidia/gpus/a"], ["nvidia0"], 0),
        (["dev/nvidiactl"], [], None),
        (["dev/dxg"], [], None),
    ],
)
def test_gpus_are_found_by_any_of_their_device_files(monkeypatch, tmp_path, files, denied, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    # The device controller of a cgroup denies access to root too, which no mode of a file does.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name not in denied)
    assert launch.find_gpus(tmp_path) == expected
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "find_gpus", lambda: expected)
    process.silence_library_warnings()
    assert os.environ.pop("DS_ACCELERATOR", None) == ("cpu" if expected == 0 else None)


def test_visible_gpus_are_those_that_torch_counts(monkeypatch):
    values = [
        "", "0", "0,1", "1,0", " 0 , 1 ", "-1", "0,-1", "0,-1,1", "-1,0", "0,0", "0,1,0", "2,9", "9", "0,9,1", "0,,1", ",0",
        "+1", "0x1", "1gpu2,2ampere", "all", "none", "void", "NoDevFiles", "0,NoDevFiles", "cuda:0", "07,7", "0 1", "\t1",
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 8)
    for value in values:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert launch.count_visible(value, 8) == torch.cuda._device_count_nvml(), value
    for value in (
        "GPU-a",
        "GPU-a,GPU-b",
        "GPU-a,GPU-a",
        "GPU-a,0,GPU-b",
        "GPU-a, GPU-b",
        " GPU-a",
        "gpu-a",
        "MIG-a,MIG-a",
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert launch.count_visible(value, 8) == len(torch.cuda._parse_visible_devices()), value
    assert launch.count_visible("GPU-a,GPU-b,GPU-c", 2) == 2
    assert launch.count_visible("MIG-a,MIG-b", 1) == 1, "a process can use one instance only"


V1, V2 = "sys/fs/cgroup/cpu", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {}, 64),
        ("0::/", {f"{V2}/cpu.max": "max 100000"}, 64),
        ("0::/", {f"{V2}/cpu.max": "250000 100000"}, 2),
        ("0::/", {f"{V2}/cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "300000 100000"}, 3),
        ("0::/../other", {f"{V2}/cpu.max": "400000 100000"}, 4),
        ("4:cpu,cpuacct:/", {f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}, 64),
        ("4:cpu,cpuacct:/a", {f"{V1}/a/cpu.cfs_quota_us": "150000", f"{V1}/a/cpu.cfs_period_us": "50000"}, 3),
        ("4:cpu:/docker/7", {f"{V1}/cpu.cfs_quota_us": "200000", f"{V1}/cpu.cfs_period_us": "100000"}, 2),
        ("3:cpuset:/\n2:cpuacct:/\n1:name=systemd:/x:y", {}, 64),
        (None, {}, 64),
    ],
)
def test_the_processors_are_those_of_affinity_and_quotas(monkeypatch, tmp_path, membership, files, expected):
    if membership:
        files = files | {"proc/self/cgroup": membership}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert processors.usable_processors(tmp_path) == expected
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert processors.usable_processors(tmp_path) == min(expected, 2)


def test_the_scripts_give_each_rank_its_share_and_hide_the_ranks_of_another_launcher():
    shell = """bash -euo pipefail -c 'source launch/env.sh && echo "$OMP_NUM_THREADS ${RANK:-none}"'"""
    settings = (
        f"taskset -c {min(os.sched_getaffinity(0))}",
        "SLURM_CPUS_PER_TASK=1 RANKS_PER_NODE=1",
        "OMP_NUM_THREADS=5 RANKS_PER_NODE=2",
        "RANKS_PER_NODE=1",
    )
    command = ["bash", "-c", "; ".join(f"{setting} {shell}" for setting in settings)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"RANK": "3"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    alone = processors.threads_per_rank(1, environment, processors.usable_processors())
    assert done.stdout == f"1 none\n1 none\n5 none\n{alone} none\n", done.stderr


def test_two_ranks_never_share_a_gpu():
    check_own_devices([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")])
    with pytest.raises(UserError, match="ranks 0 and 2 share GPU GPU-1 of a; start one rank per GPU"):
        check_own_devices([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-1")])
