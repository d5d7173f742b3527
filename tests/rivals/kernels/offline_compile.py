"""Compile kernels for a Hopper GPU without one, through the launchers that would launch them.

Triton asks its driver for the target, loads what it has compiled and launches it. The driver here answers "sm_90", records what
it is given to load and launches nothing. A launcher called with tensors on the meta device therefore compiles exactly what it
would run at those shapes. Triton must not be interpreting.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime.driver import driver

SM_90_SHARED_BYTES = 232_448
"""The limit of one block. Source: CUDA C++ programming guide, technical specifications, compute capability 9.0."""
SM_90_MAX_THREADS = 1024


@dataclass(frozen=True)
class CompiledKernel:
    name: str
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Per thread, in local memory."""
    shared_bytes: int
    num_warps: int


@contextmanager
def compile_for_sm90() -> Iterator[list[CompiledKernel]]:
    """Make launches within the block compile for sm_90 and run nothing; yield the list of kernels, which grows as they compile.

    Raises: RuntimeError if Triton interprets.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    compile_driver = _CompileOnlyDriver()
    active_driver = driver._active
    driver.set_active(compile_driver)
    try:
        yield compile_driver.compiled_kernels
    finally:
        driver._active = active_driver


class _CompileOnlyDriver:
    """The part of triton.backends.driver.DriverBase that a launch uses; triton 3.6 to 3.7."""

    def __init__(self) -> None:
        self.compiled_kernels: list[CompiledKernel] = []
        self.utils = self

    def get_current_device(self) -> int:
        # No real device: launches on one would otherwise find the kernels compiled here, which launch nothing.
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SM_90_SHARED_BYTES, "multiprocessor_count": 132}

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty_to_cpp(ty)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.num_warps = metadata.num_warps
        return lambda *arguments: None

    def load_binary(
        self, name: str, cubin: bytes, shared_bytes: int, device: int
    ) -> tuple[object, object, int, int, int]:
        found = CompiledKernel(name, *_resource_usage(cubin), shared_bytes, self.num_warps)
        self.compiled_kernels.append(found)
        return object(), object(), found.registers, found.spilled_bytes // 4, SM_90_MAX_THREADS

    def unload_module(self, module: object) -> None:
        pass


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout)}
    return fields["REG"], fields["STACK"] + fields["LOCAL"]
