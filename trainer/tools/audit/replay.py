"""The run replayed from its ledger: every step once, in order, each source read on from where it was left.

The one idea: cursors say what should have been read, evidence says what was, and coverage is kept of the ranges of shards
themselves. The three are said by different parts of the trainer, and here they must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tandem.trainer.config import Phase
from tandem.trainer.metrics.console import short
from tandem.trainer.tools.audit.ledger_history import History
from tandem.trainer.tools.audit.ledger_lines import Attempt, Bad, Skip, Step
from tandem.trainer.tools.audit.result import Finding, Standing, Verdict, ranges_words, steps_words
from tandem.trainer.tools.audit.sources import Corpora
from tandem.trainer.tools.audit.step_checks import Feed
from tandem.trainer.tools.audit.tar_reader import TarReader

CHUNK_ROWS = 1 << 14
HALTS = {"rollback": "go back", "stop": "end"}
"""What a run does at a bad step instead of going on, by the decision on record."""


class Replay:
    """Goes through the history once."""

    def __init__(
        self, history: History, corpora: Corpora, fingerprints: Mapping[str, str], tokens: TarReader | None = None
    ):
        standings = {source: Standing(each.epoch_tokens) for source, each in corpora.expansions.items()}
        self._verdict = Verdict(standings, tokens is not None)
        self._history, self._corpora, self._copies = history, corpora, fingerprints
        self._feed = Feed(corpora, self._verdict, tokens)
        self._cursor: dict[str, int] = {}
        self._number = 0
        self._line = 0
        """Of the last step."""
        self._halt: Bad | None = None
        """The last step, if the run was to make no other one after it."""
        self._attempt: Attempt | None = None
        self._counting: Attempt | None = None
        """The last start that the run as it counts comes from."""
        self._known: dict[str, Any] = {}
        """What a run keeps for life, as the run has read its data with it."""
        self._left_out: set[tuple[str, str]] = set()
        """Source and file of shards, as a checkpoint made here would have them."""
        self._span: tuple[Phase, int, int] | None = None
        self._chunk: list[Step] = []

    def run(self, advance: Callable[[int], object] = lambda steps: None) -> Verdict:
        """The verdict over the whole ledger; `advance` is told of steps as they are checked."""
        for number in self._history.unreadable:
            self._find("ledger", f"line {number} cannot be read; it was damaged or edited")
        for attempt in self._history.astray:
            self._find(
                "ledger", f"the start at step {attempt.step} (line {attempt.line}) goes on from a checkpoint made after line "
                f"{attempt.start.after}, where other steps were made; lines are missing or were edited", attempt.step,
            )  # fmt: skip
        for record in self._history.accepted():
            if isinstance(record, Step):
                self._step(record)
                if len(self._chunk) * (self._span[0].rows if self._span else 1) >= CHUNK_ROWS:
                    advance(self._check_chunk())
            elif isinstance(record, Bad):
                self._bad(record)
            else:
                advance(self._check_chunk())
                self._start(record) if isinstance(record, Attempt) else self._skip(record)
        advance(self._check_chunk())
        self._end()
        return self._verdict

    def _step(self, step: Step) -> None:
        """The step joins the chunk, if it can be said what it is to read."""
        self._line = step.line
        if self._halt:
            says = f"step {step.number} follows step {self._halt.step}, at which the run was to {HALTS[self._halt.decision]}"
            self._find("ledger", says, step.number)
            self._halt = None
        if step.number <= self._number:
            last = self._chunk[-1] if self._chunk else None
            same = last is not None and last[1:] == step[1:]
            how = "as it stands before" if same else "with other content"
            self._find("ledger", f"step {step.number} is there again (line {step.line}), {how}", step.number)
            return
        missing, self._number = range(self._number + 1, step.number), step.number
        span = self._attempt.span_of(step.number) if self._attempt else None
        if missing:
            self._find("ledger", f"{steps_words(missing)} not in the ledger (before line {step.line})", missing[0])
        named = self._counting.start.fingerprints if self._counting else {}
        unknown = sorted(source for source in step.taken if source not in named or source not in self._corpora)
        if missing or span is not self._span or self._jumps(step):
            self._check_chunk()
        self._go_on(step, missing)
        if span is None or unknown:
            says = "lies beyond its start's phases"
            if unknown:
                says = f"took from {', '.join(unknown)}, which its start does not name"
            self._find("changed", f"step {step.number} {says}", step.number)
            self._feed.broken |= step.taken.keys()
            return
        if not self._span or shape_of(span[0]) != shape_of(self._span[0]):
            self._note(f"step {step.number}: phase {span[0].name}, {span[0].rows} rows of {span[0].seq_len} tokens")
        self._span = span
        self._chunk.append(step)

    def _check_chunk(self) -> int:
        """The steps gathered are checked; returns how many they are."""
        if self._chunk and self._span:
            phase, first_step, _ = self._span
            self._feed.check(self._chunk, phase, (self._chunk[0].number - 1 - first_step) * phase.rows)
        checked, self._chunk = len(self._chunk), []
        return checked

    def _bad(self, bad: Bad) -> None:
        if (bad.step, bad.line) != (self._number, self._line + 1):
            says = f"line {bad.line} tells of step {bad.step} as bad; the line before it is not that step's"
            self._find("ledger", says, bad.step)
            return
        self._verdict.steps_without_update += 1
        self._halt = bad if bad.decision in HALTS else None
        end = f"; the run was to {HALTS[bad.decision]}" if self._halt else ""
        self._note(f"step {bad.step}: update left out, {bad.reason}{end}")

    # Cursors

    def _jumps(self, step: Step) -> bool:
        return any(before != self._cursor.get(source, 0) for source, (before, _) in step.taken.items())

    def _go_on(self, step: Step, missing: range) -> None:
        """The cursors are those after the step; where they were not those before it, that is on record."""
        for source, (before, after) in step.taken.items():
            if source not in self._corpora:
                continue
            at = self._cursor.get(source, 0)
            if before > at:
                why = (
                    f"{steps_words(missing)} not in the ledger" if missing else f"step {step.number} begins behind them"
                )
                self._gap(source, at, before, step.number, why)
            elif before < at:
                self._feed.broken.add(source)
                shards = self._corpora.named(source, max(before, 0), at)
                self._find(
                    "repeated", f"step {step.number} takes {source} up at {before}, with {at - before} tokens taken already: "
                    f"{ranges_words(shards)}", step.number, source, shards=shards, repeated_tokens=at - before,
                )  # fmt: skip
            self._cursor[source] = after

    def _gap(self, source: str, start: int, end: int, step: int, why: str) -> None:
        """Places [start, end) were passed over: lost, but for shards that are left out."""
        lost = end - start
        if self._corpora.left_out.get(source) and end <= self._corpora.most(source, start):
            kept, passed = self._corpora.pieces(source, start, end)
            self._feed.pass_over(source, passed)
            lost = int(kept.tokens.sum())
            if not lost:
                return
        self._feed.broken.add(source)
        shards = self._corpora.named(source, start, end)
        self._find(
            "lost", f"{lost} tokens of {source} were taken by no step, {why}: {ranges_words(shards)}",
            step, source, shards=shards, lost_tokens=lost,
        )  # fmt: skip

    # Starts

    def _start(self, attempt: Attempt) -> None:
        self._corpora.left_out, self._halt = {}, None
        if attempt.counts:
            self._check_corpora()
            self._check_cursor(attempt)
            self._check_passed(attempt)
            self._check_kept(attempt)
            self._number, self._counting = max(self._number, attempt.step), attempt
        self._say_start(attempt)
        self._attempt = attempt
        for source, file in attempt.skips if attempt.counts else []:
            self._leave_out(attempt.step + 1, source, file)

    def _check_cursor(self, attempt: Attempt) -> None:
        """A start goes on from where the step that it names has left the sources, but for what it says to pass over."""
        missing = range(self._number + 1, attempt.step + 1)
        if missing:
            self._find("ledger", f"{steps_words(missing)} not in the ledger (before line {attempt.line})", missing[0])
        start = attempt.start
        for source in sorted({*start.cursor, *start.passed, *self._cursor}):
            found = start.passed.get(source, [start.cursor.get(source, 0)])[0]
            left = self._cursor.get(source, 0)
            if missing and found > left and source in self._corpora:
                self._gap(source, left, found, attempt.step, f"{steps_words(missing)} not in the ledger")
                self._cursor[source] = found
            elif found != left:
                self._find(
                    "changed", f"the start at step {attempt.step} (line {attempt.line}) takes {source} up at {found}; "
                    f"the run left it at {left}", attempt.step, source,
                )  # fmt: skip

    def _check_passed(self, attempt: Attempt) -> None:
        """A start passes over what was read from its checkpoint to the bad step that a rollback went back from, and no more."""
        start, rollback = attempt.start, self._history.rollback_of(attempt)
        where = f"the start at step {attempt.step} (line {attempt.line})"
        if rollback is None or rollback.bad is None:
            if start.passed or start.rollback:
                passed = ", ".join(start.passed) or "nothing"
                says = (
                    f"{where} passes over tokens of {passed}; no bad step that the run went back from stands before it"
                )
                self._find("ledger", says, attempt.step)
            return
        for source in sorted({*start.cursor, *start.passed, *rollback.start.cursor, *rollback.reached}):
            left, end = self._cursor.get(source, 0), rollback.reached.get(source, 0)
            said = {each.cursor.get(source, 0) for each in (start, rollback.start)}
            said |= {start.passed.get(source, [end, end])[1]}
            if said != {end}:
                self._find(
                    "changed", f"{where} passes over {source} up to {', '.join(map(str, sorted(said - {end})))}; "
                    f"step {rollback.bad.step}, which it goes back from, had read up to {end}", attempt.step, source,
                )  # fmt: skip
            if source in self._corpora and end > left:
                self._feed.roll_past(source, left, end)
                self._cursor[source] = end

    def _check_kept(self, attempt: Attempt) -> None:
        """Order, past and shards left out are those that the run has read its data with."""
        for name, found in attempt.fixed.items():
            self._keep(attempt, name, found)
        if self._counting and attempt.past(attempt.step) != self._counting.past(attempt.step):
            says = f"the start at step {attempt.step} (line {attempt.line}) has other phases for the steps already made"
            self._find("changed", says, attempt.step)
        # A process that goes back knows of the shards that were damaged in the meantime.
        differs = {*attempt.skips} ^ self._left_out
        if differs - (attempt.met - self._left_out):
            differing = ", ".join(f"{file} of {source}" for source, file in sorted(differs))
            says = f"the start at step {attempt.step} (line {attempt.line}) leaves out other shards than the run: {differing}"
            self._find("changed", says, attempt.step)
        self._left_out = {*attempt.skips}

    def _keep(self, attempt: Attempt, name: str, found: Any, source: str | None = None) -> None:
        known = self._known.setdefault(name, found)
        if found != known:
            self._find(
                "changed", f"the start at step {attempt.step} (line {attempt.line}) has {name} {found}; "
                f"the run has read its data with {known}", attempt.step, source,
            )  # fmt: skip

    def _check_corpora(self) -> None:
        """The corpora that the run has read, up to the end of what counts of a start, are those that the start names. One that
        was never read may have been any.
        """
        attempt = self._counting
        if attempt is None:
            return
        read = {source for source, cursor in self._cursor.items() if cursor} & attempt.start.fingerprints.keys()
        for source in sorted(read & self._copies.keys()):
            found, copy = attempt.start.fingerprints[source], self._copies[source]
            self._keep(attempt, f"data.sources.{source}", found, source)
            if found != copy:
                self._find(
                    "changed", f"the copy of the manifest of {source} is of corpus {copy[:12]}; "
                    f"the start at step {attempt.step} (line {attempt.line}) read {found[:12]}", attempt.step, source,
                )  # fmt: skip

    def _say_start(self, attempt: Attempt) -> None:
        kind = "start" if attempt is self._history.attempts[0] else "restart"
        if attempt.start.rollback:
            kind = f"rollback from step {attempt.bad.step}, {attempt.bad.reason}" if attempt.bad else "rollback"
        words = [f"step {attempt.step}: {kind}, dp {attempt.start.dp_size}"]
        before = self._attempt
        if before and before.thrown_away:
            first, last, count, tokens = before.thrown_away
            words.append(f"takes back steps {first} to {last}: {count} made and thrown away, {short(tokens)} tokens")
        passed = [
            f"{short(end - left)} of {source}"
            for source, (left, end) in sorted(attempt.start.passed.items())
            if end > left
        ]
        if passed:
            words.append(f"passes over the tokens read by then: {', '.join(passed)}")
        if before and before.start.dp_size != attempt.start.dp_size:
            words.append(f"dp was {before.start.dp_size}")
        if before:
            words += changed_phases(before.start.phases, attempt.start.phases)
            old, now = before.start.fingerprints.keys(), attempt.start.fingerprints.keys()
            new, gone = now - old, old - now
            words += [f"source {name} added" for name in sorted(new)] + [
                f"source {name} left out" for name in sorted(gone)
            ]
        self._note("; ".join(words))

    def _skip(self, skip: Skip) -> None:
        if skip.step != self._number + 1:
            says = f"{skip.shard} of {skip.source} is left out from step {skip.step} on, before step {self._number + 1}"
            self._find("ledger", says, skip.step, skip.source)
        self._left_out.add((skip.source, skip.shard))
        self._leave_out(skip.step, skip.source, skip.shard)

    def _leave_out(self, step: int, source: str, shard: str) -> None:
        if not self._corpora.leave_out(source, shard):
            self._find("ledger", f"step {step} leaves out {shard} of {source}, which has no such shard", step, source)
            return
        passed = self._verdict.sources[source].passed_over
        if shard not in passed:
            passed[shard] = 0
            self._note(f"step {step}: {source} leaves out {shard} from here on")

    def _end(self) -> None:
        self._check_corpora()
        self._feed.end(self._cursor, self._number)
        self._verdict.steps = self._number
        if self._history.torn:
            self._note("the last line is torn: the run was killed, or is writing it; the next start cuts it away")
        last = self._history.attempts[-1]
        if last.thrown_away:
            self._note(f"steps {last.thrown_away[0]} to {last.thrown_away[1]} do not count")
        for source, standing in self._verdict.sources.items():
            standing.cursor = self._cursor.get(source, 0)
            standing.next = self._corpora.named(source, standing.cursor, standing.cursor + 1)[0].split("+")[0]

    def _find(self, kind: str, says: str, step: int | None = None, source: str | None = None, **more: Any) -> None:
        self._verdict.find(Finding(kind, says, step, source, **more))

    def _note(self, says: str) -> None:
        self._verdict.notes.append(says)


def shape_of(phase: Phase) -> dict[str, Any]:
    """What the rows of a phase's steps depend on, and its name."""
    return {name: getattr(phase, name) for name in ("name", "seq_len", "rows", "mixture")}


def changed_phases(before: list[Phase], after: list[Phase]) -> list[str]:
    """What is new in a schedule, in words."""
    old = {phase.name: phase for phase in before}
    words = []
    for phase in after:
        if phase.name not in old:
            words.append(f"phase {phase.name} added, mixture {phase.mixture}")
            continue
        names = [
            name
            for name in ("tokens", "seq_len", "rows", "mixture")
            if getattr(old[phase.name], name) != getattr(phase, name)
        ]
        words += [
            f"phase {phase.name}: {name} {getattr(old[phase.name], name)} -> {getattr(phase, name)}" for name in names
        ]
    return words + [f"phase {name} left out" for name in old if name not in {phase.name for phase in after}]
