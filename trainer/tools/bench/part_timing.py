"""Time the parts of a step in a separate step that synchronizes with the device at the end of each part.

The step is the trainer's; only its engine is replaced by one that reads the clock between its calls. Synchronizing makes the
step a little longer than a timed one, most of all if it consists of many small kernels.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.run_state import StepContext
from tandem.trainer.train import timed_train_step

STEP_PARTS = ("data", "forward", "backward", "update", "other")
"""data: copy of the rows to the device. backward: includes the fp32 sum over micro-batches. update: data-parallel reduction,
clipping, AdamW and the all-gather of the weights."""


class PartTimer:
    """Adds the seconds since the last call of `end_part` to the part that ends."""

    def __init__(self, device: torch.device) -> None:
        self.part_seconds = dict.fromkeys(STEP_PARTS, 0.0)
        self._device = device
        self._last_time = self._read_clock()

    def end_part(self, part: str) -> None:
        now = self._read_clock()
        self.part_seconds[part] += now - self._last_time
        self._last_time = now

    def _read_clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class InstrumentedEngine(Engine):
    """An engine that shares the weights and state of another one and calls `end_part` at the end of every part."""

    def __init__(self, engine: Engine, end_part: Callable[[str], None]) -> None:
        vars(self).update(vars(engine))
        self._end_part = end_part

    def __call__(self, *arguments: Tensor) -> Tensor:
        self._end_part("data")
        losses = super().__call__(*arguments)
        self._end_part("forward")
        return losses

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Run the engine's backward, whose last call ends with the data-parallel reduction."""
        self._end_part("forward")
        reduce = self._deepspeed_engine.allreduce_gradients

        def timed_reduce() -> None:
            self._end_part("backward")
            reduce()
            self._end_part("update")

        self._deepspeed_engine.allreduce_gradients = timed_reduce
        try:
            super().backward(loss, is_last=is_last)
        finally:
            del self._deepspeed_engine.allreduce_gradients  # so that the class's method applies again
        self._end_part("backward")

    def grad_norm(self) -> Tensor:
        self._end_part("other")
        norm = super().grad_norm()
        self._end_part("update")
        return norm

    def update(self, lr: float, grad_norm: float | None = None) -> None:
        self._end_part("other")
        super().update(lr, grad_norm)
        self._end_part("update")


def run_instrumented_step(context: StepContext, batches: Iterator[Batch], step: int) -> tuple[float, dict[str, float]]:
    """Run update number `step`; return its seconds by the training loop's clock, and the seconds of its parts."""
    timer = PartTimer(context.mesh.device)
    instrumented_context = replace(context, engine=InstrumentedEngine(context.engine, timer.end_part))
    result = timed_train_step(instrumented_context, batches, step)
    assert result, "synthetic rows do not end"
    timer.end_part("other")
    return result.record.step_seconds, timer.part_seconds
