"""Hugging Face datasets, map style: rows in Arrow files, and a sampler of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.data_prep.bench.loaders.adapter import Contestant, Opened, Reading, flat_rows, index_batches, rows_taken
from tandem.data_prep.bench.loaders.synthetic_corpus import ROW_TOKENS, Corpus


def _imports() -> None:
    import datasets  # noqa: F401


def _write(corpus: Corpus, folder: Path) -> None:
    import pyarrow
    from datasets import Dataset, Features, List, Value

    rows = flat_rows(corpus)
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), ROW_TOKENS)
    features = Features({"tokens": List(Value("uint16"), length=ROW_TOKENS)})
    Dataset(pyarrow.table({"tokens": column}, schema=features.arrow_schema)).save_to_disk(folder)


def _open(reading: Reading, state: Any) -> Opened:
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    dataset = load_from_disk(str(reading.folder)).with_format("numpy")
    batches = [indices.tolist() for indices in index_batches(len(dataset), reading, state)]
    collate: Any = _collated  # torch's types know no batch that is a dict
    loader = DataLoader(dataset, sampler=batches, batch_size=None, num_workers=int(reading.worker), collate_fn=collate)
    return Opened(iter(loader), rows_taken(reading, state))


def _collated(batch: dict[str, Any]) -> Tensor:
    return torch.from_numpy(batch["tokens"].astype(np.int64))


MAPPED = Contestant("HF datasets, map style", _imports, _write, _open, elastic=True, note="with the bench's sampler")
