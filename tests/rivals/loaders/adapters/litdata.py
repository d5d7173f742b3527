"""litdata's token chunks."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.rivals.loaders.adapter import MICRO_BATCH_SIZE, BatchStream, LoaderAdapter, PassConfig, flat_rows
from tests.rivals.loaders.synthetic_corpus import ROW_TOKENS, SyntheticCorpus

CHUNK_ROWS = 4_096


def _imports() -> None:
    import litdata  # noqa: F401


def _write(corpus: SyntheticCorpus, folder: Path) -> None:
    from litdata import TokensLoader, optimize

    # Chunks of whole rows: litdata never reads a partial row at the end of a chunk.
    optimize(
        partial(_chunk, corpus), list(range(-(-len(flat_rows(corpus)) // CHUNK_ROWS))), output_dir=str(folder),
        chunk_size=CHUNK_ROWS * ROW_TOKENS, num_workers=1, item_loader=TokensLoader(), verbose=False,
    )  # fmt: skip


def _chunk(corpus: SyntheticCorpus, index: int) -> Iterator[Tensor]:
    rows = flat_rows(corpus)[index * CHUNK_ROWS : (index + 1) * CHUNK_ROWS]
    yield torch.from_numpy(rows.reshape(-1).copy())


def _open(reading: PassConfig, state: Any) -> BatchStream:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(reading.folder), item_loader=TokensLoader(ROW_TOKENS), shuffle=True, seed=reading.seed, drop_last=True
    )
    loader = StreamingDataLoader(
        dataset, batch_size=MICRO_BATCH_SIZE, num_workers=int(reading.has_worker), drop_last=True
    )
    if state is not None:
        loader.load_state_dict(state)
    return BatchStream((batch.long() for batch in loader), lambda count: loader.state_dict())


LITDATA = LoaderAdapter("litdata", _imports, _write, _open)
