"""What is done about a step whose loss or gradient is bad: decided before its update, from numbers that all ranks have alike.

The one idea: the decision is a function of the step's loss and gradient norm and of those of the good steps before it, which a
checkpoint keeps; so a run that is stopped, resumed or gone through again decides as it did.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from tandem.trainer import config
from tandem.trainer.config import Phase

SIGMA_PER_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation. Source: 1 / the normal's 0.75 quantile."""
LEAST_SIGMA = 1e-3
"""Of the median: numbers that hardly vary, as when a run repeats its rows, are not judged by their rounding."""

Decision = Literal["update", "skip", "rollback"]


@dataclass(frozen=True)
class Judgement:
    decision: Decision
    """update: the step is good. skip: its update is left out. rollback: the run goes back to its last checkpoint, or ends."""
    reason: str = ""
    """Why the step is bad."""


class Guard:
    """Judges every step once, in order. `state` is a checkpoint's; `rollbacks`: how often the run has come back to which."""

    def __init__(
        self, settings: config.Guard, state: dict[str, Any] | None = None, rollbacks: dict[int, int] | None = None
    ) -> None:
        self._settings = settings
        self._losses, self._gradient_norms = (deque[float](maxlen=settings.window_steps) for _ in range(2))
        self._shape: list[Any] = []
        """seq_len, rows and mixture of the steps in both."""
        self.skips = 0
        """Bad steps in a row, up to now."""
        self._rollbacks = dict(rollbacks or {})
        if state:
            self.restore(state)

    def judge(self, phase: Phase, loss: float, gradient_norm: float) -> Judgement:
        """What is to be done about a step of the phase; a good one joins those that later steps are compared with."""
        # Longer rows and other data have other losses, larger batches other gradients.
        if (shape := [phase.seq_len, phase.rows, dict(phase.mixture)]) != self._shape:
            self._losses.clear()
            self._gradient_norms.clear()
            self._shape = shape
        reason = self._wrong("loss", loss, self._losses) or self._wrong(
            "gradient norm", gradient_norm, self._gradient_norms
        )
        if reason is None:
            self.skips = 0
            self._losses.append(loss)
            self._gradient_norms.append(gradient_norm)
            return Judgement("update")
        self.skips += 1
        if self.skips <= self._settings.max_skips:
            return Judgement("skip", reason)
        return Judgement("rollback", reason)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": list(self._losses), "gradient_norms": list(self._gradient_norms), "shape": self._shape,
            "skips": self.skips,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """The guard stands where it stood when `state` was taken."""
        self._losses = deque(state["losses"], self._settings.window_steps)
        self._gradient_norms = deque(state["gradient_norms"], self._settings.window_steps)
        self._shape, self.skips = list(state["shape"]), int(state["skips"])

    def rollbacks_to(self, step: int) -> int:
        """How often the run has come back to the checkpoint of `step`."""
        return self._rollbacks.get(step, 0)

    def go_back(self, step: int, state: dict[str, Any] | None) -> None:
        """The guard stands where the checkpoint of `step` has it, and counts one more time that the run has come back to it."""
        self.restore(state or Guard(self._settings).state())
        self._rollbacks[step] = self.rollbacks_to(step) + 1

    def _wrong(self, name: str, value: float, good: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} is not finite"
        if not self._settings.spike_sigmas or len(good) < self._settings.window_steps:
            return None
        middle = median(good)
        deviation = SIGMA_PER_DEVIATION * median(abs(each - middle) for each in good)
        sigmas = (value - middle) / max(deviation, LEAST_SIGMA * middle)
        if sigmas <= self._settings.spike_sigmas:
            return None
        return f"{name} {value:.4g} lies {sigmas:.1f} sigmas above {middle:.4g}, the median of {len(good)} steps"
