"""One measurement of one loader, in a process that did nothing before but import torch."""

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

from tandem.data_prep.bench.loaders.adapter import GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, LoaderAdapter, PassConfig
from tandem.data_prep.bench.loaders.adapters import ADAPTERS
from tandem.data_prep.bench.loaders.synthetic_corpus import ROW_TOKENS, SyntheticCorpus

QUIET_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
RESUME_FRACTION = 0.9
EXACT = "exact"


def run_task(task_settings: dict[str, Any]) -> None:
    """The result is in its file: what the task brings, or why it could not be done. What is printed is in the log."""
    log = os.open(task_settings["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    warnings.simplefilter("ignore")
    os.environ.update(QUIET_ENVIRONMENT)
    torch.set_num_threads(1)
    # As in a process of one's own; a worker of a DataLoader would otherwise import everything again.
    multiprocessing.set_start_method("fork", force=True)
    loader = ADAPTERS[task_settings["loader"]]
    corpus = SyntheticCorpus(Path(task_settings["corpus"]), task_settings["tokens"], task_settings["seed"])
    reading = PassConfig(corpus, Path(task_settings["folder"]), task_settings["seed"])
    try:
        loader.import_modules()
        result = TASKS[task_settings["task"]](loader, reading, task_settings)
    except ImportError as error:
        if loader.is_ours:
            raise
        result = {"refused": f"not installed ({error}): {loader.install_hint}"}
    Path(task_settings["result"]).write_text(json.dumps(result))


def write(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """The loader's form of the corpus is on disk: its bytes."""
    pass_config.folder.mkdir(parents=True)
    adapter.write_corpus(pass_config.corpus, pass_config.folder)
    folder = task_settings["counted"] or pass_config.folder
    return {"bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())}


def throughput(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """One pass: tokens per second, the clock started with the reading, or, with a worker, at the first batch."""
    opened = adapter.open_batches(replace(pass_config, has_worker=task_settings["worker"]), None)
    start = time.perf_counter()
    tokens = next(opened.batches).numel()
    end = time.perf_counter()
    if task_settings["worker"]:
        start, tokens = end, 0
    for batch in opened.batches:
        tokens += batch.numel()
        end = time.perf_counter()
        if end - start > task_settings["seconds"]:
            break
    return {"tokens_per_second": tokens / (end - start), "peak_bytes": _peak_bytes()}


def full_pass(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """One pass read to its end: the state at nine tenths, every row after it, the sum of all rows."""
    opened = adapter.open_batches(pass_config, None)
    before = _row_hashes(islice(opened.batches, _num_batches_before_resume(pass_config)))
    state = opened.state_after(_num_batches_before_resume(pass_config))
    after = _row_hashes(opened.batches)
    total = sum(before + after) % 2**64 if adapter.reads_flat_rows else None
    return {"state": state, "rows": after, "sum": total, "num_rows": len(before) + len(after)}


def resume(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """From the walk's state on: seconds to the first batch, and whether the rows are those of the walk."""
    start = time.perf_counter()
    opened = adapter.open_batches(pass_config, task_settings["state"])
    first = next(opened.batches)
    seconds = time.perf_counter() - start
    if not task_settings["rows"]:
        return {"seconds": seconds}
    return {
        "seconds": seconds,
        "same_ranks": compare_rows(task_settings["rows"], _row_hashes([first]) + _row_hashes(opened.batches)),
    }


def elastic(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """Half of a pass by 2 ranks, the rest by 3: the steps compared with those of one."""
    single_rank_rows = _step_rows(adapter, pass_config, 1, None)
    halfway = len(single_rank_rows) // 2 // GLOBAL_BATCH_SIZE
    two_rank_rows, state = _step_rows_and_state(adapter, pass_config, 2, None, halfway)
    three_rank_rows, _ = _step_rows_and_state(adapter, pass_config, 3, state, None)
    return {"other_ranks": compare_rows(single_rank_rows, two_rank_rows + three_rank_rows)}


def compare_rows(expected: list[int], found: list[int]) -> str:
    """Exact where the rows are the same in the same order; else what was lost and repeated."""
    if expected == found:
        return EXACT
    lost, repeated = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if not lost and not repeated:
        return "another order"
    return f"{lost.total():,} rows lost, {repeated.total():,} repeated"


def _num_batches_before_resume(reading: PassConfig) -> int:
    return int(RESUME_FRACTION * (reading.corpus.num_tokens // (MICRO_BATCH_SIZE * ROW_TOKENS)))


def _row_hashes(batches: Iterable[Tensor]) -> list[int]:
    """A hash of each row."""
    return [xxh3_64_intdigest(np.ascontiguousarray(row).data) for batch in batches for row in batch.numpy()]


def _step_rows(loader: LoaderAdapter, reading: PassConfig, dp_size: int, state: Any) -> list[int]:
    return _step_rows_and_state(loader, reading, dp_size, state, None)[0]


def _step_rows_and_state(
    loader: LoaderAdapter, reading: PassConfig, dp_size: int, state: Any, num_steps: int | None
) -> tuple[list[int], Any]:
    """Rows of every rank, step by step, and the first rank's state after them."""
    rows = GLOBAL_BATCH_SIZE // dp_size
    opened = [
        loader.open_batches(replace(reading, micro_batch_size=rows, dp_rank=rank, dp_size=dp_size), state)
        for rank in range(dp_size)
    ]
    found, taken = [], 0
    for batches in islice(zip(*(one.batches for one in opened), strict=True), num_steps):
        found += _row_hashes(batches)
        taken += 1
    return found, opened[0].state_after(taken)


def _peak_bytes() -> int:
    # Of this process alone; getrusage would count what its parent had in memory when it started it.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


TASKS: dict[str, Callable[[LoaderAdapter, PassConfig, dict[str, Any]], dict[str, Any]]] = {
    task.__name__: task for task in (write, throughput, full_pass, resume, elastic)
}
