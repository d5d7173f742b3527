"""One flat file and a permutation: an upper bound on speed, without shards or checks."""

from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.rivals.loaders.adapter import (
    BatchStream,
    LoaderAdapter,
    PassConfig,
    flat_rows,
    index_batches,
    state_after_batches,
)
from tests.rivals.loaders.synthetic_corpus import FLAT_FILE, SyntheticCorpus

PREFETCH_BATCHES = 2


def _write(corpus: SyntheticCorpus, folder: Path) -> None:
    folder.joinpath(FLAT_FILE).hardlink_to(corpus.folder / FLAT_FILE)


def _open(reading: PassConfig, state: Any) -> BatchStream:
    rows = flat_rows(reading.corpus)

    def read() -> Iterator[Tensor]:
        for indices in index_batches(len(rows), reading, state):
            yield torch.from_numpy(rows[indices].astype(np.int64))

    return BatchStream(_read_in_thread(read()) if reading.has_worker else read(), state_after_batches(reading, state))


def _read_in_thread(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    queue: Queue[Tensor | None] = Queue(PREFETCH_BATCHES)

    def put() -> None:
        for batch in batches:
            queue.put(batch)
        queue.put(None)

    Thread(target=put, daemon=True).start()
    while (batch := queue.get()) is not None:
        yield batch


MEMMAP = LoaderAdapter(
    "numpy memmap", lambda: None, _write, _open, is_elastic=True,
    note="upper bound: one flat file; the worker is a thread",
)  # fmt: skip
