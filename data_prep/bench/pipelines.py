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
from tandem.data_prep.bench.text_files import TextFiles
from tandem.trainer.data import manifest

INSTALL_HINT = "pip install 'tandem[bench]'"
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
    """The module without which it cannot run."""
    build_command: Callable[[PipelineRun], list[str]]
    read_documents: Callable[[PipelineRun], Iterable[np.ndarray]] | None
    """What it left on disk; None where that is not read."""
    note: str = ""
    library: str | None = None
    """Its library, which is also measured alone."""
    is_rival: bool = True


def _tandem_command(pipeline_run: PipelineRun) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tandem.trainer",
        "prepare",
        "--input",
        str(pipeline_run.text.folder),
        "--glob",
        "*.jsonl.zst",
        "--output",
        str(pipeline_run.output / "corpus"),
        "--tokenizer",
        str(pipeline_run.tokenizer_path),
        "--workers",
        str(pipeline_run.workers),
    ]


def _script_command(library: str, pipeline_run: PipelineRun) -> list[str]:
    to = [str(pipeline_run.tokenizer_path), str(pipeline_run.output), str(pipeline_run.workers)]
    return [sys.executable, "-m", "tandem.data_prep.bench.baseline_script", library, *to, *pipeline_run.text.paths]


def _datatrove_command(pipeline_run: PipelineRun) -> list[str]:
    to = [
        str(pipeline_run.tokenizer_path),
        str(pipeline_run.output),
        str(pipeline_run.workers),
        str(pipeline_run.text.folder),
    ]
    return [sys.executable, "-m", "tandem.data_prep.bench.datatrove_pipeline", *to]


def _read_tandem_documents(pipeline_run: PipelineRun) -> Iterator[np.ndarray]:
    """Of both splits, from the bytes of the shards."""
    folder = pipeline_run.output / "corpus"
    corpus_manifest = manifest.load_manifest(folder)
    for shard in [*corpus_manifest.train.shards, *corpus_manifest.validation.shards]:
        tokens = _read_shard_tokens(folder / shard.file, corpus_manifest, shard)
        yield from np.split(tokens, np.flatnonzero(tokens == corpus_manifest.eos_id)[:-1] + 1)


def _read_shard_tokens(path: Path, corpus_manifest: manifest.CorpusManifest, shard: manifest.Shard) -> np.ndarray:
    size = corpus_manifest.sample_tokens
    starts = range(0, shard.tokens, size)
    return np.concatenate([
        np.fromfile(path, corpus_manifest.dtype, min(size, shard.tokens - start),
                    offset=corpus_manifest.sample_offset(start // size))
        for start in starts
    ])  # fmt: skip


def _read_script_documents(pipeline_run: PipelineRun) -> Iterator[np.ndarray]:
    return baseline_script.read_token_documents(
        pipeline_run.output, baseline_script.eos_id_and_dtype(pipeline_run.tokenizer_path.read_text())[1]
    )


def count_document_hashes(documents: Iterable[np.ndarray]) -> Counter[int]:
    """How often each document occurs, by a hash of its ids."""
    return Counter(xxh3_64_intdigest(np.ascontiguousarray(document, np.uint32).data) for document in documents)


def count_differing(reference: Counter[int], found: Counter[int], *, same_text: bool) -> int:
    """Documents whose ids differ; `found` may have read more text unless that was the same."""
    lost = (reference - found).total()
    return max(lost, (found - reference).total()) if same_text else lost


PIPELINES: dict[str, Pipeline] = {
    way.name: way
    for way in (
        Pipeline(
            "tandem prepare",
            None,
            _tandem_command,
            _read_tandem_documents,
            "with shuffle, hashes, checks",
            "tandem",
            is_rival=False,
        ),
        Pipeline(
            REFERENCE_PIPELINE,
            None,
            partial(_script_command, "tokenizers"),
            _read_script_documents,
            "the reference",
            "tokenizers",
        ),
        Pipeline(
            "tiktoken, script",
            "tiktoken",
            partial(_script_command, "tiktoken"),
            _read_script_documents,
            library="tiktoken",
        ),
        Pipeline("datatrove", "datatrove", _datatrove_command, None, "shuffles within its files"),
    )
}
