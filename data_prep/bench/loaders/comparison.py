"""Rows: every loader measured in rounds, one after the other in each, and the medians."""

import json
import multiprocessing
import shutil
from collections import defaultdict
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import median
from typing import Any

from tandem.data_prep.bench.loaders import measurement
from tandem.data_prep.bench.loaders.adapters import ADAPTERS
from tandem.data_prep.bench.loaders.synthetic_corpus import SHARDS_FOLDER, SyntheticCorpus, write_corpus

TIMEOUT_SECONDS = 900


class MeasurementFailed(Exception):
    """Why a loader has no figures."""


@dataclass(frozen=True)
class LoaderResult:
    loader: str
    tokens_per_second: float | None = None
    """In the reading process."""
    worker_tokens_per_second: float | None = None
    """With one worker reading ahead."""
    bytes_per_token: float | None = None
    """On disk."""
    resume_seconds: float | None = None
    """After the imports, to the first batch at nine tenths."""
    peak_bytes: int | None = None
    """Of the reading process without a worker; pages of mapped files among them."""
    same_ranks: str = ""
    """What a resume on the same ranks read, compared with the pass it goes on with; empty: not measured."""
    other_ranks: str = ""
    """The same for a pass that 2 ranks begin and 3 end."""
    note: str = ""
    corpus_tokens: int = 0
    rounds: int = 0


def compare_loaders(
    loader_names: list[str], corpus: SyntheticCorpus, rounds: int, seconds: float
) -> list[LoaderResult]:
    """A row for everyone named. Raises: MeasurementFailed where there are no figures of ours."""
    write_corpus(corpus)
    found: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in loader_names}
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

    for name in loader_names:
        _write_loader_corpus(name, corpus, measure)
    full_passes = {name: measure(name, "full_pass") for name in loader_names}
    _check_sums(full_passes, failures)
    for number in range(rounds):
        for worker in (False, True):
            for name in loader_names:
                result = measure(name, "throughput", worker=worker, seconds=seconds)
                found[name][f"worker {worker}"] += [result["tokens_per_second"]] if result else []
        for name, walked in full_passes.items():
            rest = walked.get("rows") if number == 0 else None
            measure(name, "resume", state=walked.get("state"), rows=rest)
    for name in loader_names:
        if ADAPTERS[name].is_elastic:
            measure(name, "elastic")
    return [_make_result(name, corpus, rounds, found[name], failures.get(name, "")) for name in loader_names]


def _write_loader_corpus(name: str, corpus: SyntheticCorpus, measure: Any) -> None:
    """The loader's form of the corpus is in its folder, whole."""
    folder = _loader_folder(name, corpus)
    size = folder.with_suffix(".bytes")
    if not size.exists():
        shutil.rmtree(folder, ignore_errors=True)
        counted = str(corpus.folder / SHARDS_FOLDER) if ADAPTERS[name].is_ours else None
        if result := measure(name, "write", counted=counted):
            size.write_text(str(result["bytes"]))
    else:
        measure(name, "size", known=int(size.read_text()))


def _loader_folder(name: str, corpus: SyntheticCorpus) -> Path:
    return corpus.folder / "forms" / "".join(character if character.isalnum() else "-" for character in name)


def _measure_in_process(name: str, corpus: SyntheticCorpus, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    if task == "size":
        return {"bytes": settings["known"]}
    folder, result = _loader_folder(name, corpus), corpus.folder / "result.json"
    folder.parent.mkdir(exist_ok=True)
    result.unlink(missing_ok=True)
    log = corpus.folder / "log.txt"
    task_settings = {
        "loader": name, "task": task, "corpus": str(corpus.folder), "tokens": corpus.num_tokens, "seed": corpus.seed,
        "folder": str(folder), "result": str(result), "log": str(log), **settings,
    }  # fmt: skip
    process = _forkserver_context().Process(target=measurement.run_task, args=(task_settings,))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise MeasurementFailed(f"{task} did not end within {TIMEOUT_SECONDS} s")
    if not result.exists():
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise MeasurementFailed(f"{task}: {(said or [f'exit code {process.exitcode}'])[-1].strip()[:200]}")
    values: dict[str, Any] = json.loads(result.read_text())
    if "refused" in values:
        raise MeasurementFailed(values["refused"])
    return values


def _forkserver_context() -> ForkServerContext:
    """Of which each is forked from one that has imported torch and opened nothing: all begin alike, and at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measurement.__name__])
    return context


def _check_sums(full_passes: dict[str, dict[str, Any]], failures: dict[str, str]) -> None:
    """Who reads other rows than most of those that should read the same is not measured further."""
    sums = {name: walked["sum"] for name, walked in full_passes.items() if walked and walked["sum"] is not None}
    expected = sums.get("numpy memmap", next(iter(sums.values()), None))
    for name, total in sums.items():
        if total != expected:
            failures[name] = f"its pass of {full_passes[name]['num_rows']:,} rows is not the corpus"


def _make_result(
    name: str, corpus: SyntheticCorpus, rounds: int, measurements: dict[str, list[Any]], failure: str
) -> LoaderResult:
    def middle(key: str) -> float | None:
        return median(measurements[key]) if measurements[key] else None

    if failure:
        return LoaderResult(name, note=f"not measured: {failure}", corpus_tokens=corpus.num_tokens, rounds=rounds)
    return LoaderResult(
        name,
        tokens_per_second=middle("worker False"),
        worker_tokens_per_second=middle("worker True"),
        bytes_per_token=measurements["bytes"][0] / corpus.num_tokens,
        resume_seconds=middle("seconds"),
        peak_bytes=measurements["peak_bytes"][0],
        same_ranks="".join(measurements["same_ranks"]),
        other_ranks="".join(measurements["other_ranks"]),
        note=ADAPTERS[name].note,
        corpus_tokens=corpus.num_tokens,
        rounds=rounds,
    )
