"""One flat file and a permutation: what no loader can be faster than, and what knows nothing of shards or damage."""

from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.data_prep.bench.loaders.adapter import Contestant, Opened, Reading, flat_rows, index_batches, rows_taken
from tandem.data_prep.bench.loaders.synthetic_corpus import FLAT, Corpus

READ_AHEAD = 2


def _write(corpus: Corpus, folder: Path) -> None:
    folder.joinpath(FLAT).hardlink_to(corpus.folder / FLAT)


def _open(reading: Reading, state: Any) -> Opened:
    rows = flat_rows(reading.corpus)

    def read() -> Iterator[Tensor]:
        for indices in index_batches(len(rows), reading, state):
            yield torch.from_numpy(rows[indices].astype(np.int64))

    return Opened(_in_thread(read()) if reading.worker else read(), rows_taken(reading, state))


def _in_thread(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    queue: Queue[Tensor | None] = Queue(READ_AHEAD)

    def put() -> None:
        for batch in batches:
            queue.put(batch)
        queue.put(None)

    Thread(target=put, daemon=True).start()
    while (batch := queue.get()) is not None:
        yield batch


MEMMAP = Contestant(
    "numpy memmap", lambda: None, _write, _open, elastic=True, note="the limit: one flat file; the worker is a thread"
)
