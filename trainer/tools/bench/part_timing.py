"""Time the parts of a step in a separate step that synchronizes with the device at the end of each part.

The step is the trainer's; only its engine is replaced by one that reads the clock between its calls. Synchronizing makes the
step a little longer than a timed one, most of all if it consists of many small kernels.
"""

import time
from collections.abc import Iterator
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


class InstrumentedEngine(Engine):
    """An engine that shares the weights and state of another one and reads the clock at the end of every part."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        vars(self).update(vars(engine))
        self.part_seconds = dict.fromkeys(STEP_PARTS, 0.0)
        self._timed_device = device
        self._last_time = self._read_clock()

    def end_part(self, part: str) -> None:
        """Add the seconds since the last call to this part."""
        now = self._read_clock()
        self.part_seconds[part] += now - self._last_time
        self._last_time = now

    def _read_clock(self) -> float:
        if self._timed_device.type == "cuda":
            torch.cuda.synchronize(self._timed_device)
        return time.perf_counter()

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.end_part("data")
        losses = super().__call__(*arguments)
        self.end_part("forward")
        return losses

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Run the engine's backward, whose last call ends with the data-parallel reduction."""
        self.end_part("forward")
        reduce = self._deepspeed_engine.allreduce_gradients

        def timed_reduce() -> None:
            self.end_part("backward")
            reduce()
            self.end_part("update")

        self._deepspeed_engine.allreduce_gradients = timed_reduce
        try:
            super().backward(loss, is_last=is_last)
        finally:
            del self._deepspeed_engine.allreduce_gradients  # so that the class's method applies again
        self.end_part("backward")

    def grad_norm(self) -> Tensor:
        self.end_part("other")
        norm = super().grad_norm()
        self.end_part("update")
        return norm

    def update(self, lr: float, grad_norm: float | None = None) -> None:
        self.end_part("other")
        super().update(lr, grad_norm)
        self.end_part("update")


def run_instrumented_step(context: StepContext, batches: Iterator[Batch], step: int) -> tuple[float, dict[str, float]]:
    """Run update number `step`; return its seconds by the training loop's clock, and the seconds of its parts."""
    engine = InstrumentedEngine(context.engine, context.mesh.device)
    result = timed_train_step(replace(context, engine=engine), batches, step)
    assert result, "synthetic rows do not end"
    engine.end_part("other")
    return result.record.step_seconds, engine.part_seconds
