"""Megatron-Core's GPTDataset over an indexed dataset: it shuffles documents and samples itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.rivals.loaders.adapter import (
    BatchStream,
    LoaderAdapter,
    PassConfig,
    index_batches,
    state_after_batches,
)
from tests.rivals.loaders.synthetic_corpus import EOS_ID, ROW_TOKENS, VOCAB_SIZE, SyntheticCorpus

FILE_PREFIX = "corpus"


def _imports() -> None:
    from megatron.core.datasets import gpt_dataset, indexed_dataset  # noqa: F401


def _write(corpus: SyntheticCorpus, folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / f"{FILE_PREFIX}.bin"), np.uint16)
    for document in corpus.iterate_documents():
        builder.add_document(document, [len(document)])
    builder.finalize(str(folder / f"{FILE_PREFIX}.idx"))


def _open(reading: PassConfig, state: Any) -> BatchStream:
    from torch.utils.data import DataLoader

    dataset = _dataset(reading)
    batches = [indices.tolist() for indices in index_batches(len(dataset), reading, state, shuffled=False)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=int(reading.has_worker), collate_fn=_collate)
    return BatchStream(iter(loader), state_after_batches(reading, state))


def _dataset(reading: PassConfig) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = str(reading.folder / FILE_PREFIX)
    tokenizer = SimpleNamespace(eod=EOS_ID, pad=EOS_ID, vocab_size=VOCAB_SIZE, unique_identifiers={"class": "none"})
    settings = GPTDatasetConfig(
        random_seed=reading.seed, sequence_length=ROW_TOKENS - 1, path_to_cache=str(reading.folder / "indices"),
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, split="1,0,0",
    )  # fmt: skip
    indexed = IndexedDataset(prefix, mmap=True)
    return GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, settings)


def _collate(samples: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([torch.cat((sample["tokens"], sample["labels"][-1:])) for sample in samples])


MEGATRON = LoaderAdapter(
    "Megatron-Core GPTDataset", _imports, _write, _open, reads_flat_rows=False, is_elastic=True,
    note="with our sampler; its samples also have masks and positions",
)  # fmt: skip
