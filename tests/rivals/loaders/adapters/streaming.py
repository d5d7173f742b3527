"""mosaicml-streaming's MDS shards."""

from pathlib import Path
from typing import Any

from tests.rivals.loaders.adapter import MICRO_BATCH_SIZE, BatchStream, LoaderAdapter, PassConfig, flat_rows
from tests.rivals.loaders.synthetic_corpus import ROW_TOKENS, SyntheticCorpus


def _imports() -> None:
    import streaming  # noqa: F401


def _write(corpus: SyntheticCorpus, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{ROW_TOKENS}"}, exist_ok=True) as out:
        for row in flat_rows(corpus):
            out.write({"tokens": row})


def _open(reading: PassConfig, state: Any) -> BatchStream:
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    # Shared memory of a killed process stops the next one.
    clean_stale_shared_memory()
    dataset = StreamingDataset(
        local=str(reading.folder),
        shuffle=True,
        shuffle_seed=reading.seed,
        batch_size=MICRO_BATCH_SIZE,
        num_canonical_nodes=1,
    )
    loader = StreamingDataLoader(
        dataset, batch_size=MICRO_BATCH_SIZE, num_workers=int(reading.has_worker), drop_last=True
    )
    if state is not None:
        loader.load_state_dict(state)
    return BatchStream((batch["tokens"].long() for batch in loader), lambda count: loader.state_dict())


STREAMING = LoaderAdapter(
    "mosaicml-streaming", _imports, _write, _open,
    # Its pins (numpy below 2.2, transformers below 5) conflict with ours.
    install_hint="pip install --no-deps mosaicml-streaming, then the modules it fails to import",
)  # fmt: skip
