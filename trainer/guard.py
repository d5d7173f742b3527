"""Decides before each update whether the step's loss and gradient norm are good.

The decision depends only on these two numbers and on those of earlier good steps. All ranks have the same numbers, and a
checkpoint keeps the earlier ones, so a resumed or repeated run decides as before.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from tandem.trainer import config
from tandem.trainer.config import PhaseConfig

SIGMA_PER_MEDIAN_DEVIATION = 1.4826
"""Ratio of a normal distribution's standard deviation to its median absolute deviation: 1 / its 0.75 quantile."""
MIN_RELATIVE_SIGMA = 1e-3
"""Lower bound of sigma relative to the median. If losses hardly vary (repeated rows), rounding must not count as a spike."""
INITIAL_STATE = {"losses": [], "grad_norms": [], "comparison_key": [], "num_consecutive_bad_steps": 0}

Decision = Literal["update", "skip", "rollback"]


@dataclass(frozen=True)
class Judgement:
    decision: Decision
    """update: the step is good. skip: make no update. rollback: return to the last checkpoint, or end the run."""
    reason: str = ""
    """Why the step is bad."""


class Guard:
    """Judges every step once, in order.

    `state` is a checkpoint's `state_dict`. `num_rollbacks` maps the step of a checkpoint to the number of rollbacks to it.
    """

    _comparison_key: list[Any]
    """seq_len, global batch size and mixture of the steps in `_losses` and `_grad_norms`."""

    def __init__(
        self, settings: config.GuardConfig, state: dict[str, Any] | None = None,
        num_rollbacks: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        self._settings, self._num_rollbacks = settings, dict(num_rollbacks or {})
        self.load_state_dict(state or INITIAL_STATE)

    def judge(self, phase: PhaseConfig, loss: float, grad_norm: float) -> Judgement:
        """Judge a step of the phase. If it is good, later steps are compared with it."""
        # Losses depend on the row length and the data, gradients on the batch size.
        if (comparison_key := [phase.seq_len, phase.global_batch_size, dict(phase.mixture)]) != self._comparison_key:
            self._losses.clear()
            self._grad_norms.clear()
            self._comparison_key = comparison_key
        reason = self._anomaly_reason("loss", loss, self._losses)
        reason = reason or self._anomaly_reason("gradient norm", grad_norm, self._grad_norms)
        if reason is None:
            self.num_consecutive_bad_steps = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            return Judgement("update")
        self.num_consecutive_bad_steps += 1
        return Judgement("skip" if self.num_consecutive_bad_steps <= self._settings.max_skips else "rollback", reason)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {
            "losses": list(self._losses), "grad_norms": list(self._grad_norms), "comparison_key": self._comparison_key,
            "num_consecutive_bad_steps": self.num_consecutive_bad_steps,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._losses: deque[float] = deque(state["losses"], self._settings.window_steps)
        self._grad_norms: deque[float] = deque(state["grad_norms"], self._settings.window_steps)
        self._comparison_key = list(state["comparison_key"])
        self.num_consecutive_bad_steps = int(state["num_consecutive_bad_steps"])

    def num_rollbacks_to(self, step: int) -> int:
        """Return how often the run has rolled back to the checkpoint of `step`."""
        return self._num_rollbacks.get(step, 0)

    def roll_back(self, step: int, state: dict[str, Any] | None) -> None:
        """Restore the state in the checkpoint of `step`, and count one more rollback to it."""
        self.load_state_dict(state or INITIAL_STATE)
        self._num_rollbacks[step] = self.num_rollbacks_to(step) + 1

    def _anomaly_reason(self, name: str, value: float, good_values: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} is not finite"
        if not self._settings.spike_sigmas or len(good_values) < self._settings.window_steps:
            return None
        center = median(good_values)
        deviation = SIGMA_PER_MEDIAN_DEVIATION * median(abs(each - center) for each in good_values)
        sigmas = (value - center) / max(deviation, MIN_RELATIVE_SIGMA * center)
        if sigmas <= self._settings.spike_sigmas:
            return None
        return f"{name} {value:.4g} is {sigmas:.1f} sigmas above {center:.4g}, the median of {len(good_values)} steps"
