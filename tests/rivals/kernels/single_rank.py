"""A process group of one rank, for rivals that always reduce over ranks."""

import functools

import torch.distributed as dist


@functools.cache
def tensor_parallel_group(device_type: str) -> dist.ProcessGroup:
    """Return Megatron's tensor-parallel group of one rank; start torch.distributed if needed."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return parallel_state.get_tensor_model_parallel_group()


def destroy_group() -> None:
    """Undo `tensor_parallel_group`, if it was called."""
    if tensor_parallel_group.cache_info().currsize:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        tensor_parallel_group.cache_clear()
