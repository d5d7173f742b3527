"""Which activations are kept for backward and which are computed again."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def activation_checkpoint(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments), keeping only the arguments; backward runs the function again.

    Nothing in either model draws random numbers, so their state need not be kept.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def call_directly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments), keeping whatever its backward wants."""
    return function(*arguments)
