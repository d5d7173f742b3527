"""The launch of a kernel."""

from typing import Any

import torch
import triton


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run the kernel once for each program of the grid, on the device of the first argument, a tensor.

    An empty grid runs nothing. `constants` are the kernel's compile-time arguments and Triton's own, such as num_warps and
    num_stages.

    Raises: ValueError for fp64, which no kernel computes.
    """
    if arguments[0].dtype == torch.float64:
        raise ValueError("a tensor is fp64, and GPU kernels compute in fp32: use the CPU for fp64")
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        # Fused multiply-adds are the default before triton 3.9, which warns if this is not set.
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


def num_blocks(size: int, block_size: int) -> int:
    """Return how many blocks cover `size`."""
    return triton.cdiv(size, block_size)
