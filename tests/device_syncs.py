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

from tandem.trainer.distributed.coordination import Agreement
from tandem.trainer.distributed.mesh import sum_over_ranks

WAITING = {
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
DISPATCHED = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip
"""The same, as operations: also where no Python asked for it."""
SYNCHRONIZING = "called a synchronizing CUDA operation"


@dataclass
class Seen:
    waits: list[str] = field(default_factory=list)
    """Where the host waits for the device: file and function."""
    operations: int = 0
    """All that compute something; on a CPU only."""


def place_of(function: Callable[..., Any]) -> str:
    """File and function, as `place` says them."""
    code = inspect.unwrap(function).__code__
    return f"{os.path.basename(code.co_filename)}:{code.co_name}"


ON_THE_HOST = {place_of(sum_over_ranks), place_of(Agreement.any_rank)}
"""Functions of ours that read tensors which live on the host."""


def place() -> str | None:
    """File and function of the innermost frame that is not torch's nor a test's; None if what it reads lives on the host."""
    frames = [
        frame for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and "/tests/" not in frame.filename and "/jaxtyping/" not in frame.filename
    ]  # fmt: skip
    if not frames:
        return "a test"
    found = f"{os.path.basename(frames[-1].filename)}:{frames[-1].name}"
    return None if found in ON_THE_HOST else found


def chooses_by_mask(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the operation counts the ones of a mask. A mask to which one number is written is just filled."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return False
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    return masks and (name == "aten::index" or arguments[2].numel() != 1)


class Functions(TorchFunctionMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen, self.asked = seen, False

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        name = (resolve_name(function) or getattr(function, "__name__", "")).rsplit(".", 1)[-1]
        copied = name in ("tensor", "as_tensor") and keywords.get("device") is not None
        if not (name in WAITING or copied):
            return function(*arguments, **keywords)
        if where := place():
            self._seen.waits.append(where)
        self.asked = True
        try:
            return function(*arguments, **keywords)
        finally:
            self.asked = False


class Operations(TorchDispatchMode):
    def __init__(self, seen: Seen, functions: Functions) -> None:
        super().__init__()
        self._seen, self._functions = seen, functions

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = operation._schema.name
        waiting = name in DISPATCHED or chooses_by_mask(name, arguments)
        if waiting and not self._functions.asked and (where := place()):
            self._seen.waits.append(where)
        self._seen.operations += not (operation.is_view or "empty" in name or name == "aten::detach")
        return operation(*arguments, **(keywords or {}))


@contextmanager
def waits_on_cpu() -> Iterator[Seen]:
    """What the block does, in this thread: backward on a CPU is in it."""
    seen = Seen()
    with Functions(seen) as functions, Operations(seen, functions):
        yield seen


def noted(synchronize: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    """The same, and it is noted where it was asked for."""

    def wait(*arguments: Any, **keywords: Any) -> Any:
        seen.waits.append(place() or "a function of the host")
        return synchronize(*arguments, **keywords)

    return wait


@contextmanager
def waits_on_gpu() -> Iterator[Seen]:
    """What torch says of the block, in all threads, and what asks for a wait itself, which torch does not say."""
    seen = Seen()
    with warnings.catch_warnings(record=True) as said, ExitStack() as asked:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            asked.enter_context(mock.patch.object(owner, "synchronize", noted(owner.synchronize, seen)))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.waits += [
            f"{os.path.basename(one.filename)}:{one.lineno}" for one in said if SYNCHRONIZING in str(one.message)
        ]
