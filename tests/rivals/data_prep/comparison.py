"""Measure every pipeline in interleaved rounds, report medians, and compare the ids with the reference's."""

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

from tests.rivals.data_prep import process_measurement
from tests.rivals.data_prep.pipelines import (
    PIPELINES,
    REFERENCE_PIPELINE,
    Pipeline,
    PipelineRun,
    count_differing,
    count_document_hashes,
)
from tests.rivals.data_prep.text_files import TextFiles
from tests.rivals.options import INSTALL_HINT

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Gives every worker one thread, so that N workers use N cores."""


class PipelineFailed(Exception):
    """A command that was measured failed."""


@dataclass(frozen=True)
class PipelineResult:
    pipeline: str
    part: str
    """`whole`: files to ids on disk. `tokenizing`: texts in memory to ids, in one thread."""
    text_bytes: int = 0
    seconds: float | None = None
    bytes_per_second: float | None = None
    bytes_per_cpu_second: float | None = None
    cpu_seconds: float | None = None
    """CPU seconds of all processes."""
    peak_bytes: int | None = None
    """Peak memory of the largest process."""
    differing_documents: int | None = None
    """Documents whose ids differ from the reference's."""
    compared_documents: int | None = None
    note: str = ""
    workers: int = 1
    rounds: int = 0


def measure_pipelines(
    names: list[str], text: TextFiles, rival_text: TextFiles, tokenizer: Path, folder: Path, workers: int, rounds: int
) -> Iterator[PipelineResult]:
    """Yield a row for each pipeline, then a row for each tokenizer library alone.

    Raises: PipelineFailed if ours fails. A rival that fails gets a row with the reason.
    """
    whole: dict[str, list[dict[str, Any]]] = defaultdict(list)
    alone: dict[str, list[dict[str, Any]]] = defaultdict(list)
    hashes: dict[str, Counter[int]] = {}
    failures: dict[str, str] = {}
    for round_index in range(rounds):
        for pipeline in (PIPELINES[name] for name in names if name not in failures):
            run = PipelineRun(rival_text if pipeline.is_rival else text, tokenizer, folder / "output", workers)
            try:
                whole[pipeline.name].append(_measure_pipeline(pipeline, run, None if round_index else hashes))
                if pipeline.library is not None:
                    alone[pipeline.name].append(_measure_encoding(pipeline.library, rival_text, tokenizer, folder))
            except PipelineFailed as reason:
                if not pipeline.is_rival:
                    raise
                failures[pipeline.name] = str(reason)
    for name in names:
        if name in failures:
            yield PipelineResult(name, "whole", note=f"not measured: {failures[name]}", workers=workers, rounds=rounds)
            continue
        is_rival = PIPELINES[name].is_rival
        compared = _compare_ids(name, hashes, same_text=is_rival or text.names == rival_text.names)
        size = sum((rival_text if is_rival else text).bytes)
        yield _make_result(name, "whole", size, whole[name], workers, rounds, note=PIPELINES[name].note, **compared)
    for name in names:
        if alone[name] and name not in failures:
            yield _make_result(name, "tokenizing", sum(rival_text.bytes), alone[name], 1, rounds)


def _measure_pipeline(pipeline: Pipeline, run: PipelineRun, hashes: dict[str, Counter[int]] | None) -> dict[str, Any]:
    if pipeline.required_module is not None and find_spec(pipeline.required_module) is None:
        raise PipelineFailed(f"{pipeline.required_module} is not installed: {INSTALL_HINT}")
    shutil.rmtree(run.output, ignore_errors=True)
    run.output.mkdir()
    result = _measure_command(pipeline.name, pipeline.build_command(run), run.output.parent)
    if hashes is not None and pipeline.read_documents is not None:
        hashes[pipeline.name] = count_document_hashes(pipeline.read_documents(run))
    shutil.rmtree(run.output)
    return result


def _measure_encoding(library: str, text: TextFiles, tokenizer: Path, folder: Path) -> dict[str, Any]:
    file, program = folder / "alone.json", "tests.rivals.data_prep.encode_in_memory"
    command = [sys.executable, "-m", program, library, str(tokenizer), str(file), *text.paths]
    return _measure_command(library, command, folder) | json.loads(file.read_text())


def _measure_command(name: str, command: list[str], folder: Path) -> dict[str, Any]:
    result = process_measurement.measure_command(command, folder, dict(os.environ) | ENVIRONMENT)
    if result["exit_code"]:
        raise PipelineFailed(f"{name}: {result['last_line']}")
    return result


def _compare_ids(name: str, hashes: dict[str, Counter[int]], *, same_text: bool) -> dict[str, int]:
    if name not in hashes or REFERENCE_PIPELINE not in hashes:
        return {}
    reference = hashes[REFERENCE_PIPELINE]
    number = count_differing(reference, hashes[name], same_text=same_text)
    return {"differing_documents": number, "compared_documents": reference.total()}


def _make_result(
    name: str, part: str, size: int, measurements: list[dict[str, Any]], workers: int, rounds: int, **extra: Any
) -> PipelineResult:
    seconds, cpu = (median(one[key] for one in measurements) for key in ("seconds", "cpu_seconds"))
    peak = max(one["peak_bytes"] for one in measurements)
    return PipelineResult(
        name, part, size, seconds, size / seconds, size / cpu, cpu, peak, workers=workers, rounds=rounds, **extra
    )
