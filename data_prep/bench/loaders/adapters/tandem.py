"""Our loader, which also gives targets, document indices and the evidence of what was read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.data_prep.bench.loaders.adapter import Contestant, Opened, Reading
from tandem.data_prep.bench.loaders.synthetic_corpus import OURS as FOLDER
from tandem.data_prep.bench.loaders.synthetic_corpus import ROW_TOKENS, VOCAB, Corpus

SEQ_LEN = ROW_TOKENS - 1


def _imports() -> None:
    import tandem.trainer.config
    import tandem.trainer.data.loader  # noqa: F401


def _write(corpus: Corpus, folder: Path) -> None:
    """It is there: what the others' forms are made from."""


def _open(reading: Reading, state: Any, changes: dict[str, Any]) -> Opened:
    from tandem.trainer import config
    from tandem.trainer.data.loader import Loader

    step_tokens = reading.rows * reading.ranks * SEQ_LEN
    tokens = reading.corpus.num_tokens // step_tokens * step_tokens
    phase = config.Phase("pass", tokens, SEQ_LEN, reading.rows * reading.ranks, reading.rows, {"corpus": 1.0})
    lr = config.Linear("linear", 1e-4, 1e-5, 0, None)
    data = config.Data({"corpus": str(reading.corpus.folder / FOLDER)}, **changes)
    if not reading.worker:
        data = replace(data, workers=0, prefetch_steps=0)
    loader = Loader(
        data,
        config.Schedule(None, [phase], lr),
        seed=reading.seed,
        vocab=VOCAB,
        dp_rank=reading.rank,
        dp_size=reading.ranks,
    )
    taken = (state or 0) // step_tokens
    batches = loader.batches(taken, None if state is None else {"corpus": state})
    return Opened((batch.tokens for batch in batches), lambda count: (state or 0) + count * step_tokens)


def _contestant(name: str, note: str, **changes: Any) -> Contestant:
    """Our loader with these fields of the config's `data` section, the others at their defaults."""
    return Contestant(
        name, _imports, _write, lambda reading, state: _open(reading, state, changes),
        note=note, same_rows=False, is_ours=True, elastic=True,
    )  # fmt: skip


OURS = _contestant("ours", "tokens, targets, documents and evidence of 8 x 2,048; the worker is a thread")
FINE = _contestant("ours, a block a row", "as fine a shuffle as that of the others", block_tokens=SEQ_LEN)
