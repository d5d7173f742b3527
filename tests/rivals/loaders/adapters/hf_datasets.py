"""Hugging Face datasets, map style: rows in Arrow files, with our sampler."""

from pathlib import Path
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
from tests.rivals.loaders.synthetic_corpus import ROW_TOKENS, SyntheticCorpus


def _imports() -> None:
    import datasets  # noqa: F401


def _write(corpus: SyntheticCorpus, folder: Path) -> None:
    import pyarrow
    from datasets import Dataset, Features, List, Value

    rows = flat_rows(corpus)
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), ROW_TOKENS)
    features = Features({"tokens": List(Value("uint16"), length=ROW_TOKENS)})
    Dataset(pyarrow.table({"tokens": column}, schema=features.arrow_schema)).save_to_disk(folder)


def _open(reading: PassConfig, state: Any) -> BatchStream:
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    dataset = load_from_disk(str(reading.folder)).with_format("numpy")
    batches = [indices.tolist() for indices in index_batches(len(dataset), reading, state)]
    collate: Any = _collate  # torch's type hints do not allow a dict as a batch
    loader = DataLoader(
        dataset, sampler=batches, batch_size=None, num_workers=int(reading.has_worker), collate_fn=collate
    )
    return BatchStream(iter(loader), state_after_batches(reading, state))


def _collate(batch: dict[str, Any]) -> Tensor:
    return torch.from_numpy(batch["tokens"].astype(np.int64))


HF_DATASETS = LoaderAdapter("HF datasets, map style", _imports, _write, _open, is_elastic=True, note="with our sampler")
