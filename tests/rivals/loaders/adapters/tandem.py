"""Our loader, which also returns targets, document indices and a hash of the data read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.rivals.loaders.adapter import BatchStream, LoaderAdapter, PassConfig
from tests.rivals.loaders.synthetic_corpus import ROW_TOKENS, VOCAB_SIZE, SyntheticCorpus
from tests.rivals.loaders.synthetic_corpus import SHARDS_FOLDER as FOLDER

SEQ_LEN = ROW_TOKENS - 1


def _imports() -> None:
    import tandem.trainer.config
    import tandem.trainer.data.loader  # noqa: F401


def _write(corpus: SyntheticCorpus, folder: Path) -> None:
    """Nothing to do: the corpus is already written as our shards."""


def _open(reading: PassConfig, state: Any, data_overrides: dict[str, Any]) -> BatchStream:
    from tandem.trainer import config
    from tandem.trainer.data.loader import Loader

    step_tokens = reading.micro_batch_size * reading.dp_size * SEQ_LEN
    tokens = reading.corpus.num_tokens // step_tokens * step_tokens
    phase = config.PhaseConfig(
        "pass", tokens, SEQ_LEN, reading.micro_batch_size * reading.dp_size, reading.micro_batch_size, {"corpus": 1.0}
    )
    lr = config.LinearLRConfig("linear", 1e-4, 1e-5, 0, None)
    data = config.DataConfig({"corpus": str(reading.corpus.folder / FOLDER)}, **data_overrides)
    if not reading.has_worker:
        data = replace(data, num_workers=0, prefetch_steps=0)
    schedule = config.ScheduleConfig(None, [phase], lr)
    ranks = {"dp_rank": reading.dp_rank, "dp_size": reading.dp_size}
    loader = Loader(data, schedule, seed=reading.seed, vocab_size=VOCAB_SIZE, **ranks)
    num_steps_read = (state or 0) // step_tokens
    batches = loader.batches(num_steps_read, None if state is None else {"corpus": state})
    return BatchStream((batch.tokens for batch in batches), lambda count: (state or 0) + count * step_tokens)


def _make_adapter(name: str, note: str, **changes: Any) -> LoaderAdapter:
    """Our loader with these fields of the config's `data` section; the others keep their defaults."""
    return LoaderAdapter(
        name, _imports, _write, lambda reading, state: _open(reading, state, changes),
        note=note, reads_flat_rows=False, is_ours=True, is_elastic=True,
    )  # fmt: skip


TANDEM = _make_adapter("ours", "also returns targets, documents, hashes; the worker is a thread")
TANDEM_ROW_BLOCKS = _make_adapter(
    "ours, a block a row", "shuffles as finely as the others", shuffle_block_tokens=SEQ_LEN
)
