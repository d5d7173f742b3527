"""Measure every loader in interleaved rounds and report medians."""

import json
import multiprocessing
from collections import defaultdict
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from statistics import median
from typing import Any

from tests.rivals.loaders import measurement
from tests.rivals.loaders.adapters import ADAPTERS
from tests.rivals.loaders.synthetic_corpus import SHARDS_FOLDER, SyntheticCorpus, write_corpus

TIMEOUT_SECONDS = 900


class MeasurementFailed(Exception):
    """A loader could not be measured."""


@dataclass(frozen=True)
class LoaderResult:
    loader: str
    tokens_per_second: float | None = None
    """Reads in the calling process."""
    worker_tokens_per_second: float | None = None
    """Reads with one prefetching worker."""
    bytes_per_token: float | None = None
    """Size on disk."""
    resume_seconds: float | None = None
    """From after the imports to the first batch, at nine tenths of the pass."""
    peak_bytes: int | None = None
    """Of the reading process without a worker, mapped file pages included."""
    same_ranks: str = ""
    """Rows of a resume on the same ranks, compared with an uninterrupted pass; empty if not measured."""
    other_ranks: str = ""
    """The same for a pass that 2 ranks begin and 3 ranks end."""
    note: str = ""
    corpus_tokens: int = 0
    rounds: int = 0


def compare_loaders(names: list[str], corpus: SyntheticCorpus, rounds: int, seconds: float) -> list[LoaderResult]:
    """Return a row for every name. Raises: MeasurementFailed if ours cannot be measured."""
    write_corpus(corpus)
    found: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in names}
    failures: dict[str, str] = {}

    def measure(name: str, task: str, **settings: Any) -> dict[str, Any]:
        if name in failures:
            return {}
        try:
            result = _measure_in_process(name, corpus, task, settings)
        except MeasurementFailed as reason:
            if ADAPTERS[name].is_ours:
                raise
            failures[name] = str(reason)
            return {}
        for key, value in result.items():
            found[name][key].append(value)
        return result

    for name in names:
        measure(name, "write", counted=str(corpus.folder / SHARDS_FOLDER) if ADAPTERS[name].is_ours else None)
    full_passes = {name: measure(name, "full_pass") for name in names}
    _check_sums(full_passes, failures)
    for round_index in range(rounds):
        for worker in (False, True):
            for name in names:
                result = measure(name, "throughput", worker=worker, seconds=seconds)
                found[name][f"worker {worker}"] += [result["tokens_per_second"]] if result else []
        for name, full_pass in full_passes.items():
            rows = full_pass.get("rows") if round_index == 0 else None
            measure(name, "resume", state=full_pass.get("state"), rows=rows)
    for name in names:
        if ADAPTERS[name].is_elastic:
            measure(name, "elastic")
    return [_make_result(name, corpus, rounds, found[name], failures.get(name, "")) for name in names]


def _measure_in_process(name: str, corpus: SyntheticCorpus, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    folder_name = "".join(character if character.isalnum() else "-" for character in name)
    result, log = corpus.folder / "result.json", corpus.folder / "log.txt"
    result.unlink(missing_ok=True)
    task_settings = {
        "loader": name, "task": task, "corpus": str(corpus.folder), "tokens": corpus.num_tokens,
        "folder": str(corpus.folder / "formats" / folder_name), "result": str(result), "log": str(log), **settings,
    }  # fmt: skip
    process = _forkserver_context().Process(target=measurement.run_task, args=(task_settings,))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise MeasurementFailed(f"{task} did not end within {TIMEOUT_SECONDS} s")
    if not result.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise MeasurementFailed(f"{task}: {(lines or [f'exit code {process.exitcode}'])[-1].strip()[:200]}")
    values: dict[str, Any] = json.loads(result.read_text())
    if "refused" in values:
        raise MeasurementFailed(values["refused"])
    return values


def _forkserver_context() -> ForkServerContext:
    """Fork every measurement from one process that has imported torch and opened nothing: equal and fast starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measurement.__name__])
    return context


def _check_sums(full_passes: dict[str, dict[str, Any]], failures: dict[str, str]) -> None:
    """Fail loaders that read other rows than the flat file contains."""
    sums = {name: one["sum"] for name, one in full_passes.items() if one and one["sum"] is not None}
    expected = sums.get("numpy memmap", next(iter(sums.values()), None))
    for name, total in sums.items():
        if total != expected:
            failures[name] = f"its pass of {full_passes[name]['num_rows']:,} rows is not the corpus"


def _make_result(
    name: str, corpus: SyntheticCorpus, rounds: int, measurements: dict[str, list[Any]], failure: str
) -> LoaderResult:
    if failure:
        return LoaderResult(name, note=f"not measured: {failure}", corpus_tokens=corpus.num_tokens, rounds=rounds)
    return LoaderResult(
        name,
        tokens_per_second=median(measurements["worker False"]),
        worker_tokens_per_second=median(measurements["worker True"]),
        bytes_per_token=measurements["bytes"][0] / corpus.num_tokens,
        resume_seconds=median(measurements["seconds"]),
        peak_bytes=measurements["peak_bytes"][0],
        same_ranks="".join(measurements["same_ranks"]),
        other_ranks="".join(measurements["other_ranks"]),
        note=ADAPTERS[name].note,
        corpus_tokens=corpus.num_tokens,
        rounds=rounds,
    )
