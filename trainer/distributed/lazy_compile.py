"""Import libraries that call torch.compile while they are imported, without paying for it in every start."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def compile_at_first_call() -> Iterator[None]:
    """Inside the block, `torch.compile(function)` compiles when the result is called first, and wandb cannot be imported.

    megatron-core 0.16 and DeepSpeed 0.19 decorate functions that we never call with torch.compile, which imports torch's whole
    compiler. megatron-core's inference, which we never use either, imports wandb. Together: 2 s of CPU time in every rank.
    """
    hide_wandb = "wandb" not in sys.modules
    if hide_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # `import wandb` raises ImportError
    try:
        with mock.patch.object(torch, "compile", _compile_at_first_call):
            yield
    finally:
        if hide_wandb:
            del sys.modules["wandb"]


def _compile_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    if function is None:  # a decorator with options
        return functools.partial(_compile_at_first_call, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))
