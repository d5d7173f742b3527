"""What a loader is here: a form of the corpus on disk, and batches of shuffled rows read from it, from any state on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tandem.data_prep.bench.loaders.synthetic_corpus import ROW_TOKENS, SyntheticCorpus

MICRO_BATCH_SIZE = 8
"""Of a batch of one rank."""
GLOBAL_BATCH_SIZE = 24
"""Of steps that 2 and 3 ranks share."""


@dataclass(frozen=True)
class PassConfig:
    """One pass over the corpus in the order of the seed, as one rank of several sees it."""

    corpus: SyntheticCorpus
    folder: Path
    """The loader's own form of the corpus."""
    seed: int
    has_worker: bool = False
    """Whether one worker reads ahead."""
    micro_batch_size: int = MICRO_BATCH_SIZE
    dp_rank: int = 0
    dp_size: int = 1


@dataclass(frozen=True)
class BatchStream:
    batches: Iterator[Tensor]
    """[rows, ROW_TOKENS] int64, of this rank; to the end of the pass."""
    state_after: Callable[[int], Any]
    """What a resume needs after this number of batches, as JSON."""


@dataclass(frozen=True)
class LoaderAdapter:
    name: str
    import_modules: Callable[[], Any]
    """Everything that it imports: not timed."""
    write_corpus: Callable[[SyntheticCorpus, Path], None]
    open_batches: Callable[[PassConfig, Any], BatchStream]
    """From a state on; None begins."""
    note: str = ""
    reads_flat_rows: bool = True
    """Reads the rows that the flat tokens are cut into, so that a sum over a pass must agree."""
    is_ours: bool = False
    """Reads the corpus as it is."""
    is_elastic: bool = False
    """Reads as one of any number of ranks, from one state for all."""
    install_hint: str = "pip install 'tandem[bench]'"


def index_batches(num_rows: int, pass_config: PassConfig, state: Any, *, shuffled: bool = True) -> list[np.ndarray]:
    """The rows of each batch of this rank from the state on: the sampler of loaders that have none or only their own.

    A state is the number of rows that all ranks have read.
    """
    order = np.random.default_rng(pass_config.seed).permutation(num_rows) if shuffled else np.arange(num_rows)
    global_batch_size = pass_config.micro_batch_size * pass_config.dp_size
    first = pass_config.dp_rank * pass_config.micro_batch_size
    starts = range(state or 0, num_rows - global_batch_size + 1, global_batch_size)
    return [order[start + first : start + first + pass_config.micro_batch_size] for start in starts]


def state_after_batches(pass_config: PassConfig, state: Any) -> Callable[[int], int]:
    """The state of `index_batches` after a number of batches."""
    return lambda batches: (state or 0) + batches * pass_config.micro_batch_size * pass_config.dp_size


def flat_rows(corpus: SyntheticCorpus) -> np.ndarray:
    """[rows, ROW_TOKENS] of the corpus in its order, a view of the file."""
    return corpus.open_tokens().reshape(-1, ROW_TOKENS)
