"""webdataset with its own shuffle: 64 rows a sample (eight batches), and one row a sample."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.rivals.loaders.adapter import MICRO_BATCH_SIZE, BatchStream, LoaderAdapter, PassConfig, flat_rows
from tests.rivals.loaders.synthetic_corpus import ROW_TOKENS, SyntheticCorpus

SHARD_ROWS = 1 << 14
SHUFFLE_BUFFER_ROWS = 4_096
"""Rows in the shuffle buffer."""


def _imports() -> None:
    import webdataset  # noqa: F401


def _write(corpus: SyntheticCorpus, folder: Path, *, sample_rows: int) -> None:
    from webdataset import TarWriter

    rows = flat_rows(corpus)
    for shard, first in enumerate(range(0, len(rows), SHARD_ROWS)):
        with TarWriter(str(folder / f"{shard:04d}.tar"), encoder=False) as tar:
            for start in range(first, min(first + SHARD_ROWS, len(rows)), sample_rows):
                data = rows[start : min(start + sample_rows, first + SHARD_ROWS)].tobytes()
                tar.write({"__key__": f"{start:08d}", "u16": data})


def _open(reading: PassConfig, state: Any, *, sample_rows: int) -> BatchStream:
    import webdataset
    from torch.utils.data import DataLoader

    shards = sorted(str(path) for path in reading.folder.glob("*.tar"))
    dataset = webdataset.WebDataset(
        shards, shardshuffle=len(shards), detshuffle=True, seed=reading.seed, empty_check=False
    )
    size = SHUFFLE_BUFFER_ROWS // sample_rows
    dataset = dataset.shuffle(size, initial=size, rng=random.Random(reading.seed))
    dataset = dataset.compose(
        partial(_batches_across_samples if sample_rows == 1 else _batches_within_sample, seed=reading.seed)
    )
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=int(reading.has_worker)))
    # It has no state, so a resume reads the skipped batches again.
    return BatchStream(islice(batches, state or 0, None), lambda count: (state or 0) + count)


def _read_rows(sample: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(sample["u16"], np.uint16).reshape(-1, ROW_TOKENS)


def _batches_within_sample(samples: Iterator[dict[str, Any]], *, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    for sample in samples:
        rows = _read_rows(sample)
        order = rng.permutation(len(rows))
        for first in range(0, len(rows) - MICRO_BATCH_SIZE + 1, MICRO_BATCH_SIZE):
            yield torch.from_numpy(rows[order[first : first + MICRO_BATCH_SIZE]].astype(np.int64))


def _batches_across_samples(samples: Iterator[dict[str, Any]], *, seed: int) -> Iterator[Tensor]:
    while len(rows := [_read_rows(sample) for sample in islice(samples, MICRO_BATCH_SIZE)]) == MICRO_BATCH_SIZE:
        yield torch.from_numpy(np.concatenate(rows).astype(np.int64))


def _make_adapter(name: str, sample_rows: int, note: str) -> LoaderAdapter:
    write: Callable[[SyntheticCorpus, Path], None] = partial(_write, sample_rows=sample_rows)
    return LoaderAdapter(name, _imports, write, partial(_open, sample_rows=sample_rows), note=note)


WEBDATASET_MULTI_ROW = _make_adapter(
    "webdataset, 64 rows", 64, "eight batches from one sample; no state: a resume reads from the beginning"
)
WEBDATASET_SINGLE_ROW = _make_adapter("webdataset, 1 row", 1, "no state: a resume reads from the beginning")
