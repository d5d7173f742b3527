"""Ranks, process groups and device of this process. The rest of the trainer takes these facts only from here.

The ranks of one replica are adjacent, so that its tensor-parallel all-reduces stay inside a node.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tandem.trainer.config import RANK_WAIT_TIMEOUT_SECONDS, UserError
from tandem.trainer.distributed.megatron import parallel_state
from tandem.trainer.distributed.rendezvous import create_store, meeting_place
from tandem.trainer.runtime.addresses import waiting_message
from tandem.trainer.runtime.launch import Launch, current_launch

T = TypeVar("T")
_STORE_COUNTER = count()
INIT_TIMEOUT = timedelta(seconds=RANK_WAIT_TIMEOUT_SECONDS)
COLLECTIVE_TIMEOUT_MINUTES = 120
"""Longer than the watchdog's limits, because the watchdog names the missing rank, but NCCL's timeout just ends the process."""


@dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    local_rank: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device


def _init_mesh(tp_size: int) -> Mesh:
    launch = current_launch()
    os.environ["LOCAL_RANK"] = str(launch.local_rank)  # DeepSpeed requires it with every launcher
    device = _choose_device(launch)
    if not dist.is_initialized():
        _init_process_group(device, launch.rank, launch.world_size)
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=COLLECTIVE_TIMEOUT_MINUTES))
    if not parallel_state.model_parallel_is_initialized():
        # With gloo, the main groups already serve the CPU; a second set would only slow down the start.
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_size, create_gloo_process_groups=device.type == "cuda",
            distributed_timeout_minutes=COLLECTIVE_TIMEOUT_MINUTES,
        )  # fmt: skip
    if device.type == "cuda":
        check_own_devices(all_gather_values([socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)]))
    return Mesh(
        rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=launch.local_rank, device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(), dp_size=parallel_state.get_data_parallel_world_size(),
    )  # fmt: skip


def _choose_device(launch: Launch) -> torch.device:
    """Select this rank's GPU, or the CPU if this process has none. Raises: UserError if it has GPUs but cannot use one."""
    remedy = "hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
    if not torch.cuda.is_available():
        if launch.num_devices:
            raise UserError(
                f"ranks: this process has {launch.num_devices} GPUs, but torch {torch.__version__} cannot use them; install a "
                f"build of torch for the GPUs and their driver, or {remedy}"
            )
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    index = launch.local_rank if num_devices > 1 else 0  # a launcher may show each rank only its own GPU
    if index >= num_devices:
        raise UserError(
            f"ranks: no GPU of this machine is left for rank {launch.rank} (GPUs: {num_devices}); start one rank per GPU, or "
            f"{remedy}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def check_own_devices(devices: list[tuple[str, str]]) -> None:
    """Raises: UserError if two ranks have the same host and the same GPU. The list has these two of each rank."""
    for rank, device in enumerate(devices):
        if (first := devices.index(device)) != rank:
            raise UserError(
                f"ranks: ranks {first} and {rank} share GPU {device[1]} of {device[0]}; start one rank per GPU, or hide the "
                "GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )


@contextmanager
def mesh_context(tp_size: int) -> Iterator[Mesh]:
    """Create the process groups (NCCL with a GPU, gloo without) and yield the mesh. Reuses an existing default group.

    At the end of the block, destroy the new groups, so that another tp_size can follow.
    """
    groups_before = process_groups()
    try:
        yield _init_mesh(tp_size)
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()  # this only drops megatron-core's references
        if not groups_before and dist.is_initialized():
            dist.destroy_process_group()
        # All ranks must use the same order.
        for group in sorted(process_groups() - groups_before, key=lambda group: group.group_name):
            dist.destroy_process_group(group)


def process_groups() -> set[dist.ProcessGroup]:
    """Return all groups of this process. With gloo, each has two threads, one of which wakes a hundred times a second."""
    return set(dist.distributed_c10d._world.pg_map)


def to_device(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Copy the tensor to the device asynchronously."""
    # If the memory is not pinned or not contiguous, CUDA makes the host wait despite non_blocking.
    return tensor.contiguous().pin_memory().to(mesh.device, non_blocking=True) if mesh.device.type == "cuda" else tensor


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sum each value over all ranks in fp64, with the same bits on every rank. Does not wait for the device."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return list(tensor.tolist())


def sum_over_ranks_on_device(values: torch.Tensor) -> list[float]:
    """Sum each value on the device over all ranks in fp64, with the same bits on every rank. Waits for the device."""
    summed = values.to(torch.float64, copy=True)
    dist.all_reduce(summed)
    return list(summed.tolist())


def broadcast_from_rank_0(value: T) -> T:
    """Return rank 0's value, of JSON's types, on every rank."""
    encoded = _encode(value) if dist.get_rank() == 0 else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor(len(encoded))
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        encoded = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(encoded, 0)
    found: T = _decode(encoded)
    return found


def broadcast_from_replica(dp_rank: int, tensor: torch.Tensor) -> None:
    """Overwrite the tensor on all replicas with that of the given data-parallel rank."""
    group = parallel_state.get_data_parallel_group()
    dist.broadcast(tensor, dist.get_global_rank(group, dp_rank), group)


def run_on_rank_0(function: Callable[[], T], mesh: Mesh) -> T | None:
    """Call the function on rank 0 only; return its result there and None elsewhere.

    Raises: the function's UserError on every rank, so that no rank waits for one that has exited.
    """
    result, refusal = None, None
    if mesh.rank == 0:
        try:
            result = function()
        except UserError as error:
            refusal = str(error)
    refusal = broadcast_from_rank_0(refusal)
    if refusal is not None:
        raise UserError(refusal)
    return result


def all_gather_values(value: object) -> list[Any]:
    """Return the values, of JSON's types, of all ranks, in order of rank."""
    encoded = _encode(value)
    lengths = _all_gather(torch.tensor([len(encoded)]))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    padded[: len(encoded)] = encoded
    return [_decode(row[: int(length)]) for row, length in zip(_all_gather(padded), lengths, strict=True)]


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


def _encode(value: object) -> torch.Tensor:
    """Encode a value as JSON. torch's own collectives of objects use pickles, and whoever can send a pickle can run code."""
    text = json.dumps(value)
    assert json.loads(text) == value, f"{value!r} is not of JSON's types"
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def _decode(encoded: torch.Tensor) -> Any:
    return json.loads(bytes(encoded.tolist()))


def count_collectives() -> dict[str, int]:
    """Count the collectives that this rank has started, by process group, and by kind of device if a group has several."""
    counts: dict[str, int] = {}
    names: Any = dist.distributed_c10d._world.pg_names
    for group, name in list(names.items()):
        backends = {id(found := group._get_backend(device)): (device.type, found) for device in group._device_types}
        for kind, backend in backends.values():
            counts[name if len(backends) == 1 else f"{name} {kind}"] = backend._get_sequence_number_for_group()
    return counts


def dump_flight_record() -> bytes:
    """Return torch's record of this rank's last TORCH_FR_BUFFER_SIZE collectives, for torch's tool `torchfrtrace`."""
    recorder: Any = torch._C._distributed_c10d
    found: bytes = (recorder._dump_nccl_trace if torch.cuda.is_available() else recorder._dump_fr_trace)()
    return found


def create_shared_store(name: str) -> dist.Store:
    """Create an empty key-value store for all ranks, usable from any thread. All ranks must call this in the same order."""
    default_store: Any = dist.distributed_c10d._get_default_store()
    store = default_store.clone()  # a separate connection, so that a wait does not block other stores
    store.set_timeout(INIT_TIMEOUT)
    return dist.PrefixStore(f"tandem/{name}/{next(_STORE_COUNTER)}", store)


def barrier() -> None:
    """Wait until every rank has called this."""
    dist.barrier()


def _init_process_group(device: torch.device, rank: int, world_size: int) -> None:
    # CPU tensors (losses, decisions, gathered values) use gloo even if gradients use NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = create_store(rank, world_size, INIT_TIMEOUT)
    with waiting_message(f"rank {rank} is still waiting for all {world_size} ranks to start ({meeting_place()})"):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=INIT_TIMEOUT)
