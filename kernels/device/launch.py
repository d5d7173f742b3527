"""One way to launch a kernel."""

from typing import Any

import torch
import triton


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """The kernel runs once for each program of the grid, on the device of the first argument, a tensor.

    `constants` are the kernel's compile-time arguments and Triton's own, num_warps and num_stages. Nothing runs where there
    is no program.

    Raises: ValueError for fp64, in which no kernel computes.
    """
    if arguments[0].dtype == torch.float64:
        raise ValueError("a tensor in fp64: kernels of a GPU compute in fp32; operations have their fp64 on the CPU")
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        # Fused multiply-adds: the default until triton 3.9, which warns where nobody says so.
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


def num_blocks(size: int, block_size: int) -> int:
    """Blocks that cover `size`."""
    return triton.cdiv(size, block_size)
