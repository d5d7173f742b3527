"""Where the time of a step goes, in a step of its own: the device is waited for wherever one part gives way to the next.

The step is the trainer's; only its engine is replaced, by one that reads the clock around what it is asked for. Waiting costs
time, so such a step is a little longer than a timed one, the more so where the device works in many small pieces.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.run_state import Stepper
from tandem.trainer.train import timed_step

PARTS = ("data", "forward", "backward", "update", "other")
"""data: rows to the device; backward: with the sum of micro-batches in fp32; update: data-parallel reduction, clipping, AdamW
and the gathering of weights."""


class Clock:
    """Seconds by part, between marks."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._last = self._now()

    def mark(self, part: str) -> None:
        """What has passed since the last mark was this part."""
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class WatchedEngine(Engine):
    """An engine, the same weights and state, that marks the end of every part."""

    def __init__(self, engine: Engine, mark: Callable[[str], None]) -> None:
        vars(self).update(vars(engine))
        self._mark = mark

    def __call__(self, *arguments: Tensor) -> Tensor:
        self._mark("data")
        losses = super().__call__(*arguments)
        self._mark("forward")
        return losses

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """As in the engine, whose call ends with the reduction over data-parallel ranks if it is the `last`."""
        self._mark("forward")
        reduce = self._inner.allreduce_gradients

        def reduce_marked() -> None:
            self._mark("backward")
            reduce()
            self._mark("update")

        self._inner.allreduce_gradients = reduce_marked
        try:
            super().accumulate(loss, last=last)
        finally:
            del self._inner.allreduce_gradients  # the class's own is seen again
        self._mark("backward")

    def gradient_norm(self) -> Tensor:
        self._mark("other")
        norm = super().gradient_norm()
        self._mark("update")
        return norm

    def update(self, lr: float, norm: float | None = None) -> None:
        self._mark("other")
        super().update(lr, norm)
        self._mark("update")


def instrumented(stepper: Stepper, batches: Iterator[Batch], step: int) -> tuple[float, dict[str, float]]:
    """Update number `step` is made; returns the seconds it took by the training loop's clock, and those of its parts."""
    clock = Clock(stepper.mesh.device)
    watched = replace(stepper, engine=WatchedEngine(stepper.engine, clock.mark))
    made = timed_step(watched, batches, step)
    assert made, "synthetic rows do not end"
    clock.mark("other")
    return made.record.step_seconds, clock.seconds
