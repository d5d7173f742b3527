"""One measurement of one loader, in a process that has only imported torch."""

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

from tests.rivals.loaders.adapter import GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, LoaderAdapter, PassConfig
from tests.rivals.loaders.adapters import ADAPTERS
from tests.rivals.loaders.synthetic_corpus import ROW_TOKENS, SEED, SyntheticCorpus

QUIET_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
RESUME_FRACTION = 0.9
EXACT = "exact"


def run_task(task_settings: dict[str, Any]) -> None:
    """Run a task and write its result, or the reason it was refused, to a file. Send output to the log."""
    log = os.open(task_settings["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    warnings.simplefilter("ignore")
    os.environ.update(QUIET_ENVIRONMENT)
    torch.set_num_threads(1)
    # The default of an ordinary process on Linux; otherwise a DataLoader worker imports everything again.
    multiprocessing.set_start_method("fork", force=True)
    loader = ADAPTERS[task_settings["loader"]]
    corpus = SyntheticCorpus(Path(task_settings["corpus"]), task_settings["tokens"])
    reading = PassConfig(corpus, Path(task_settings["folder"]), SEED)
    try:
        loader.import_modules()
        result = TASKS[task_settings["task"]](loader, reading, task_settings)
    except ImportError as error:
        if loader.is_ours:
            raise
        result = {"refused": f"not installed ({error}): {loader.install_hint}"}
    Path(task_settings["result"]).write_text(json.dumps(result))


def write(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """Write the corpus in the loader's format and return its bytes."""
    pass_config.folder.mkdir(parents=True)
    adapter.write_corpus(pass_config.corpus, pass_config.folder)
    folder = task_settings["counted"] or pass_config.folder
    return {"bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())}


def throughput(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """Measure tokens per second of one pass. The clock starts with the reading or, with a worker, at the first batch."""
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
    """Read one pass to the end: the state at nine tenths, hashes of the rows after it, the sum of all hashes."""
    opened = adapter.open_batches(pass_config, None)
    before = _row_hashes(islice(opened.batches, _num_batches_before_resume(pass_config)))
    state = opened.state_after(_num_batches_before_resume(pass_config))
    after = _row_hashes(opened.batches)
    total = sum(before + after) % 2**64 if adapter.reads_flat_rows else None
    return {"state": state, "rows": after, "sum": total, "num_rows": len(before) + len(after)}


def resume(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """Resume from the state of `full_pass`: seconds to the first batch, and whether the rows are the same."""
    start = time.perf_counter()
    opened = adapter.open_batches(pass_config, task_settings["state"])
    first = next(opened.batches)
    seconds = time.perf_counter() - start
    if not task_settings["rows"]:
        return {"seconds": seconds}
    found = _row_hashes([first]) + _row_hashes(opened.batches)
    return {"seconds": seconds, "same_ranks": compare_rows(task_settings["rows"], found)}


def elastic(adapter: LoaderAdapter, pass_config: PassConfig, task_settings: dict[str, Any]) -> dict[str, Any]:
    """Read half of a pass on 2 ranks and the rest on 3, and compare the steps with those of one rank."""
    single_rank_rows, _ = _step_rows_and_state(adapter, pass_config, 1, None, None)
    halfway = len(single_rank_rows) // 2 // GLOBAL_BATCH_SIZE
    two_rank_rows, state = _step_rows_and_state(adapter, pass_config, 2, None, halfway)
    three_rank_rows, _ = _step_rows_and_state(adapter, pass_config, 3, state, None)
    return {"other_ranks": compare_rows(single_rank_rows, two_rank_rows + three_rank_rows)}


def compare_rows(expected: list[int], found: list[int]) -> str:
    """Return EXACT for the same rows in the same order, otherwise what was lost and repeated."""
    if expected == found:
        return EXACT
    lost, repeated = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if not lost and not repeated:
        return "another order"
    return f"{lost.total():,} rows lost, {repeated.total():,} repeated"


def _num_batches_before_resume(reading: PassConfig) -> int:
    return int(RESUME_FRACTION * (reading.corpus.num_tokens // (MICRO_BATCH_SIZE * ROW_TOKENS)))


def _row_hashes(batches: Iterable[Tensor]) -> list[int]:
    return [xxh3_64_intdigest(np.ascontiguousarray(row).data) for batch in batches for row in batch.numpy()]


def _step_rows_and_state(
    loader: LoaderAdapter, reading: PassConfig, dp_size: int, state: Any, num_steps: int | None
) -> tuple[list[int], Any]:
    """Return the rows of every rank, step by step, and the first rank's state after them."""
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
    # getrusage would also count the memory that the parent had when it started this process.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


TASKS: dict[str, Callable[[LoaderAdapter, PassConfig, dict[str, Any]], dict[str, Any]]] = {
    task.__name__: task for task in (write, throughput, full_pass, resume, elastic)
}
