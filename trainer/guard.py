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
from tandem.trainer.config import PhaseConfig

SIGMA_PER_MEDIAN_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation. Source: 1 / the normal's 0.75 quantile."""
MIN_RELATIVE_SIGMA = 1e-3
"""Of the median: numbers that hardly vary, as when a run repeats its rows, are not judged by their rounding."""

Decision = Literal["update", "skip", "rollback"]


@dataclass(frozen=True)
class Judgement:
    decision: Decision
    """update: the step is good. skip: its update is left out. rollback: the run goes back to its last checkpoint, or ends."""
    reason: str = ""
    """Why the step is bad."""


class Guard:
    """Judges every step once, in order. `state_dict` is a checkpoint's; `num_rollbacks`: how often the run has come back
    to which.
    """

    def __init__(
        self,
        settings: config.GuardConfig,
        state: dict[str, Any] | None = None,
        num_rollbacks: dict[int, int] | None = None,
    ) -> None:
        self._settings = settings
        self._losses, self._grad_norms = (deque[float](maxlen=settings.window_steps) for _ in range(2))
        self._comparison_key: list[Any] = []
        """seq_len, rows and mixture of the steps in both."""
        self.num_consecutive_bad_steps = 0
        """Bad steps in a row, up to now."""
        self._num_rollbacks = dict(num_rollbacks or {})
        if state:
            self.load_state_dict(state)

    def judge(self, phase: PhaseConfig, loss: float, grad_norm: float) -> Judgement:
        """What is to be done about a step of the phase; a good one joins those that later steps are compared with."""
        # Longer rows and other data have other losses, larger batches other gradients.
        if (comparison_key := [phase.seq_len, phase.global_batch_size, dict(phase.mixture)]) != self._comparison_key:
            self._losses.clear()
            self._grad_norms.clear()
            self._comparison_key = comparison_key
        reason = self._anomaly_reason("loss", loss, self._losses) or self._anomaly_reason(
            "gradient norm", grad_norm, self._grad_norms
        )
        if reason is None:
            self.num_consecutive_bad_steps = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            return Judgement("update")
        self.num_consecutive_bad_steps += 1
        if self.num_consecutive_bad_steps <= self._settings.max_skips:
            return Judgement("skip", reason)
        return Judgement("rollback", reason)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": list(self._losses), "grad_norms": list(self._grad_norms), "comparison_key": self._comparison_key,
            "num_consecutive_bad_steps": self.num_consecutive_bad_steps,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The guard stands where it stood when `state_dict` was taken."""
        self._losses = deque(state["losses"], self._settings.window_steps)
        self._grad_norms = deque(state["grad_norms"], self._settings.window_steps)
        self._comparison_key, self.num_consecutive_bad_steps = (
            list(state["comparison_key"]),
            int(state["num_consecutive_bad_steps"]),
        )

    def num_rollbacks_to(self, step: int) -> int:
        """How often the run has come back to the checkpoint of `step`."""
        return self._num_rollbacks.get(step, 0)

    def roll_back(self, step: int, state: dict[str, Any] | None) -> None:
        """The guard stands where the checkpoint of `step` has it, and counts one more time that the run has come back to it."""
        self.load_state_dict(state or Guard(self._settings).state_dict())
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
        return f"{name} {value:.4g} lies {sigmas:.1f} sigmas above {center:.4g}, the median of {len(good_values)} steps"
