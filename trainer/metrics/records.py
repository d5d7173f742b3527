"""What a run says about itself: the fields of its records, and `Sinks` that write them.

`metrics.jsonl` in the run folder is the record; wandb and the console are views of the same stream of small
dicts, each with a `kind`: start, step, validation, checkpoint, rollback, end. The one idea: the file only grows.
After a crash, and when the run goes back to its last checkpoint by itself, the steps since then are written again,
and `history.read_history` lets each start and rollback cut away what it takes back. A checkpoint's record is written when it is
committed, some steps after its own.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tandem.trainer import journal
from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.metrics.console import ConsoleSink
from tandem.trainer.metrics.wandb_sink import WandbSink

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One finished step; the fields of a `step` line."""

    step: int
    """Finished steps, from 1."""
    tokens: int
    """Trained on so far, in the whole run."""
    phase: str
    seq_len: int
    global_batch_size: int
    loss: float
    """Mean over the tokens of the step, in nats."""
    lr: float
    grad_norm: float
    """Global, before clipping."""
    skipped: bool = field(default=False, kw_only=True)
    """The update was left out: the guard found the step bad."""
    step_seconds: float
    """From asking for the batch until the update is handed to the device, data_seconds included; validations and saves are not
    in it. The device ends the update while what follows begins, and its rest counts there, so in the next step as a rule."""
    data_seconds: float
    """Of these, waiting for the batch, and for the other ranks to have theirs; the device may be at work on the last update."""
    tokens_per_second: float
    """Of the whole run, all devices together."""
    mfu: float
    """Share of the devices' peak, attention counted in full."""
    mfu_causal: float
    """The same with attention counted at the causal half."""
    memory_gib: float | None
    """Largest allocation on a device so far; null where there is none to ask."""
    time: float
    """Unix time at the end of the step."""


@runtime_checkable
class Sink(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """The places a run reports to; without any (every rank but 0) each method does nothing."""

    def __init__(self, sinks: list[Sink], start_step: int) -> None:
        self._sinks = sinks
        self._start_step = start_step

    def write_start(
        self,
        *,
        tokens: int,
        world_size: int,
        tp_size: int,
        dp_size: int,
        total_steps: int,
        total_tokens: int,
        start_seconds: Mapping[str, float] = {},
    ) -> None:
        """`tokens` are those behind the run at the step it resumes from, 0 for a new run; `start_seconds` the parts of the time
        from the start of the process to here.
        """
        sizes = {"world_size": world_size, "tp_size": tp_size, "dp_size": dp_size}
        totals = {"total_steps": total_steps, "total_tokens": total_tokens}
        seconds = dict(start_seconds)
        self._write("start", step=self._start_step, tokens=tokens, **sizes, **totals, start_seconds=seconds)

    def write_step(self, record: StepRecord) -> None:
        self._write("step", **dataclasses.asdict(record))

    def write_validation(self, step: int, tokens: int, loss: float) -> None:
        perplexity = math.exp(loss) if loss < 700 else math.inf
        self._write("validation", step=step, tokens=tokens, loss=loss, perplexity=perplexity)

    def write_checkpoint(self, step: int, seconds: float, num_bytes: int, *, stall_seconds: float = 0.0) -> None:
        """The checkpoint of `step` is committed, `seconds` after that was decided; training waited `stall_seconds`."""
        self._write("checkpoint", step=step, seconds=seconds, stall_seconds=stall_seconds, bytes=num_bytes)

    def write_rollback(self, step: int, from_step: int, reason: str) -> None:
        """The run goes on after `step`, where its last checkpoint is; the steps up to `from_step` are taken back."""
        self._write("rollback", step=step, from_step=from_step, reason=reason)

    def write_end(self, step: int, reason: str) -> None:
        self._write("end", step=step, reason=reason)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _write(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, "time": time.time(), **fields}
        for sink in self._sinks:
            sink.write(record)


def open_sinks(folder: Path, config: TrainConfig, *, rank: int, start_step: int) -> Sinks:
    """Sinks into the run folder, wandb and the console on rank 0; sinks that do nothing on the others."""
    if rank != 0:
        return Sinks([], start_step)
    folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [JsonLinesSink(folder / METRICS_FILE), ConsoleSink(config.log.every_steps)]
    if config.log.wandb != "disabled":
        sinks.append(WandbSink(folder, config))
    return Sinks(sinks, start_step)


class JsonLinesSink:
    """Appends each record as one line, in one write, so that a kill loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self._file = journal.open_journal(path)

    def write(self, record: dict[str, Any]) -> None:
        # JSON has no NaN and no infinity; readers take null for "not a number".
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            journal.append_record(self._file, finite)
        except OSError as error:
            raise UserError(
                f"{self._file.name}: a record cannot be written ({error.strerror}); make room and start again: the run goes on "
                "from its last checkpoint"
            ) from None

    def close(self) -> None:
        self._file.close()
