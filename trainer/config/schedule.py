"""Phase, tokens seen and learning rate as pure functions of the step. Nothing here is stored in a checkpoint.

Updates are numbered from 0, and update number `step` uses `lr_at(step)`. A warm-up starts from 0 at step 0, so the first update
changes nothing, as in Cerebras and NeoX. A decay to the end of the run reaches its final value at `total_steps`, after the last
update, so that value is never used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from tandem.trainer.config import HybridLRConfig, LinearLRConfig, LRConfig, PhaseConfig, ScheduleConfig


@dataclass(frozen=True)
class PhaseSpan:
    """A phase with its position in the run: steps `first_step` to `end_step - 1`."""

    phase: PhaseConfig
    index: int
    first_step: int
    first_token: int

    @property
    def end_step(self) -> int:
        return self.first_step + self.phase.num_steps


@dataclass(frozen=True)
class Timeline:
    schedule: ScheduleConfig

    @cached_property
    def phase_spans(self) -> list[PhaseSpan]:
        spans, first_step, first_token = [], 0, 0
        for index, phase in enumerate(self.schedule.phases):
            spans.append(PhaseSpan(phase, index, first_step, first_token))
            first_step, first_token = first_step + phase.num_steps, first_token + phase.tokens
        return spans

    @cached_property
    def total_steps(self) -> int:
        return self.phase_spans[-1].end_step

    @cached_property
    def total_tokens(self) -> int:
        return self.tokens_before(self.total_steps)

    def phase_span_at(self, step: int) -> PhaseSpan:
        """Return the phase of update number `step`."""
        assert 0 <= step < self.total_steps, f"step {step} is outside the run's {self.total_steps} steps"
        return next(span for span in self.phase_spans if step < span.end_step)

    def tokens_before(self, step: int) -> int:
        """Count the tokens seen by updates 0 to `step - 1`; at `total_steps`, by the whole run."""
        span = self.phase_spans[-1] if step == self.total_steps else self.phase_span_at(step)
        return span.first_token + (step - span.first_step) * span.phase.tokens_per_step

    def lr_at(self, step: int) -> float:
        """Return the learning rate of update number `step`, before factors of parameter groups. Defined past the end."""
        return learning_rate(self.schedule.lr, step, self.total_steps)


def learning_rate(lr: LRConfig, step: int, total_steps: int) -> float:
    """Compute the warm-up, which reaches `peak` at `warmup_steps`, or the decay of the schedule's kind."""
    if lr.warmup_steps and step <= lr.warmup_steps:
        return lr.peak * (step / lr.warmup_steps)
    if isinstance(lr, HybridLRConfig):
        return _hybrid_learning_rate(lr, step, total_steps)
    decay_steps = lr.decay_steps or total_steps - lr.warmup_steps
    progress = min(1.0, (step - lr.warmup_steps) / decay_steps)
    remaining = 1 - progress if isinstance(lr, LinearLRConfig) else (1 + math.cos(math.pi * progress)) / 2
    return lr.final + (lr.peak - lr.final) * remaining


def _hybrid_learning_rate(lr: HybridLRConfig, step: int, total_steps: int) -> float:
    """Compute the cosine, inverse square root or cooldown at `step`.

    The period of the cosine is `decay_steps`. After the switch at step i_s the value is alpha / sqrt(i + beta). Equal value V
    and slope S at i_s require alpha = V * sqrt(i_s + beta) and i_s + beta = -V / (2 * S), here `scale_steps`.
    Source: Stable LM 2 technical report (arXiv 2402.17834); Stability's configs for the shape.
    Note: with offset_steps 0, the cosine is already slightly below the peak at the end of the warm-up.
    """
    if lr.cooldown_start_step is not None and step > lr.cooldown_start_step:
        start = learning_rate(replace(lr, cooldown_start_step=None), lr.cooldown_start_step, total_steps)
        progress = min(1.0, (step - lr.cooldown_start_step) / lr.cooldown_steps)
        return start + (lr.cooldown_final - start) * progress
    period_steps = lr.decay_steps or total_steps
    step -= lr.offset_steps
    switch_step = lr.switch_fraction * period_steps
    half_range = (lr.peak - lr.final) / 2
    if step <= switch_step or half_range == 0:
        return lr.final + half_range * (1 + math.cos(2 * math.pi * step / period_steps))
    switch_angle = 2 * math.pi * lr.switch_fraction
    switch_value = lr.final + half_range * (1 + math.cos(switch_angle))
    scale_steps = switch_value * period_steps / (4 * math.pi * half_range * math.sin(switch_angle))
    return switch_value / math.sqrt(1 + (step - switch_step) / scale_steps)
