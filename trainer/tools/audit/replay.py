"""The run replayed from its ledger: every step once, in order, each source read on from where it was left.

The one idea: cursors say what should have been read, evidence says what was, and coverage is kept of the ranges of shards
themselves. The three are said by different parts of the trainer, and here they must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tandem.trainer.config import PhaseConfig
from tandem.trainer.metrics.console import format_number
from tandem.trainer.tools.audit.ledger_history import LedgerHistory
from tandem.trainer.tools.audit.ledger_lines import Attempt, BadStepLine, SkipLine, StepLine
from tandem.trainer.tools.audit.result import AuditResult, Finding, SourceResult, format_shard_ranges, format_steps
from tandem.trainer.tools.audit.sources import Sources
from tandem.trainer.tools.audit.step_checks import StepChecker
from tandem.trainer.tools.audit.webdataset_reader import WebdatasetReader

CHUNK_ROWS = 1 << 14
HALT_DESCRIPTIONS = {"rollback": "go back", "stop": "end"}
"""What a run does at a bad step instead of going on, by the decision on record."""


class Replay:
    """Goes through the history once."""

    def __init__(
        self,
        history: LedgerHistory,
        sources: Sources,
        fingerprints: Mapping[str, str],
        reader: WebdatasetReader | None = None,
    ):
        source_results = {source: SourceResult(each.epoch_tokens) for source, each in sources.reading_orders.items()}
        self._result = AuditResult(source_results, reader is not None)
        self._history, self._sources, self._manifest_fingerprints = history, sources, fingerprints
        self._step_checker = StepChecker(sources, self._result, reader)
        self._cursor: dict[str, int] = {}
        self._last_step = 0
        self._last_step_line = 0
        """Of the last step."""
        self._halting_bad_step: BadStepLine | None = None
        """The last step, if the run was to make no other one after it."""
        self._attempt: Attempt | None = None
        self._last_effective_attempt: Attempt | None = None
        """The last start that the run as it counts comes from."""
        self._known_settings: dict[str, Any] = {}
        """What a run keeps for life, as the run has read its data with it."""
        self._skipped_shards: set[tuple[str, str]] = set()
        """Source and file of shards, as a checkpoint made here would have them."""
        self._phase_span: tuple[PhaseConfig, int, int] | None = None
        self._pending_steps: list[StepLine] = []

    def run(self, advance: Callable[[int], object] = lambda steps: None) -> AuditResult:
        """The verdict over the whole ledger; `advance` is told of steps as they are checked."""
        for number in self._history.unreadable_lines:
            self._add_finding("ledger", f"line {number} cannot be read; it was damaged or edited")
        for attempt in self._history.misplaced_attempts:
            self._add_finding(
                "ledger", f"the start at step {attempt.step} (line {attempt.line_number}) goes on from a "
                f"checkpoint made after line "
                f"{attempt.start.num_ledger_lines}, where other steps were made; lines are missing or were "
                f"edited", attempt.step,
            )  # fmt: skip
        for record in self._history.effective_lines():
            if isinstance(record, StepLine):
                self._add_step(record)
                if (
                    len(self._pending_steps) * (self._phase_span[0].global_batch_size if self._phase_span else 1)
                    >= CHUNK_ROWS
                ):
                    advance(self._check_pending_steps())
            elif isinstance(record, BadStepLine):
                self._add_bad_step(record)
            else:
                advance(self._check_pending_steps())
                self._add_start(record) if isinstance(record, Attempt) else self._add_skip(record)
        advance(self._check_pending_steps())
        self._finish()
        return self._result

    def _add_step(self, step: StepLine) -> None:
        """The step joins the chunk, if it can be said what it is to read."""
        self._last_step_line = step.line_number
        if self._halting_bad_step:
            message = (
                f"step {step.step} follows step {self._halting_bad_step.step}, at which the run was to "
                f"{HALT_DESCRIPTIONS[self._halting_bad_step.action]}"
            )
            self._add_finding("ledger", message, step.step)
            self._halting_bad_step = None
        if step.step <= self._last_step:
            last = self._pending_steps[-1] if self._pending_steps else None
            same = last is not None and last[1:] == step[1:]
            difference = "as it stands before" if same else "with other content"
            self._add_finding(
                "ledger", f"step {step.step} is there again (line {step.line_number}), {difference}", step.step
            )
            return
        missing, self._last_step = range(self._last_step + 1, step.step), step.step
        span = self._attempt.phase_span_at(step.step) if self._attempt else None
        if missing:
            self._add_finding(
                "ledger", f"{format_steps(missing)} not in the ledger (before line {step.line_number})", missing[0]
            )
        fingerprints = self._last_effective_attempt.start.fingerprints if self._last_effective_attempt else {}
        unknown = sorted(
            source for source in step.read_ranges if source not in fingerprints or source not in self._sources
        )
        if missing or span is not self._phase_span or self._is_discontinuous(step):
            self._check_pending_steps()
        self._advance_cursors(step, missing)
        if span is None or unknown:
            message = "lies beyond its start's phases"
            if unknown:
                message = f"took from {', '.join(unknown)}, which its start does not name"
            self._add_finding("changed", f"step {step.step} {message}", step.step)
            self._step_checker.broken_sources |= step.read_ranges.keys()
            return
        if not self._phase_span or phase_shape(span[0]) != phase_shape(self._phase_span[0]):
            self._add_note(
                f"step {step.step}: phase {span[0].name}, {span[0].global_batch_size} rows of {span[0].seq_len} tokens"
            )
        self._phase_span = span
        self._pending_steps.append(step)

    def _check_pending_steps(self) -> int:
        """The steps gathered are checked; returns how many they are."""
        if self._pending_steps and self._phase_span:
            phase, first_step, _ = self._phase_span
            self._step_checker.check(
                self._pending_steps, phase, (self._pending_steps[0].step - 1 - first_step) * phase.global_batch_size
            )
        checked, self._pending_steps = len(self._pending_steps), []
        return checked

    def _add_bad_step(self, bad: BadStepLine) -> None:
        if (bad.step, bad.line_number) != (self._last_step, self._last_step_line + 1):
            message = f"line {bad.line_number} tells of step {bad.step} as bad; the line before it is not that step's"
            self._add_finding("ledger", message, bad.step)
            return
        self._result.num_skipped_updates += 1
        self._halting_bad_step = bad if bad.action in HALT_DESCRIPTIONS else None
        consequence = f"; the run was to {HALT_DESCRIPTIONS[bad.action]}" if self._halting_bad_step else ""
        self._add_note(f"step {bad.step}: update left out, {bad.reason}{consequence}")

    # Cursors

    def _is_discontinuous(self, step: StepLine) -> bool:
        return any(before != self._cursor.get(source, 0) for source, (before, _) in step.read_ranges.items())

    def _advance_cursors(self, step: StepLine, missing: range) -> None:
        """The cursors are those after the step; where they were not those before it, that is on record."""
        for source, (before, after) in step.read_ranges.items():
            if source not in self._sources:
                continue
            cursor = self._cursor.get(source, 0)
            if before > cursor:
                reason = (
                    f"{format_steps(missing)} not in the ledger" if missing else f"step {step.step} begins behind them"
                )
                self._record_gap(source, cursor, before, step.step, reason)
            elif before < cursor:
                self._step_checker.broken_sources.add(source)
                shards = self._sources.shard_range_names(source, max(before, 0), cursor)
                self._add_finding(
                    "repeated", f"step {step.step} takes {source} up at {before}, with {cursor - before} tokens taken already: "
                    f"{format_shard_ranges(shards)}", step.step, source, shard_ranges=shards, repeated_tokens=cursor - before,
                )  # fmt: skip
            self._cursor[source] = after

    def _record_gap(self, source: str, start: int, end: int, step: int, reason: str) -> None:
        """Places [start, end) were passed over: lost, but for shards that are left out."""
        lost = end - start
        if self._sources.skipped_shards.get(source) and end <= self._sources.max_span_tokens(source, start):
            read_ranges, skipped_ranges = self._sources.shard_ranges(source, start, end)
            self._step_checker.record_skipped_shards(source, skipped_ranges)
            lost = int(read_ranges.tokens.sum())
            if not lost:
                return
        self._step_checker.broken_sources.add(source)
        shards = self._sources.shard_range_names(source, start, end)
        self._add_finding(
            "lost", f"{lost} tokens of {source} were taken by no step, {reason}: {format_shard_ranges(shards)}",
            step, source, shard_ranges=shards, lost_tokens=lost,
        )  # fmt: skip

    # Starts

    def _add_start(self, attempt: Attempt) -> None:
        self._sources.skipped_shards, self._halting_bad_step = {}, None
        if attempt.is_effective:
            self._check_fingerprints()
            self._check_start_cursor(attempt)
            self._check_skipped_ranges(attempt)
            self._check_settings(attempt)
            self._last_step, self._last_effective_attempt = max(self._last_step, attempt.step), attempt
        self._note_start(attempt)
        self._attempt = attempt
        for source, file in attempt.skipped_shards if attempt.is_effective else []:
            self._skip_shard(attempt.step + 1, source, file)

    def _check_start_cursor(self, attempt: Attempt) -> None:
        """A start goes on from where the step that it names has left the sources, but for what it says to pass over."""
        missing = range(self._last_step + 1, attempt.step + 1)
        if missing:
            self._add_finding(
                "ledger", f"{format_steps(missing)} not in the ledger (before line {attempt.line_number})", missing[0]
            )
        start = attempt.start
        for source in sorted({*start.cursor, *start.skipped_ranges, *self._cursor}):
            start_cursor = start.skipped_ranges.get(source, [start.cursor.get(source, 0)])[0]
            run_cursor = self._cursor.get(source, 0)
            if missing and start_cursor > run_cursor and source in self._sources:
                self._record_gap(
                    source, run_cursor, start_cursor, attempt.step, f"{format_steps(missing)} not in the ledger"
                )
                self._cursor[source] = start_cursor
            elif start_cursor != run_cursor:
                self._add_finding(
                    "changed", f"the start at step {attempt.step} (line {attempt.line_number}) takes {source} "
                    f"up at {start_cursor}; "
                    f"the run left it at {run_cursor}", attempt.step, source,
                )  # fmt: skip

    def _check_skipped_ranges(self, attempt: Attempt) -> None:
        """A start passes over what was read from its checkpoint to the bad step that a rollback went back from, and no more."""
        start, rollback = attempt.start, self._history.rollback_of(attempt)
        start_name = f"the start at step {attempt.step} (line {attempt.line_number})"
        if rollback is None or rollback.bad_step is None:
            if start.skipped_ranges or start.is_rollback:
                passed = ", ".join(start.skipped_ranges) or "nothing"
                message = (
                    f"{start_name} passes over tokens of {passed}; no bad step that the run went back "
                    f"from stands before it"
                )
                self._add_finding("ledger", message, attempt.step)
            return
        for source in sorted({*start.cursor, *start.skipped_ranges, *rollback.start.cursor, *rollback.bad_step_cursor}):
            run_cursor, end = self._cursor.get(source, 0), rollback.bad_step_cursor.get(source, 0)
            recorded_ends = {each.cursor.get(source, 0) for each in (start, rollback.start)}
            recorded_ends |= {start.skipped_ranges.get(source, [end, end])[1]}
            if recorded_ends != {end}:
                self._add_finding(
                    "changed", f"{start_name} passes over {source} up to {', '.join(map(str, sorted(recorded_ends - {end})))}; "
                    f"step {rollback.bad_step.step}, which it goes back from, had read up to {end}", attempt.step, source,
                )  # fmt: skip
            if source in self._sources and end > run_cursor:
                self._step_checker.record_rollback(source, run_cursor, end)
                self._cursor[source] = end

    def _check_settings(self, attempt: Attempt) -> None:
        """Order, past and shards left out are those that the run has read its data with."""
        for name, found in attempt.immutable_settings.items():
            self._check_setting(attempt, name, found)
        if self._last_effective_attempt and attempt.schedule_before(
            attempt.step
        ) != self._last_effective_attempt.schedule_before(attempt.step):
            message = (
                f"the start at step {attempt.step} (line {attempt.line_number}) has other phases for the "
                f"steps already made"
            )
            self._add_finding("changed", message, attempt.step)
        # A process that goes back knows of the shards that were damaged in the meantime.
        differs = {*attempt.skipped_shards} ^ self._skipped_shards
        if differs - (attempt.bad_step_skipped_shards - self._skipped_shards):
            differing = ", ".join(f"{file} of {source}" for source, file in sorted(differs))
            message = (
                f"the start at step {attempt.step} (line {attempt.line_number}) leaves out other shards "
                f"than the run: {differing}"
            )
            self._add_finding("changed", message, attempt.step)
        self._skipped_shards = {*attempt.skipped_shards}

    def _check_setting(self, attempt: Attempt, name: str, value: Any, source: str | None = None) -> None:
        known_value = self._known_settings.setdefault(name, value)
        if value != known_value:
            self._add_finding(
                "changed", f"the start at step {attempt.step} (line {attempt.line_number}) has {name} {value}; "
                f"the run has read its data with {known_value}", attempt.step, source,
            )  # fmt: skip

    def _check_fingerprints(self) -> None:
        """The corpora that the run has read, up to the end of what counts of a start, are those that the start names. One that
        was never read may have been any.
        """
        attempt = self._last_effective_attempt
        if attempt is None:
            return
        read = {source for source, cursor in self._cursor.items() if cursor} & attempt.start.fingerprints.keys()
        for source in sorted(read & self._manifest_fingerprints.keys()):
            found, copy = attempt.start.fingerprints[source], self._manifest_fingerprints[source]
            self._check_setting(attempt, f"data.sources.{source}", found, source)
            if found != copy:
                self._add_finding(
                    "changed", f"the copy of the manifest of {source} is of corpus {copy[:12]}; "
                    f"the start at step {attempt.step} (line {attempt.line_number}) read {found[:12]}", attempt.step, source,
                )  # fmt: skip

    def _note_start(self, attempt: Attempt) -> None:
        kind = "start" if attempt is self._history.attempts[0] else "restart"
        if attempt.start.is_rollback:
            kind = (
                f"rollback from step {attempt.bad_step.step}, {attempt.bad_step.reason}"
                if attempt.bad_step
                else "rollback"
            )
        words = [f"step {attempt.step}: {kind}, dp {attempt.start.dp_size}"]
        previous = self._attempt
        if previous and previous.discarded_steps:
            first, last, count, tokens = previous.discarded_steps
            words.append(
                f"takes back steps {first} to {last}: {count} made and thrown away, {format_number(tokens)} tokens"
            )
        passed = [
            f"{format_number(end - left)} of {source}"
            for source, (left, end) in sorted(attempt.start.skipped_ranges.items())
            if end > left
        ]
        if passed:
            words.append(f"passes over the tokens read by then: {', '.join(passed)}")
        if previous and previous.start.dp_size != attempt.start.dp_size:
            words.append(f"dp was {previous.start.dp_size}")
        if previous:
            words += describe_phase_changes(previous.start.phases, attempt.start.phases)
            old_sources, new_sources = previous.start.fingerprints.keys(), attempt.start.fingerprints.keys()
            added, removed = new_sources - old_sources, old_sources - new_sources
            words += [f"source {name} added" for name in sorted(added)] + [
                f"source {name} left out" for name in sorted(removed)
            ]
        self._add_note("; ".join(words))

    def _add_skip(self, skip: SkipLine) -> None:
        if skip.step != self._last_step + 1:
            message = (
                f"{skip.shard} of {skip.source} is left out from step {skip.step} on, before step {self._last_step + 1}"
            )
            self._add_finding("ledger", message, skip.step, skip.source)
        self._skipped_shards.add((skip.source, skip.shard))
        self._skip_shard(skip.step, skip.source, skip.shard)

    def _skip_shard(self, step: int, source: str, file: str) -> None:
        if not self._sources.skip_shard(source, file):
            self._add_finding(
                "ledger", f"step {step} leaves out {file} of {source}, which has no such shard", step, source
            )
            return
        skipped_tokens = self._result.sources[source].skipped_shard_tokens
        if file not in skipped_tokens:
            skipped_tokens[file] = 0
            self._add_note(f"step {step}: {source} leaves out {file} from here on")

    def _finish(self) -> None:
        self._check_fingerprints()
        self._step_checker.finish(self._cursor, self._last_step)
        self._result.num_steps = self._last_step
        if self._history.has_torn_last_line:
            self._add_note("the last line is torn: the run was killed, or is writing it; the next start cuts it away")
        last = self._history.attempts[-1]
        if last.discarded_steps:
            self._add_note(f"steps {last.discarded_steps[0]} to {last.discarded_steps[1]} do not count")
        for source, source_result in self._result.sources.items():
            source_result.cursor = self._cursor.get(source, 0)
            source_result.next_token = self._sources.shard_range_names(
                source, source_result.cursor, source_result.cursor + 1
            )[0].split("+")[0]

    def _add_finding(
        self, kind: str, message: str, step: int | None = None, source: str | None = None, **more: Any
    ) -> None:
        self._result.add_finding(Finding(kind, message, step, source, **more))

    def _add_note(self, message: str) -> None:
        self._result.notes.append(message)


def phase_shape(phase: PhaseConfig) -> dict[str, Any]:
    """What the rows of a phase's steps depend on, and its name."""
    return {name: getattr(phase, name) for name in ("name", "seq_len", "global_batch_size", "mixture")}


def describe_phase_changes(before: list[PhaseConfig], after: list[PhaseConfig]) -> list[str]:
    """What is new in a schedule, in words."""
    old = {phase.name: phase for phase in before}
    words = []
    for phase in after:
        if phase.name not in old:
            words.append(f"phase {phase.name} added, mixture {phase.mixture}")
            continue
        names = [
            name
            for name in ("tokens", "seq_len", "global_batch_size", "mixture")
            if getattr(old[phase.name], name) != getattr(phase, name)
        ]
        words += [
            f"phase {phase.name}: {name} {getattr(old[phase.name], name)} -> {getattr(phase, name)}" for name in names
        ]
    return words + [f"phase {name} left out" for name in old if name not in {phase.name for phase in after}]
