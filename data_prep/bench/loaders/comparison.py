"""Rows: every contestant measured in rounds, one after the other in each, and the medians."""

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
from tandem.data_prep.bench.loaders.adapters import CONTESTANTS
from tandem.data_prep.bench.loaders.synthetic_corpus import OURS, Corpus, written

TIMEOUT_SECONDS = 900


class Refused(Exception):
    """Why a contestant has no figures."""


@dataclass(frozen=True)
class Row:
    contestant: str
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


def compare(names: list[str], corpus: Corpus, rounds: int, seconds: float) -> list[Row]:
    """A row for everyone named. Raises: Refused where there are no figures of ours."""
    written(corpus)
    found: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in names}
    refused: dict[str, str] = {}

    def measure(name: str, task: str, **settings: Any) -> dict[str, Any]:
        if name in refused:
            return {}
        try:
            result = _measured(name, corpus, task, settings)
        except Refused as reason:
            if CONTESTANTS[name].is_ours:
                raise
            refused[name] = str(reason)
            return {}
        for key, value in result.items():
            found[name][key].append(value)
        return result

    for name in names:
        _form(name, corpus, measure)
    walks = {name: measure(name, "walk") for name in names}
    _check_sums(walks, refused)
    for number in range(rounds):
        for worker in (False, True):
            for name in names:
                result = measure(name, "through", worker=worker, seconds=seconds)
                found[name][f"worker {worker}"] += [result["tokens_per_second"]] if result else []
        for name, walked in walks.items():
            rest = walked.get("rows") if number == 0 else None
            measure(name, "resume", state=walked.get("state"), rows=rest)
    for name in names:
        if CONTESTANTS[name].elastic:
            measure(name, "elastic")
    return [_row(name, corpus, rounds, found[name], refused.get(name, "")) for name in names]


def _form(name: str, corpus: Corpus, measure: Any) -> None:
    """The contestant's form of the corpus is in its folder, whole."""
    folder = _folder(name, corpus)
    size = folder.with_suffix(".bytes")
    if not size.exists():
        shutil.rmtree(folder, ignore_errors=True)
        counted = str(corpus.folder / OURS) if CONTESTANTS[name].is_ours else None
        if result := measure(name, "write", counted=counted):
            size.write_text(str(result["bytes"]))
    else:
        measure(name, "size", known=int(size.read_text()))


def _folder(name: str, corpus: Corpus) -> Path:
    return corpus.folder / "forms" / "".join(character if character.isalnum() else "-" for character in name)


def _measured(name: str, corpus: Corpus, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    if task == "size":
        return {"bytes": settings["known"]}
    folder, result = _folder(name, corpus), corpus.folder / "result.json"
    folder.parent.mkdir(exist_ok=True)
    result.unlink(missing_ok=True)
    log = corpus.folder / "log.txt"
    whole = {
        "contestant": name, "task": task, "corpus": str(corpus.folder), "tokens": corpus.num_tokens, "seed": corpus.seed,
        "folder": str(folder), "result": str(result), "log": str(log), **settings,
    }  # fmt: skip
    process = _processes().Process(target=measurement.measure, args=(whole,))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise Refused(f"{task} did not end within {TIMEOUT_SECONDS} s")
    if not result.exists():
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Refused(f"{task}: {(said or [f'exit code {process.exitcode}'])[-1].strip()[:200]}")
    values: dict[str, Any] = json.loads(result.read_text())
    if "refused" in values:
        raise Refused(values["refused"])
    return values


def _processes() -> ForkServerContext:
    """Of which each is forked from one that has imported torch and opened nothing: all begin alike, and at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measurement.__name__])
    return context


def _check_sums(walks: dict[str, dict[str, Any]], refused: dict[str, str]) -> None:
    """Who reads other rows than most of those that should read the same is not measured further."""
    sums = {name: walked["sum"] for name, walked in walks.items() if walked and walked["sum"] is not None}
    expected = sums.get("numpy memmap", next(iter(sums.values()), None))
    for name, total in sums.items():
        if total != expected:
            refused[name] = f"its pass of {walks[name]['num_rows']:,} rows is not the corpus"


def _row(name: str, corpus: Corpus, rounds: int, found: dict[str, list[Any]], refused: str) -> Row:
    def middle(key: str) -> float | None:
        return median(found[key]) if found[key] else None

    if refused:
        return Row(name, note=f"not measured: {refused}", corpus_tokens=corpus.num_tokens, rounds=rounds)
    return Row(
        name,
        tokens_per_second=middle("worker False"),
        worker_tokens_per_second=middle("worker True"),
        bytes_per_token=found["bytes"][0] / corpus.num_tokens,
        resume_seconds=middle("seconds"),
        peak_bytes=found["peak_bytes"][0],
        same_ranks="".join(found["same_ranks"]),
        other_ranks="".join(found["other_ranks"]),
        note=CONTESTANTS[name].note,
        corpus_tokens=corpus.num_tokens,
        rounds=rounds,
    )
