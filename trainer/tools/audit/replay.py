"""Replay a run from its ledger: each step once and in order, each source from the cursor at which it was left.

The cursors determine what the run had to read. The digests record what it read. The coverage collects the shard ranges.
Different parts of the trainer write them, and here they must agree.
"""

from collections.abc import Callable
from typing import Any

from tandem.trainer.config import PhaseConfig
from tandem.trainer.config.numbers import format_count
from tandem.trainer.tools.audit.ledger_history import LedgerHistory
from tandem.trainer.tools.audit.ledger_lines import IMMUTABLE_SETTINGS, Attempt, BadStepLine, SkipLine, StepLine
from tandem.trainer.tools.audit.reading_order import Sources
from tandem.trainer.tools.audit.result import AuditResult, SourceResult, format_missing_steps
from tandem.trainer.tools.audit.step_checks import StepChecker
from tandem.trainer.tools.audit.webdataset_reader import WebdatasetReader

CHUNK_ROWS = 1 << 14
HALT_DESCRIPTIONS = {"rollback": "roll back", "stop": "stop"}
"""Action for a bad step in the ledger -> what the run has to do instead of continuing."""
PHASE_FIELDS = ("tokens", "seq_len", "global_batch_size", "mixture")


class Replay:
    """Goes through the history once."""

    def __init__(
        self, history: LedgerHistory, sources: Sources, fingerprints: dict[str, str], reader: WebdatasetReader | None
    ):
        source_results = {source: SourceResult(each.epoch_tokens) for source, each in sources.reading_orders.items()}
        self._result = AuditResult(source_results, reader is not None)
        self._report, self._add_note = self._result.report, self._result.notes.append
        self._history, self._sources, self._manifest_fingerprints = history, sources, fingerprints
        self._step_checker = StepChecker(sources, self._result, reader)
        self._cursor: dict[str, int] = {}
        self._last_step = self._last_step_line = 0
        self._halting_bad_step: BadStepLine | None = None
        """The last step, if the run must not make another step after it."""
        self._attempt: Attempt | None = None
        self._last_effective_attempt: Attempt | None = None
        self._known_settings: dict[str, Any] = {}
        """First value of each setting that a run must not change."""
        self._skipped_shards: set[tuple[str, str]] = set()
        """Source and file of the skipped shards that a checkpoint saved here would contain."""
        self._phase_span: tuple[PhaseConfig, int, int] | None = None
        self._pending_steps: list[StepLine] = []

    def run(self, advance: Callable[[int], object] = lambda steps: None) -> AuditResult:
        """Check the whole ledger. `advance` is called with the number of steps checked."""
        for number in self._history.unreadable_lines:
            self._report("ledger", None, None, f"line {number} cannot be read; it was damaged or edited")
        for attempt in self._history.misplaced_attempts:
            checkpoint = f"a checkpoint made after line {attempt.start.num_ledger_lines}, where other steps were made"
            message = f"{_start_name(attempt)} continues from {checkpoint}; lines are missing or were edited"
            self._report("ledger", attempt.step, None, message)
        for record in self._history.effective_lines():
            if isinstance(record, StepLine):
                self._add_step(record)
                batch = self._phase_span[0].global_batch_size if self._phase_span else 1
                if len(self._pending_steps) * batch >= CHUNK_ROWS:
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
        """Add the step to the chunk, if its phase and sources are known."""
        number, self._last_step_line = step.step, step.line_number
        if bad := self._halting_bad_step:
            halt = f"step {bad.step}, at which the run had to {HALT_DESCRIPTIONS[bad.action]}"
            self._report("ledger", number, None, f"step {number} follows {halt}")
            self._halting_bad_step = None
        if number <= self._last_step:
            last = self._pending_steps[-1] if self._pending_steps else None
            content = "the same content" if last and last[1:] == step[1:] else "other content"
            message = f"step {number} appears again (line {step.line_number}), with {content}"
            self._report("ledger", number, None, message)
            return
        missing, self._last_step = range(self._last_step + 1, number), number
        self._report_missing(missing, step.line_number)
        span = self._attempt.phase_span_at(number) if self._attempt else None
        fingerprints = self._last_effective_attempt.start.fingerprints if self._last_effective_attempt else {}
        unknown = sorted(name for name in step.read_ranges if name not in fingerprints or name not in self._sources)
        starts = ((source, before) for source, (before, _) in step.read_ranges.items())
        is_discontinuous = any(before != self._cursor.get(source, 0) for source, before in starts)
        if missing or span is not self._phase_span or is_discontinuous:
            self._check_pending_steps()
        self._advance_cursors(step, missing)
        if span is None or unknown:
            reason = "is beyond its start's phases"
            if unknown:
                reason = f"read from {', '.join(unknown)}, which its start does not name"
            self._report("changed", number, None, f"step {number} {reason}")
            self._step_checker.broken_sources |= step.read_ranges.keys()
            return
        phase, known = span[0], self._phase_span[0] if self._phase_span else None
        if not known or any(getattr(phase, name) != getattr(known, name) for name in ("name", *PHASE_FIELDS[1:])):
            rows = f"{phase.global_batch_size} rows of {phase.seq_len} tokens"
            self._add_note(f"step {number}: phase {phase.name}, {rows}")
        self._phase_span = span
        self._pending_steps.append(step)

    def _check_pending_steps(self) -> int:
        """Check the chunk. Return the number of its steps."""
        steps, self._pending_steps = self._pending_steps, []
        if steps and self._phase_span:
            phase, first_step, _ = self._phase_span
            self._step_checker.check(steps, phase, (steps[0].step - 1 - first_step) * phase.global_batch_size)
        return len(steps)

    def _add_bad_step(self, bad: BadStepLine) -> None:
        if (bad.step, bad.line_number) != (self._last_step, self._last_step_line + 1):
            message = f"line {bad.line_number} marks step {bad.step} as bad; the line before it is not that step's"
            self._report("ledger", bad.step, None, message)
            return
        self._result.num_skipped_updates += 1
        self._halting_bad_step = bad if bad.action in HALT_DESCRIPTIONS else None
        consequence = f"; the run had to {HALT_DESCRIPTIONS[bad.action]}" if self._halting_bad_step else ""
        self._add_note(f"step {bad.step}: update skipped, {bad.reason}{consequence}")

    def _report_missing(self, missing: range, line_number: int) -> None:
        if missing:
            self._report("ledger", missing[0], None, f"{format_missing_steps(missing)} (before line {line_number})")

    def _advance_cursors(self, step: StepLine, missing: range) -> None:
        """Move the cursors past the step. Add a finding if the step does not begin at them."""
        for source, (before, after) in step.read_ranges.items():
            if source not in self._sources:
                continue
            cursor = self._cursor.get(source, 0)
            if before > cursor:
                reason = format_missing_steps(missing) if missing else f"step {step.step} begins after them"
                self._record_gap(source, cursor, before, step.step, reason)
            elif before < cursor:
                self._step_checker.broken_sources.add(source)
                names, tokens = self._sources.shard_range_names(source, max(before, 0), cursor), cursor - before
                message = f"step {step.step} continues {source} at {before}, with {tokens} tokens taken already"
                self._report("repeated", step.step, source, message, names, repeated_tokens=tokens)
            self._cursor[source] = after

    def _record_gap(self, source: str, start: int, end: int, step: int, reason: str) -> None:
        """Record positions [start, end) that no step read. They are lost, except those in skipped shards."""
        lost = end - start
        if self._sources.skipped_shards.get(source) and end <= self._sources.max_span_tokens(source, start):
            read_ranges, skipped_ranges = self._sources.shard_ranges(source, start, end)
            self._step_checker.record_skipped_shards(source, skipped_ranges)
            lost = int(read_ranges.tokens.sum())
            if not lost:
                return
        self._step_checker.broken_sources.add(source)
        names = self._sources.shard_range_names(source, start, end)
        message = f"{lost} tokens of {source} were taken by no step, {reason}"
        self._report("lost", step, source, message, names, lost_tokens=lost)

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
        """Check that a start begins at the cursors after its step, except for the ranges that it passes over."""
        missing, start = range(self._last_step + 1, attempt.step + 1), attempt.start
        self._report_missing(missing, attempt.line_number)
        for source in sorted({*start.cursor, *start.skipped_ranges, *self._cursor}):
            start_cursor = start.skipped_ranges.get(source, [start.cursor.get(source, 0)])[0]
            run_cursor = self._cursor.get(source, 0)
            if missing and start_cursor > run_cursor and source in self._sources:
                self._record_gap(source, run_cursor, start_cursor, attempt.step, format_missing_steps(missing))
                self._cursor[source] = start_cursor
            elif start_cursor != run_cursor:
                message = f"continues {source} at {start_cursor}; the run left it at {run_cursor}"
                self._report_changed(attempt, message, source)

    def _check_skipped_ranges(self, attempt: Attempt) -> None:
        """Check that a start passes over the tokens between its checkpoint and the bad step of a rollback, and no others."""
        start, rollback = attempt.start, self._history.rollback_of(attempt)
        if rollback is None or rollback.bad_step is None:
            if start.skipped_ranges or start.is_rollback:
                passed = f"passes over tokens of {', '.join(start.skipped_ranges) or 'nothing'}"
                message = f"{_start_name(attempt)} {passed}; no bad step from which the run rolled back precedes it"
                self._report("ledger", attempt.step, None, message)
            return
        for source in sorted({*start.cursor, *start.skipped_ranges, *rollback.start.cursor, *rollback.bad_step_cursor}):
            run_cursor, end = self._cursor.get(source, 0), rollback.bad_step_cursor.get(source, 0)
            recorded_ends = {each.cursor.get(source, 0) for each in (start, rollback.start)}
            recorded_ends |= {start.skipped_ranges.get(source, [end, end])[1]}
            if recorded_ends != {end}:
                passed = f"passes over {source} up to {', '.join(map(str, sorted(recorded_ends - {end})))}"
                bad = f"step {rollback.bad_step.step}, from which it rolls back, had read up to {end}"
                self._report_changed(attempt, f"{passed}; {bad}", source)
            if source in self._sources and end > run_cursor:
                self._result.sources[source].rollback_tokens += end - run_cursor
                self._result.sources[source].rollback_ranges += self._sources.shard_range_names(source, run_cursor, end)
                self._cursor[source] = end

    def _check_settings(self, attempt: Attempt) -> None:
        """Check that a start has the run's shuffle settings, past phases and skipped shards."""
        for name in IMMUTABLE_SETTINGS:
            self._check_setting(attempt, name, getattr(attempt.start, name))
        last = self._last_effective_attempt
        if last and attempt.schedule_before(attempt.step) != last.schedule_before(attempt.step):
            self._report_changed(attempt, "has other phases for the steps already made")
        # A process that rolls back also skips the shards that were damaged since its checkpoint.
        differs = {*attempt.skipped_shards} ^ self._skipped_shards
        if differs - (attempt.bad_step_skipped_shards - self._skipped_shards):
            differing = ", ".join(f"{file} of {source}" for source, file in sorted(differs))
            self._report_changed(attempt, f"skips other shards than the run: {differing}")
        self._skipped_shards = {*attempt.skipped_shards}

    def _check_setting(self, attempt: Attempt, name: str, value: Any, source: str | None = None) -> None:
        known_value = self._known_settings.setdefault(name, value)
        if value != known_value:
            self._report_changed(attempt, f"has {name} {value}; the run has read its data with {known_value}", source)

    def _report_changed(self, attempt: Attempt, problem: str, source: str | None = None) -> None:
        self._report("changed", attempt.step, source, f"{_start_name(attempt)} {problem}")

    def _check_fingerprints(self) -> None:
        """Check that the last start that counts names the corpora that the run has read.

        The corpus of a source that was not read yet can change.
        """
        if (attempt := self._last_effective_attempt) is None:
            return
        read = {source for source, cursor in self._cursor.items() if cursor} & attempt.start.fingerprints.keys()
        for source in sorted(read & self._manifest_fingerprints.keys()):
            found, copy = attempt.start.fingerprints[source], self._manifest_fingerprints[source]
            self._check_setting(attempt, f"data.sources.{source}", found, source)
            if found != copy:
                message = f"the copy of the manifest of {source} belongs to corpus {copy[:12]}"
                message += f"; {_start_name(attempt)} read {found[:12]}"
                self._report("changed", attempt.step, source, message)

    def _note_start(self, attempt: Attempt) -> None:
        start, previous, bad = attempt.start, self._attempt, attempt.bad_step
        kind = "start" if attempt is self._history.attempts[0] else "restart"
        if start.is_rollback:
            kind = f"rollback from step {bad.step}, {bad.reason}" if bad else "rollback"
        words = [f"step {attempt.step}: {kind}, dp {start.dp_size}"]
        if previous and previous.discarded_steps:
            first, last, count, tokens = previous.discarded_steps
            words.append(f"discards steps {first} to {last}: {count} steps, {format_count(tokens)} tokens")
        ranges = sorted(start.skipped_ranges.items())
        if passed := [f"{format_count(end - left)} of {source}" for source, (left, end) in ranges if end > left]:
            words.append(f"passes over the tokens read by then: {', '.join(passed)}")
        if previous:
            if previous.start.dp_size != start.dp_size:
                words.append(f"dp was {previous.start.dp_size}")
            words += describe_phase_changes(previous.start.phases, start.phases)
            old_sources, new_sources = previous.start.fingerprints.keys(), start.fingerprints.keys()
            words += [f"source {name} added" for name in sorted(new_sources - old_sources)]
            words += [f"source {name} removed" for name in sorted(old_sources - new_sources)]
        self._add_note("; ".join(words))

    def _add_skip(self, skip: SkipLine) -> None:
        if skip.step != self._last_step + 1:
            steps = f"from step {skip.step} on, before step {self._last_step + 1}"
            self._report("ledger", skip.step, skip.source, f"{skip.shard} of {skip.source} is skipped {steps}")
        self._skipped_shards.add((skip.source, skip.shard))
        self._skip_shard(skip.step, skip.source, skip.shard)

    def _skip_shard(self, step: int, source: str, file: str) -> None:
        if not self._sources.skip_shard(source, file):
            message = f"step {step} skips {file} of {source}, which has no such shard"
            self._report("ledger", step, source, message)
            return
        skipped_tokens = self._result.sources[source].skipped_shard_tokens
        if file not in skipped_tokens:
            skipped_tokens[file] = 0
            self._add_note(f"step {step}: {source} skips {file} from here on")

    def _finish(self) -> None:
        self._check_fingerprints()
        self._step_checker.finish(self._cursor, self._last_step)
        self._result.num_steps = self._last_step
        if self._history.has_torn_last_line:
            cause = "the run was killed or is still writing it"
            self._add_note(f"the last line is incomplete: {cause}; the next start removes it")
        if discarded := self._history.attempts[-1].discarded_steps:
            self._add_note(f"steps {discarded[0]} to {discarded[1]} do not count")
        for source, result in self._result.sources.items():
            result.cursor = cursor = self._cursor.get(source, 0)
            result.next_token = self._sources.shard_range_names(source, cursor, cursor + 1)[0].split("+")[0]


def _start_name(attempt: Attempt) -> str:
    return f"the start at step {attempt.step} (line {attempt.line_number})"


def describe_phase_changes(before: list[PhaseConfig], after: list[PhaseConfig]) -> list[str]:
    old, words = {phase.name: phase for phase in before}, []
    for phase in after:
        if phase.name not in old:
            words.append(f"phase {phase.name} added, mixture {phase.mixture}")
            continue
        pairs = ((name, getattr(old[phase.name], name), getattr(phase, name)) for name in PHASE_FIELDS)
        words += [f"phase {phase.name}: {name} {one} -> {other}" for name, one, other in pairs if one != other]
    return words + [f"phase {name} removed" for name in old if name not in {phase.name for phase in after}]
