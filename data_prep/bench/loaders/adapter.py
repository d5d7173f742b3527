"""What a loader is here: a form of the corpus on disk, and batches of shuffled rows read from it, from any state on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tandem.data_prep.bench.loaders.synthetic_corpus import ROW_TOKENS, Corpus

ROWS = 8
"""Of a batch of one rank."""
STEP_ROWS = 24
"""Of steps that 2 and 3 ranks share."""


@dataclass(frozen=True)
class Reading:
    """One pass over the corpus in the order of the seed, as one rank of several sees it."""

    corpus: Corpus
    folder: Path
    """The contestant's own form of the corpus."""
    seed: int
    worker: bool = False
    """Whether one worker reads ahead."""
    rows: int = ROWS
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Opened:
    batches: Iterator[Tensor]
    """[rows, ROW_TOKENS] int64, of this rank; to the end of the pass."""
    state: Callable[[int], Any]
    """What a resume needs after this number of batches, as JSON."""


@dataclass(frozen=True)
class Contestant:
    name: str
    imports: Callable[[], Any]
    """Everything that it imports: not timed."""
    write: Callable[[Corpus, Path], None]
    open: Callable[[Reading, Any], Opened]
    """From a state on; None begins."""
    note: str = ""
    same_rows: bool = True
    """Reads the rows that the flat tokens are cut into, so that a sum over a pass must agree."""
    is_ours: bool = False
    """Reads the corpus as it is."""
    elastic: bool = False
    """Reads as one of any number of ranks, from one state for all."""
    install: str = "pip install 'tandem[bench]'"


def index_batches(num_rows: int, reading: Reading, state: Any, *, shuffled: bool = True) -> list[np.ndarray]:
    """The rows of each batch of this rank from the state on: the sampler of loaders that have none or only their own.

    A state is the number of rows that all ranks have read.
    """
    order = np.random.default_rng(reading.seed).permutation(num_rows) if shuffled else np.arange(num_rows)
    step_rows = reading.rows * reading.ranks
    first = reading.rank * reading.rows
    starts = range(state or 0, num_rows - step_rows + 1, step_rows)
    return [order[start + first : start + first + reading.rows] for start in starts]


def rows_taken(reading: Reading, state: Any) -> Callable[[int], int]:
    """The state of `index_batches` after a number of batches."""
    return lambda batches: (state or 0) + batches * reading.rows * reading.ranks


def flat_rows(corpus: Corpus) -> np.ndarray:
    """[rows, ROW_TOKENS] of the corpus in its order, a view of the file."""
    return corpus.tokens().reshape(-1, ROW_TOKENS)
