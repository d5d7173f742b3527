"""One measurement of one contestant, in a process that did nothing before but import torch."""

import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from tandem.data_prep.bench.loaders.adapter import ROWS, STEP_ROWS, Contestant, Reading
from tandem.data_prep.bench.loaders.adapters import CONTESTANTS
from tandem.data_prep.bench.loaders.synthetic_corpus import ROW_TOKENS, Corpus

QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
READ_BEFORE_RESUME = 0.9
EXACT = "exact"


def measure(task: dict[str, Any]) -> None:
    """The result is in its file: what the task brings, or why it could not be done. What is printed is in the log."""
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    warnings.simplefilter("ignore")
    os.environ.update(QUIET)
    torch.set_num_threads(1)
    # As in a process of one's own; a worker of a DataLoader would otherwise import everything again.
    multiprocessing.set_start_method("fork", force=True)
    contestant = CONTESTANTS[task["contestant"]]
    corpus = Corpus(Path(task["corpus"]), task["tokens"], task["seed"])
    reading = Reading(corpus, Path(task["folder"]), task["seed"])
    try:
        contestant.imports()
        result = TASKS[task["task"]](contestant, reading, task)
    except ImportError as error:
        if contestant.is_ours:
            raise
        result = {"refused": f"not installed ({error}): {contestant.install}"}
    Path(task["result"]).write_text(json.dumps(result))


def write(contestant: Contestant, reading: Reading, task: dict[str, Any]) -> dict[str, Any]:
    """The contestant's form of the corpus is on disk: its bytes."""
    reading.folder.mkdir(parents=True)
    contestant.write(reading.corpus, reading.folder)
    folder = task["counted"] or reading.folder
    return {"bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())}


def through(contestant: Contestant, reading: Reading, task: dict[str, Any]) -> dict[str, Any]:
    """One pass: tokens per second, the clock started with the reading, or, with a worker, at the first batch."""
    opened = contestant.open(replace(reading, worker=task["worker"]), None)
    start = time.perf_counter()
    tokens = next(opened.batches).numel()
    end = time.perf_counter()
    if task["worker"]:
        start, tokens = end, 0
    for batch in opened.batches:
        tokens += batch.numel()
        end = time.perf_counter()
        if end - start > task["seconds"]:
            break
    return {"tokens_per_second": tokens / (end - start), "peak_bytes": _peak_bytes()}


def walk(contestant: Contestant, reading: Reading, task: dict[str, Any]) -> dict[str, Any]:
    """One pass read to its end: the state at nine tenths, every row after it, the sum of all rows."""
    opened = contestant.open(reading, None)
    before = _rows(islice(opened.batches, _batches_before(reading)))
    state = opened.state(_batches_before(reading))
    after = _rows(opened.batches)
    total = sum(before + after) % 2**64 if contestant.same_rows else None
    return {"state": state, "rows": after, "sum": total, "num_rows": len(before) + len(after)}


def resume(contestant: Contestant, reading: Reading, task: dict[str, Any]) -> dict[str, Any]:
    """From the walk's state on: seconds to the first batch, and whether the rows are those of the walk."""
    start = time.perf_counter()
    opened = contestant.open(reading, task["state"])
    first = next(opened.batches)
    seconds = time.perf_counter() - start
    if not task["rows"]:
        return {"seconds": seconds}
    return {"seconds": seconds, "same_ranks": compared(task["rows"], _rows([first]) + _rows(opened.batches))}


def elastic(contestant: Contestant, reading: Reading, task: dict[str, Any]) -> dict[str, Any]:
    """Half of a pass by 2 ranks, the rest by 3: the steps compared with those of one."""
    whole = _steps(contestant, reading, 1, None)
    halfway = len(whole) // 2 // STEP_ROWS
    two, state = _steps_and_state(contestant, reading, 2, None, halfway)
    three, _ = _steps_and_state(contestant, reading, 3, state, None)
    return {"other_ranks": compared(whole, two + three)}


def compared(expected: list[int], found: list[int]) -> str:
    """Exact where the rows are the same in the same order; else what was lost and repeated."""
    if expected == found:
        return EXACT
    lost, repeated = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if not lost and not repeated:
        return "another order"
    return f"{lost.total():,} rows lost, {repeated.total():,} repeated"


def _batches_before(reading: Reading) -> int:
    return int(READ_BEFORE_RESUME * (reading.corpus.num_tokens // (ROWS * ROW_TOKENS)))


def _rows(batches: Iterable[Tensor]) -> list[int]:
    """A hash of each row."""
    return [xxh3_64_intdigest(np.ascontiguousarray(row).data) for batch in batches for row in batch.numpy()]


def _steps(contestant: Contestant, reading: Reading, ranks: int, state: Any) -> list[int]:
    return _steps_and_state(contestant, reading, ranks, state, None)[0]


def _steps_and_state(
    contestant: Contestant, reading: Reading, ranks: int, state: Any, steps: int | None
) -> tuple[list[int], Any]:
    """Rows of every rank, step by step, and the first rank's state after them."""
    rows = STEP_ROWS // ranks
    opened = [contestant.open(replace(reading, rows=rows, rank=rank, ranks=ranks), state) for rank in range(ranks)]
    found, taken = [], 0
    for batches in islice(zip(*(one.batches for one in opened), strict=True), steps):
        found += _rows(batches)
        taken += 1
    return found, opened[0].state(taken)


def _peak_bytes() -> int:
    # Of this process alone; getrusage would count what its parent had in memory when it started it.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


TASKS: dict[str, Callable[[Contestant, Reading, dict[str, Any]], dict[str, Any]]] = {
    task.__name__: task for task in (write, through, walk, resume, elastic)
}
