"""webdataset with its stock shuffle: 64 rows a sample, of which eight batches are made, and one row a sample."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.data_prep.bench.loaders.adapter import ROWS, Contestant, Opened, Reading, flat_rows
from tandem.data_prep.bench.loaders.synthetic_corpus import ROW_TOKENS, Corpus

SHARD_ROWS = 1 << 14
SHUFFLED_ROWS = 4_096
"""In the buffer that samples are shuffled in."""


def _imports() -> None:
    import webdataset  # noqa: F401


def _write(corpus: Corpus, folder: Path, *, sample_rows: int) -> None:
    from webdataset import TarWriter

    rows = flat_rows(corpus)
    for shard, first in enumerate(range(0, len(rows), SHARD_ROWS)):
        with TarWriter(str(folder / f"{shard:04d}.tar"), encoder=False) as tar:
            for start in range(first, min(first + SHARD_ROWS, len(rows)), sample_rows):
                data = rows[start : min(start + sample_rows, first + SHARD_ROWS)].tobytes()
                tar.write({"__key__": f"{start:08d}", "u16": data})


def _open(reading: Reading, state: Any, *, sample_rows: int) -> Opened:
    import webdataset
    from torch.utils.data import DataLoader

    shards = sorted(str(path) for path in reading.folder.glob("*.tar"))
    dataset = webdataset.WebDataset(
        shards, shardshuffle=len(shards), detshuffle=True, seed=reading.seed, empty_check=False
    )
    size = SHUFFLED_ROWS // sample_rows
    dataset = dataset.shuffle(size, initial=size, rng=random.Random(reading.seed))
    dataset = dataset.compose(partial(_single if sample_rows == 1 else _many, seed=reading.seed))
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=int(reading.worker)))
    # It has no state: what was read is read again.
    return Opened(islice(batches, state or 0, None), lambda count: (state or 0) + count)


def _rows(sample: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(sample["u16"], np.uint16).reshape(-1, ROW_TOKENS)


def _many(samples: Iterator[dict[str, Any]], *, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    for sample in samples:
        rows = _rows(sample)
        order = rng.permutation(len(rows))
        for first in range(0, len(rows) - ROWS + 1, ROWS):
            yield torch.from_numpy(rows[order[first : first + ROWS]].astype(np.int64))


def _single(samples: Iterator[dict[str, Any]], *, seed: int) -> Iterator[Tensor]:
    while len(rows := [_rows(sample) for sample in islice(samples, ROWS)]) == ROWS:
        yield torch.from_numpy(np.concatenate(rows).astype(np.int64))


def _contestant(name: str, sample_rows: int, note: str) -> Contestant:
    write: Callable[[Corpus, Path], None] = partial(_write, sample_rows=sample_rows)
    return Contestant(name, _imports, write, partial(_open, sample_rows=sample_rows), note=note)


MANY = _contestant("webdataset, 64 rows", 64, "eight batches of one sample; no state: a resume reads all again")
SINGLE = _contestant("webdataset, 1 row", 1, "no state: a resume reads all again")
