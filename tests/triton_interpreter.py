"""Make Triton's interpreter, which runs kernels without a GPU, round as a GPU does. Importing this module is enough."""

import inspect
from functools import cache

import numpy as np
import pytest
import torch
from torch._library.custom_ops import OPDEFS

if not torch.cuda.is_available():
    import triton.language as tl
    from triton.runtime import interpreter

    _original_convert_float = interpreter._convert_float

    def _convert_round_to_nearest(source, source_type, target_type, rounding_mode):
        """triton 3.6 to 3.7 truncates in an interpreted conversion from fp32 to bf16. A GPU rounds to nearest, even."""
        if (source_type, target_type) != (tl.float32, tl.bfloat16):
            return _original_convert_float(source, source_type, target_type, rounding_mode)
        bits = np.ascontiguousarray(source).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(source), np.uint16(0x7FC0), rounded)

    interpreter._convert_float = _convert_round_to_nearest

    _original_create_dot = interpreter.InterpreterBuilder.create_dot

    def _create_bf16_dot(self, first, second, *rest):
        """triton 3.6 to 3.7 interprets a product of bf16 tiles as a product of the integers that hold their bits."""
        wide = (
            interpreter.TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if tile.dtype.scalar == tl.bfloat16 else tile
            for tile in (first, second)
        )  # fmt: skip
        return _original_create_dot(self, *wide, *rest)

    interpreter.InterpreterBuilder.create_dot = _create_bf16_dot

    _find_builtin_names = cache(
        lambda namespace: [name for name, member in inspect.getmembers(namespace) if tl.core.is_builtin(member)]
    )

    def _patch_builtin_members(namespace, builder, scope):
        """triton 3.6 to 3.7 searches its whole language at each launch and each call, a third of the time of a small kernel."""
        for name in _find_builtin_names(namespace):
            member = getattr(namespace, name)
            if tl.core.is_builtin(member):  # not patched by an outer call
                interpreter._patch_attr(namespace, name, member, builder, scope)

    interpreter._patch_builtin = _patch_builtin_members


def run_kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Make operations on the CPU run their GPU kernels from now on. The returned set collects the names that run."""
    ran = set()
    for name, operation in OPDEFS.items():
        namespace, name = name.split("::")
        if namespace == "tandem" and "cuda" in operation._backend_fns:
            kernel = operation._backend_fns["cuda"]

            def record_call(*arguments, name=name, kernel=kernel, **keywords):
                ran.add(name)
                return kernel(*arguments, **keywords)

            monkeypatch.setitem(operation._backend_fns, "cpu", record_call)
    return ran
