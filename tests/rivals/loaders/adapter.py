"""The interface of a loader: write the corpus in its format, then read batches of shuffled rows from any state."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tests.rivals.loaders.synthetic_corpus import ROW_TOKENS, SyntheticCorpus
from tests.rivals.options import INSTALL_HINT

MICRO_BATCH_SIZE = 8
"""Rows in a batch of one rank."""
GLOBAL_BATCH_SIZE = 24
"""Rows in a step of 2 or 3 ranks."""


@dataclass(frozen=True)
class PassConfig:
    """One pass over the corpus, shuffled by the seed, as one of `dp_size` ranks reads it."""

    corpus: SyntheticCorpus
    folder: Path
    """The corpus in the loader's format."""
    seed: int
    has_worker: bool = False
    """Whether one worker prefetches."""
    micro_batch_size: int = MICRO_BATCH_SIZE
    dp_rank: int = 0
    dp_size: int = 1


@dataclass(frozen=True)
class BatchStream:
    batches: Iterator[Tensor]
    """[rows, ROW_TOKENS] int64 of this rank, to the end of the pass."""
    state_after: Callable[[int], Any]
    """Returns the state for a resume after this number of batches; JSON must be able to hold it."""


@dataclass(frozen=True)
class LoaderAdapter:
    name: str
    import_modules: Callable[[], Any]
    """Imports everything it needs, outside the timed part."""
    write_corpus: Callable[[SyntheticCorpus, Path], None]
    open_batches: Callable[[PassConfig, Any], BatchStream]
    """Opens a pass from a state; None is the beginning."""
    note: str = ""
    reads_flat_rows: bool = True
    """Whether it reads exactly the rows of the flat file, so that the sum over a pass can be checked."""
    is_ours: bool = False
    """Whether this is our loader, which reads our shards."""
    is_elastic: bool = False
    """Whether one state serves any number of ranks."""
    install_hint: str = INSTALL_HINT


def index_batches(num_rows: int, pass_config: PassConfig, state: Any, *, shuffled: bool = True) -> list[np.ndarray]:
    """Return the row indices of each batch of this rank: a sampler for loaders without one.

    The state is the number of rows that all ranks have read.
    """
    order = np.random.default_rng(pass_config.seed).permutation(num_rows) if shuffled else np.arange(num_rows)
    global_batch_size = pass_config.micro_batch_size * pass_config.dp_size
    first = pass_config.dp_rank * pass_config.micro_batch_size
    starts = range(state or 0, num_rows - global_batch_size + 1, global_batch_size)
    return [order[start + first : start + first + pass_config.micro_batch_size] for start in starts]


def state_after_batches(pass_config: PassConfig, state: Any) -> Callable[[int], int]:
    """Return a function from a number of batches to the state of `index_batches` after them."""
    return lambda batches: (state or 0) + batches * pass_config.micro_batch_size * pass_config.dp_size


def flat_rows(corpus: SyntheticCorpus) -> np.ndarray:
    """Return [rows, ROW_TOKENS] of the corpus in order, a view of the file."""
    return corpus.open_tokens().reshape(-1, ROW_TOKENS)
