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
from tandem.data_prep.bench.pipelines import INSTALL, REFERENCE, WAYS, Job, Way, differing, hashed
from tandem.data_prep.bench.text_files import Text

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""A worker is one thread: who has several workers uses several cores."""


class Failed(Exception):
    """What our own command said when it did not end well."""


@dataclass(frozen=True)
class Row:
    way: str
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


def rows(
    names: list[str], text: Text, share: Text, tokenizer: Path, folder: Path, workers: int, rounds: int
) -> Iterator[Row]:
    """Of each way, the whole first, then the tokenizing of those that have a library. Raises: Failed where ours fails."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    hashes: dict[str, Counter[int]] = {}
    refused: dict[str, str] = {}
    for number in range(rounds):
        for name in names:
            way = WAYS[name]
            if name in refused:
                continue
            try:
                job = Job(share if way.rival else text, tokenizer, folder / "output", workers)
                found[name].append(_whole(way, job, hashes if number == 0 else None))
                if way.alone is not None:
                    found[f"{name} alone"].append(_alone(way.alone, share, tokenizer, folder))
            except Failed as reason:
                if not way.rival:
                    raise
                refused[name] = str(reason)
    same_text = text.names == share.names
    for name in names:
        if name in refused:
            yield Row(name, "whole", note=f"not measured: {refused[name]}", workers=workers, rounds=rounds)
            continue
        read = share if WAYS[name].rival else text
        compared = _compared(name, hashes, same_text=same_text or WAYS[name].rival)
        yield _row(name, "whole", read, found[name], workers, rounds, note=WAYS[name].note, **compared)
    for name in names:
        if found[f"{name} alone"] and name not in refused:
            yield _row(name, "tokenizing", share, found[f"{name} alone"], 1, rounds)


def _whole(way: Way, job: Job, hashes: dict[str, Counter[int]] | None) -> dict[str, Any]:
    if way.needs is not None and find_spec(way.needs) is None:
        raise Failed(f"{way.needs} is not installed: {INSTALL}")
    shutil.rmtree(job.output, ignore_errors=True)
    job.output.mkdir()
    result = process_measurement.measured(way.command(job), job.output.parent, dict(os.environ) | ENVIRONMENT)
    if result["exit_code"]:
        raise Failed(f"{way.name}: {result['said']}")
    if hashes is not None and way.documents is not None:
        hashes[way.name] = hashed(way.documents(job))
    shutil.rmtree(job.output)
    return result


def _alone(library: str, text: Text, tokenizer: Path, folder: Path) -> dict[str, Any]:
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
    result = process_measurement.measured(command, folder, dict(os.environ) | ENVIRONMENT)
    if result["exit_code"]:
        raise Failed(f"{library}: {result['said']}")
    found = json.loads(file.read_text())
    return result | {"seconds": found["encoding_seconds"], "cpu_seconds": found["encoding_cpu_seconds"]}


def _compared(name: str, hashes: dict[str, Counter[int]], *, same_text: bool) -> dict[str, int]:
    if name not in hashes or REFERENCE not in hashes:
        return {}
    reference = hashes[REFERENCE]
    number = differing(reference, hashes[name], same_text=same_text)
    return {"differing_documents": number, "compared_documents": reference.total()}


def _row(name: str, part: str, text: Text, found: list[dict[str, Any]], workers: int, rounds: int, **known: Any) -> Row:
    seconds, cpu = (median(one[key] for one in found) for key in ("seconds", "cpu_seconds"))
    size = sum(text.bytes)
    return Row(
        name, part, size, seconds, size / seconds, size / cpu, cpu, max(one["peak_bytes"] for one in found),
        workers=workers, rounds=rounds, **known,
    )  # fmt: skip
