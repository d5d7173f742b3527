"""Rows: every way measured in rounds, one after the other in each, and the medians; ids compared with the reference's."""

import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from tandem.data_prep.bench import process_measurement
from tandem.data_prep.bench.pipelines import (
    INSTALL_HINT,
    PIPELINES,
    REFERENCE_PIPELINE,
    Pipeline,
    PipelineRun,
    count_differing,
    count_document_hashes,
)
from tandem.data_prep.bench.text_files import TextFiles

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""A worker is one thread: who has several workers uses several cores."""


class PipelineFailed(Exception):
    """What our own command said when it did not end well."""


@dataclass(frozen=True)
class PipelineResult:
    pipeline: str
    part: str
    """whole: files to ids on disk. tokenizing: texts in memory to ids, one thread."""
    text_bytes: int = 0
    seconds: float | None = None
    bytes_per_second: float | None = None
    bytes_per_cpu_second: float | None = None
    """Of one core: CPU seconds of all processes together."""
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    """Of the largest process."""
    differing_documents: int | None = None
    """Of those that the reference read too."""
    compared_documents: int | None = None
    note: str = ""
    workers: int = 1
    rounds: int = 0


def measure_pipelines(
    pipeline_names: list[str],
    text: TextFiles,
    rival_text: TextFiles,
    tokenizer: Path,
    folder: Path,
    workers: int,
    rounds: int,
) -> Iterator[PipelineResult]:
    """Of each way, the whole first, then the tokenizing of those that have a library. Raises: PipelineFailed where ours
    fails.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    hashes: dict[str, Counter[int]] = {}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name in pipeline_names:
            way = PIPELINES[name]
            if name in failures:
                continue
            try:
                job = PipelineRun(rival_text if way.is_rival else text, tokenizer, folder / "output", workers)
                found[name].append(_measure_pipeline(way, job, hashes if number == 0 else None))
                if way.library is not None:
                    found[f"{name} alone"].append(_measure_encoding(way.library, rival_text, tokenizer, folder))
            except PipelineFailed as reason:
                if not way.is_rival:
                    raise
                failures[name] = str(reason)
    same_text = text.names == rival_text.names
    for name in pipeline_names:
        if name in failures:
            yield PipelineResult(name, "whole", note=f"not measured: {failures[name]}", workers=workers, rounds=rounds)
            continue
        read = rival_text if PIPELINES[name].is_rival else text
        compared = _compare_ids(name, hashes, same_text=same_text or PIPELINES[name].is_rival)
        yield _make_result(name, "whole", read, found[name], workers, rounds, note=PIPELINES[name].note, **compared)
    for name in pipeline_names:
        if found[f"{name} alone"] and name not in failures:
            yield _make_result(name, "tokenizing", rival_text, found[f"{name} alone"], 1, rounds)


def _measure_pipeline(
    pipeline: Pipeline, pipeline_run: PipelineRun, hashes: dict[str, Counter[int]] | None
) -> dict[str, Any]:
    if pipeline.required_module is not None and find_spec(pipeline.required_module) is None:
        raise PipelineFailed(f"{pipeline.required_module} is not installed: {INSTALL_HINT}")
    shutil.rmtree(pipeline_run.output, ignore_errors=True)
    pipeline_run.output.mkdir()
    result = process_measurement.measure_command(
        pipeline.build_command(pipeline_run), pipeline_run.output.parent, dict(os.environ) | ENVIRONMENT
    )
    if result["exit_code"]:
        raise PipelineFailed(f"{pipeline.name}: {result['said']}")
    if hashes is not None and pipeline.read_documents is not None:
        hashes[pipeline.name] = count_document_hashes(pipeline.read_documents(pipeline_run))
    shutil.rmtree(pipeline_run.output)
    return result


def _measure_encoding(library: str, text: TextFiles, tokenizer: Path, folder: Path) -> dict[str, Any]:
    file = folder / "alone.json"
    command = [
        sys.executable,
        "-m",
        "tandem.data_prep.bench.encode_in_memory",
        library,
        str(tokenizer),
        str(file),
        *text.paths,
    ]
    result = process_measurement.measure_command(command, folder, dict(os.environ) | ENVIRONMENT)
    if result["exit_code"]:
        raise PipelineFailed(f"{library}: {result['said']}")
    found = json.loads(file.read_text())
    return result | {"seconds": found["encoding_seconds"], "cpu_seconds": found["encoding_cpu_seconds"]}


def _compare_ids(name: str, hashes: dict[str, Counter[int]], *, same_text: bool) -> dict[str, int]:
    if name not in hashes or REFERENCE_PIPELINE not in hashes:
        return {}
    reference = hashes[REFERENCE_PIPELINE]
    number = count_differing(reference, hashes[name], same_text=same_text)
    return {"differing_documents": number, "compared_documents": reference.total()}


def _make_result(
    name: str,
    part: str,
    text: TextFiles,
    measurements: list[dict[str, Any]],
    workers: int,
    rounds: int,
    **extra_fields: Any,
) -> PipelineResult:
    seconds, cpu = (median(one[key] for one in measurements) for key in ("seconds", "cpu_seconds"))
    size = sum(text.bytes)
    return PipelineResult(
        name, part, size, seconds, size / seconds, size / cpu, cpu, max(one["peak_bytes"] for one in measurements),
        workers=workers, rounds=rounds, **extra_fields,
    )  # fmt: skip
