"""The registers and shared memory that every kernel takes on a Hopper GPU at every shape, found by compiling only."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from triton.runtime.jit import JITFunction

from tandem.kernels.bench.ops import Operation
from tests.rivals.kernels.launches import LAUNCHES
from tests.rivals.kernels.offline_compile import CompiledKernel, compile_for_sm90

REGISTERS_PER_SM = 65_536
REGISTER_ALLOCATION_UNIT = 256
"""Registers are allocated to whole warps in this unit."""
SHARED_BYTES_PER_SM = 228 * 1024
RESERVED_SHARED_BYTES_PER_BLOCK = 1024
"""Shared memory that the system takes for each block."""
MAX_THREADS_PER_SM = 2_048
MAX_BLOCKS_PER_SM = 32
"""Of one multiprocessor of compute capability 9.0. Source: CUDA C++ programming guide, technical specifications."""
KNOWN_SPILLS: dict[tuple[str, str, str], int] = {}
"""Spilled bytes per thread that are accepted, by operation, model and kernel, each with its reason; none today."""
COMPILED_DEVICE = "sm_90, compiled"
"""The device in rows that only compiled."""


@dataclass(frozen=True)
class KernelResources:
    op: str
    shape: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    blocks_per_multiprocessor: int


def kernel_resources(operations: Iterable[Operation], shape_filter: str = "") -> Iterator[KernelResources]:
    """Compile each kernel of each operation at each shape whose name contains `shape_filter`.

    Raises: RuntimeError if Triton interprets.
    """
    for op in operations:
        for shape in op.shapes + op.extra_shapes if op.name in LAUNCHES else ():
            if shape_filter not in shape.name:
                continue
            for kernel in compile_launched(functools.partial(LAUNCHES[op.name], shape)):
                yield KernelResources(
                    op.name, shape.name, kernel.name, kernel.registers, kernel.spilled_bytes, kernel.shared_bytes,
                    kernel.num_warps, blocks_per_multiprocessor(kernel),
                )  # fmt: skip


def describe_spills(found: Iterable[KernelResources]) -> list[tuple[str, bool]]:
    """Return a sentence for each kernel and number of spilled bytes, with its shapes, and whether the spill is known."""
    shapes: dict[tuple[str, str, int, bool], list[str]] = {}
    for one in found:
        if one.spilled_bytes > 0:
            known = one.spilled_bytes <= KNOWN_SPILLS.get((one.op, one.shape.split()[0], one.kernel), 0)
            shapes.setdefault((one.op, one.kernel, one.spilled_bytes, known), []).append(one.shape)
    return [
        (f"{op} {kernel} spills {size} bytes at {', '.join(names)}" + (": known" if known else ""), known)
        for (op, kernel, size, known), names in shapes.items()
    ]


def blocks_per_multiprocessor(kernel: CompiledKernel) -> int:
    """How many blocks fit at once, by registers, shared memory, threads and the limit of blocks."""
    threads = 32 * kernel.num_warps
    registers_per_warp = -(-kernel.registers * 32 // REGISTER_ALLOCATION_UNIT) * REGISTER_ALLOCATION_UNIT
    by_registers = REGISTERS_PER_SM // registers_per_warp // kernel.num_warps
    return min(
        by_registers,
        SHARED_BYTES_PER_SM // (kernel.shared_bytes + RESERVED_SHARED_BYTES_PER_BLOCK),
        MAX_THREADS_PER_SM // threads,
        MAX_BLOCKS_PER_SM,
    )


def compile_launched(launch: Callable[[], object]) -> list[CompiledKernel]:
    """Compile the kernels that the call would launch.

    Raises: RuntimeError if Triton interprets; any exception of the compiler.
    """
    with compile_for_sm90() as compiled:
        try:
            launch()
        finally:
            _clear_kernel_caches()
    return list(dict.fromkeys(compiled))


def _clear_kernel_caches() -> None:
    """Make the next launch load its kernels again, so that it is noticed. Triton's cache of binaries avoids compiling again."""
    for kernel in _triton_kernels():
        kernel.device_caches.clear()


def _triton_kernels() -> list[JITFunction]:
    modules = [module for name, module in sys.modules.items() if name.startswith("tandem.kernels.device.")]
    return [thing for module in modules for thing in vars(module).values() if isinstance(thing, JITFunction)]
