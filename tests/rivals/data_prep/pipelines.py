"""The pipelines from text to ids on disk, and the command of each."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from tandem.trainer.data import manifest
from tests.rivals.data_prep import baseline_script
from tests.rivals.data_prep.text_files import TextFiles

REFERENCE_PIPELINE = "HF tokenizers, script"


@dataclass(frozen=True)
class PipelineRun:
    text: TextFiles
    tokenizer_path: Path
    output: Path
    workers: int


@dataclass(frozen=True)
class Pipeline:
    name: str
    required_module: str | None
    """A module that it needs and that may not be installed."""
    build_command: Callable[[PipelineRun], list[str]]
    read_documents: Callable[[PipelineRun], Iterable[np.ndarray]] | None
    """Reads the documents it wrote; None if they are not compared."""
    note: str = ""
    library: str | None = None
    """Its tokenizer library, which is also measured alone."""
    is_rival: bool = True


def _tandem_command(run: PipelineRun) -> list[str]:
    return [
        *(sys.executable, "-m", "tandem.trainer", "prepare", "--input", str(run.text.folder), "--glob", "*.jsonl.zst"),
        *(
            "--output",
            str(run.output / "corpus"),
            "--tokenizer",
            str(run.tokenizer_path),
            "--workers",
            str(run.workers),
        ),
    ]


def _script_command(library: str, run: PipelineRun) -> list[str]:
    arguments = [library, str(run.tokenizer_path), str(run.output), str(run.workers), *run.text.paths]
    return [sys.executable, "-m", "tests.rivals.data_prep.baseline_script", *arguments]


def _datatrove_command(run: PipelineRun) -> list[str]:
    arguments = [str(run.tokenizer_path), str(run.output), str(run.workers), str(run.text.folder)]
    return [sys.executable, "-m", "tests.rivals.data_prep.datatrove_pipeline", *arguments]


def _read_tandem_documents(run: PipelineRun) -> Iterator[np.ndarray]:
    """Read the documents of both splits from the bytes of the shards."""
    folder = run.output / "corpus"
    corpus_manifest = manifest.load_manifest(folder)
    for shard in [*corpus_manifest.train.shards, *corpus_manifest.validation.shards]:
        tokens = _read_shard_tokens(folder / shard.file, corpus_manifest, shard)
        yield from np.split(tokens, np.flatnonzero(tokens == corpus_manifest.eos_id)[:-1] + 1)


def _read_shard_tokens(path: Path, corpus_manifest: manifest.CorpusManifest, shard: manifest.Shard) -> np.ndarray:
    size, dtype = corpus_manifest.sample_tokens, corpus_manifest.dtype
    return np.concatenate([
        np.fromfile(path, dtype, min(size, shard.tokens - start), offset=corpus_manifest.sample_offset(start // size))
        for start in range(0, shard.tokens, size)
    ])  # fmt: skip


def _read_script_documents(run: PipelineRun) -> Iterator[np.ndarray]:
    _, dtype = baseline_script.eos_id_and_dtype(run.tokenizer_path.read_text())
    return baseline_script.read_token_documents(run.output, dtype)


def count_document_hashes(documents: Iterable[np.ndarray]) -> Counter[int]:
    """Count the documents by a hash of their ids."""
    return Counter(xxh3_64_intdigest(np.ascontiguousarray(document, np.uint32).data) for document in documents)


def count_differing(reference: Counter[int], found: Counter[int], *, same_text: bool) -> int:
    """Count documents whose ids differ. Unless `same_text`, `found` may contain more documents than the reference."""
    missing = (reference - found).total()
    return max(missing, (found - reference).total()) if same_text else missing


PIPELINES: dict[str, Pipeline] = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline("tandem prepare", None, _tandem_command, _read_tandem_documents,
                 "with shuffle, hashes, checks", "tandem", is_rival=False),
        Pipeline(REFERENCE_PIPELINE, None, partial(_script_command, "tokenizers"), _read_script_documents,
                 "the reference", "tokenizers"),
        Pipeline("tiktoken, script", "tiktoken", partial(_script_command, "tiktoken"), _read_script_documents,
                 library="tiktoken"),
        Pipeline("datatrove", "datatrove", _datatrove_command, None, "shuffles within its files"),
    )
}  # fmt: skip
