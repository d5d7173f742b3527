"""Keep activations for backward, or recompute them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

activation_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Calls a function and keeps only its arguments; backward calls it again.

Does not save the random state, because neither model draws random numbers."""


def call_directly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call the function and keep all activations that its backward needs."""
    return function(*arguments)
