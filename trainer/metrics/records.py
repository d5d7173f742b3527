"""The records of a run, and `Sinks` that write them.

A record is a small dict with a `kind`: start, step, validation, checkpoint, rollback or end. `metrics.jsonl` in the run folder
has all records; wandb and the console show the same stream. The file only grows: steps that are repeated after a crash or a
rollback are written again, and `history.read_history` drops the records that a start or rollback undid. The record of a
checkpoint is written when it is committed, some steps after its own.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tandem.trainer import journal
from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.metrics.console import ConsoleSink
from tandem.trainer.metrics.wandb_sink import WandbSink

METRICS_FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One finished step: the fields of a `step` record."""

    step: int
    """Number of finished steps, this one included."""
    tokens: int
    """Tokens consumed so far, in the whole run."""
    phase: str
    seq_len: int
    global_batch_size: int
    loss: float
    """Mean over the tokens of the step, in nats."""
    lr: float
    grad_norm: float
    """Norm over all parameters, before clipping."""
    skipped: bool = field(default=False, kw_only=True)
    """Whether the guard found the step bad, so that its update was skipped."""
    step_seconds: float
    """From the request for the batch until the update is queued on the device, data_seconds included; without validations and
    saves. The device may finish the update after that, which then usually counts for the next step."""
    data_seconds: float
    """Wait for this rank's batch and for the other ranks' batches. The device may still be busy with the previous update."""
    tokens_per_second: float
    """All devices together."""
    mfu: float
    """Share of the devices' peak, with attention counted in full."""
    mfu_causal: float
    """The same with attention counted at its causal half."""
    memory_gib: float | None
    """Peak allocation on a device so far; null on a CPU."""
    time: float
    """Unix time at the end of the step."""


@runtime_checkable
class Sink(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """The destinations of a run's records. On ranks other than 0 there are none and each method does nothing.

    An error of the first sink, which keeps the records, stops the run. The others are views: after an error, a view is closed.
    """

    def __init__(self, sinks: list[Sink], start_step: int) -> None:
        self._sinks = list(sinks)
        self._start_step = start_step

    def write_start(
        self, *, tokens: int, world_size: int, tp_size: int, dp_size: int, total_steps: int, total_tokens: int,
        start_seconds: Mapping[str, float] = {},
    ) -> None:  # fmt: skip
        """Record a start. `tokens` have been consumed up to its step; `start_seconds` has the parts of the start-up time."""
        self._write(
            "start", step=self._start_step, tokens=tokens, world_size=world_size, tp_size=tp_size, dp_size=dp_size,
            total_steps=total_steps, total_tokens=total_tokens, start_seconds=dict(start_seconds),
        )  # fmt: skip

    def write_step(self, record: StepRecord) -> None:
        self._write("step", **dataclasses.asdict(record))

    def write_validation(self, step: int, tokens: int, loss: float) -> None:
        perplexity = math.exp(loss) if loss < 700 else math.inf
        self._write("validation", step=step, tokens=tokens, loss=loss, perplexity=perplexity)

    def write_checkpoint(self, step: int, seconds: float, num_bytes: int, *, stall_seconds: float = 0.0) -> None:
        """Record that the checkpoint of `step` was committed after `seconds`, of which training waited `stall_seconds`."""
        self._write("checkpoint", step=step, seconds=seconds, stall_seconds=stall_seconds, bytes=num_bytes)

    def write_rollback(self, step: int, from_step: int, reason: str) -> None:
        """Record that the run continues from its checkpoint of `step` and has undone the steps up to `from_step`."""
        self._write("rollback", step=step, from_step=from_step, reason=reason)

    def write_end(self, step: int, reason: str) -> None:
        self._write("end", step=step, reason=reason)

    def close(self) -> None:
        for sink in self._sinks[1:]:
            self._call_view(sink, sink.close)
        for sink in self._sinks[:1]:
            sink.close()

    def _write(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, "time": time.time(), **fields}
        for sink in self._sinks[:1]:
            sink.write(record)
        for sink in self._sinks[1:]:
            self._call_view(sink, partial(sink.write, record))

    def _call_view(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # rich exits if a pipe is closed
            if sink in self._sinks:
                self._sinks.remove(sink)
                log.warning("%s: failed (%r); training continues without it", type(sink).__name__, error)
                self._call_view(sink, sink.close)


def open_sinks(folder: Path, config: TrainConfig, *, rank: int, start_step: int) -> Sinks:
    """Open the run folder's file, the console and wandb on rank 0; other ranks write nothing."""
    if rank != 0:
        return Sinks([], start_step)
    folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [JsonLinesSink(folder / METRICS_FILE), ConsoleSink(config.log.every_steps)]
    if config.log.wandb != "disabled":
        sinks.append(WandbSink(folder, config))
    return Sinks(sinks, start_step)


class JsonLinesSink:
    """Appends each record as one line in one write, so that a kill loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self._file = journal.open_journal(path)

    def write(self, record: dict[str, Any]) -> None:
        # JSON has no NaN and no infinity; readers treat null as NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            journal.append_record(self._file, finite)
        except OSError as error:
            raise UserError(
                f"{self._file.name}: a record cannot be written ({error.strerror}); free disk space and start again: the run "
                "continues from its last checkpoint"
            ) from None

    def close(self) -> None:
        self._file.close()
