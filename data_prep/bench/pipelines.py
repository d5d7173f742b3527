"""From text to ids on disk: who, and by which command."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from tandem.data_prep.bench import baseline_script
from tandem.data_prep.bench.text_files import Text
from tandem.trainer.data import manifest

INSTALL = "pip install 'tandem[bench]'"
REFERENCE = "HF tokenizers, script"


@dataclass(frozen=True)
class Job:
    text: Text
    tokenizer: Path
    output: Path
    workers: int


@dataclass(frozen=True)
class Way:
    name: str
    needs: str | None
    """The module without which it cannot run."""
    command: Callable[[Job], list[str]]
    documents: Callable[[Job], Iterable[np.ndarray]] | None
    """What it left on disk; None where that is not read."""
    note: str = ""
    alone: str | None = None
    """Its library, which is also measured alone."""
    rival: bool = True


def _ours(job: Job) -> list[str]:
    return [
        sys.executable, "-m", "tandem.trainer", "prepare", "--input", str(job.text.folder), "--glob", "*.jsonl.zst",
        "--output", str(job.output / "corpus"), "--tokenizer", str(job.tokenizer), "--workers", str(job.workers),
    ]  # fmt: skip


def _script(library: str, job: Job) -> list[str]:
    to = [str(job.tokenizer), str(job.output), str(job.workers)]
    return [sys.executable, "-m", "tandem.data_prep.bench.baseline_script", library, *to, *job.text.paths]


def _datatrove(job: Job) -> list[str]:
    to = [str(job.tokenizer), str(job.output), str(job.workers), str(job.text.folder)]
    return [sys.executable, "-m", "tandem.data_prep.bench.datatrove_pipeline", *to]


def _documents_of_ours(job: Job) -> Iterator[np.ndarray]:
    """Of both splits, from the bytes of the shards."""
    folder = job.output / "corpus"
    corpus = manifest.load(folder)
    for shard in [*corpus.train.shards, *corpus.validation.shards]:
        tokens = _tokens(folder / shard.file, corpus, shard)
        yield from np.split(tokens, np.flatnonzero(tokens == corpus.eos_id)[:-1] + 1)


def _tokens(path: Path, corpus: manifest.Manifest, shard: manifest.Shard) -> np.ndarray:
    size = corpus.sample_tokens
    starts = range(0, shard.tokens, size)
    return np.concatenate([
        np.fromfile(path, corpus.dtype, min(size, shard.tokens - start), offset=corpus.sample_offset(start // size))
        for start in starts
    ])  # fmt: skip


def _documents_of_script(job: Job) -> Iterator[np.ndarray]:
    return baseline_script.written(job.output, baseline_script.ids(job.tokenizer.read_text())[1])


def hashed(documents: Iterable[np.ndarray]) -> Counter[int]:
    """How often each document occurs, by a hash of its ids."""
    return Counter(xxh3_64_intdigest(np.ascontiguousarray(document, np.uint32).data) for document in documents)


def differing(reference: Counter[int], found: Counter[int], *, same_text: bool) -> int:
    """Documents whose ids differ; `found` may have read more text unless that was the same."""
    lost = (reference - found).total()
    return max(lost, (found - reference).total()) if same_text else lost


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("tandem prepare", None, _ours, _documents_of_ours, "with shuffle, hashes, checks", "ours", rival=False),
        Way(REFERENCE, None, partial(_script, "tokenizers"), _documents_of_script, "the reference", "tokenizers"),
        Way("tiktoken, script", "tiktoken", partial(_script, "tiktoken"), _documents_of_script, alone="tiktoken"),
        Way("datatrove", "datatrove", _datatrove, None, "shuffles within its files"),
    )
}  # fmt: skip
