"""Counts how often the host waits for the device within a block, and how much work it hands to it.

On a GPU torch itself says when it waits. A CPU has nothing to wait for, but the calls that would wait on a GPU are the same:
those that give Python a number of a tensor, choose a shape by its values, or copy to the device what is not pinned.
"""

import inspect
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.mesh import sum_over_ranks

SYNC_FUNCTIONS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "nonzero",
    "equal",
    "is_nonzero",
}
"""Functions and methods of torch that read a tensor's values."""
SYNC_OPERATIONS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip
"""The same, as operations: also where no Python asked for it."""
SYNC_WARNING = "called a synchronizing CUDA operation"


@dataclass
class SyncRecord:
    sync_sites: list[str] = field(default_factory=list)
    """Where the host waits for the device: file and function."""
    num_operations: int = 0
    """All that compute something; on a CPU only."""


def place_of(function: Callable[..., Any]) -> str:
    """File and function, as `calling_site` says them."""
    code = inspect.unwrap(function).__code__
    return f"{os.path.basename(code.co_filename)}:{code.co_name}"


HOST_TENSOR_FUNCTIONS = {place_of(sum_over_ranks), place_of(Coordinator.any_rank)}
"""Functions of ours that read tensors which live on the host."""


def calling_site() -> str | None:
    """File and function of the innermost frame that is not torch's nor a test's; None if what it reads lives on the host."""
    frames = [
        frame for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and "/tests/" not in frame.filename and "/jaxtyping/" not in frame.filename
    ]  # fmt: skip
    if not frames:
        return "a test"
    found = f"{os.path.basename(frames[-1].filename)}:{frames[-1].name}"
    return None if found in HOST_TENSOR_FUNCTIONS else found


def counts_mask(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the operation counts the ones of a mask. A mask to which one number is written is just filled."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return False
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    return masks and (name == "aten::index" or arguments[2].numel() != 1)


class FunctionSyncMode(TorchFunctionMode):
    def __init__(self, record: SyncRecord) -> None:
        super().__init__()
        self._record, self.is_inside_sync = record, False

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        name = (resolve_name(function) or getattr(function, "__name__", "")).rsplit(".", 1)[-1]
        copied = name in ("tensor", "as_tensor") and keywords.get("device") is not None
        if not (name in SYNC_FUNCTIONS or copied):
            return function(*arguments, **keywords)
        if where := calling_site():
            self._record.sync_sites.append(where)
        self.is_inside_sync = True
        try:
            return function(*arguments, **keywords)
        finally:
            self.is_inside_sync = False


class OperationSyncMode(TorchDispatchMode):
    def __init__(self, record: SyncRecord, functions: FunctionSyncMode) -> None:
        super().__init__()
        self._record, self._function_mode = record, functions

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = operation._schema.name
        waiting = name in SYNC_OPERATIONS or counts_mask(name, arguments)
        if waiting and not self._function_mode.is_inside_sync and (where := calling_site()):
            self._record.sync_sites.append(where)
        self._record.num_operations += not (operation.is_view or "empty" in name or name == "aten::detach")
        return operation(*arguments, **(keywords or {}))


@contextmanager
def record_cpu_syncs() -> Iterator[SyncRecord]:
    """What the block does, in this thread: backward on a CPU is in it."""
    seen = SyncRecord()
    with FunctionSyncMode(seen) as functions, OperationSyncMode(seen, functions):
        yield seen


def record_synchronize(synchronize: Callable[..., Any], seen: SyncRecord) -> Callable[..., Any]:
    """The same, and it is noted where it was asked for."""

    def wait(*arguments: Any, **keywords: Any) -> Any:
        seen.sync_sites.append(calling_site() or "a function of the host")
        return synchronize(*arguments, **keywords)

    return wait


@contextmanager
def record_gpu_syncs() -> Iterator[SyncRecord]:
    """What torch says of the block, in all threads, and what asks for a wait itself, which torch does not say."""
    seen = SyncRecord()
    with warnings.catch_warnings(record=True) as said, ExitStack() as asked:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            asked.enter_context(mock.patch.object(owner, "synchronize", record_synchronize(owner.synchronize, seen)))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.sync_sites += [
            f"{os.path.basename(one.filename)}:{one.lineno}" for one in said if SYNC_WARNING in str(one.message)
        ]
