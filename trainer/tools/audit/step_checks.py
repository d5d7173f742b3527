"""What a chunk of neighbouring steps was fed: amounts by the mixture, ranges by the evidence, each token at most once.

All at once for numpy's sake; a chunk with anything odd in it is taken apart and checked step by step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tandem.trainer.config import PhaseConfig
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.coverage import Coverage
from tandem.trainer.tools.audit.diagnosis import SuspectStep, diagnose, unexplained_finding
from tandem.trainer.tools.audit.ledger_lines import StepLine
from tandem.trainer.tools.audit.misread_search import hash_rows
from tandem.trainer.tools.audit.reading_order import IntArray, ShardRanges, cut_rows
from tandem.trainer.tools.audit.result import AuditResult, Finding, format_shard_ranges
from tandem.trainer.tools.audit.sources import Sources, row_contents
from tandem.trainer.tools.audit.webdataset_reader import WebdatasetReader

MAX_SEARCHES, MAX_FAILED_SEARCHES = 32, 4
"""Steps whose mistake is searched for, and those that nothing was found for; a search among 1,000 rows takes some seconds."""
SHARE_TOLERANCE = 1e-5
"""Of a share that needs a long pattern, see `tandem.trainer.data.mixture`."""


class StepChecker:
    """Checks chunks, one after the other, and keeps what has been taken of each source."""

    def __init__(self, sources: Sources, result: AuditResult, reader: WebdatasetReader | None):
        self._sources, self._result, self._reader = sources, result, reader
        self._coverage = {source: Coverage(each) for source, each in sources.reading_orders.items()}
        self._num_searches = self._num_failed_searches = 0
        self._phase_rows_by_source: Counter[str] = Counter()
        self._num_phase_rows = 0
        """Rows of the phase so far, of each source and of all; -1: no longer known."""
        self.broken_sources: set[str] = set()
        """Sources that have been seen not to be read in one line, so that the count of their tokens cannot come out."""

    def check(self, steps: Sequence[StepLine], phase: PhaseConfig, first_row: int) -> None:
        """Whatever is wrong with the steps, which begin with row `first_row` of their phase, is on record."""
        sources_by_row = np.array(row_sources(phase, first_row, len(steps) * phase.global_batch_size)).reshape(
            len(steps), phase.global_batch_size
        )
        expanded = {}
        for source in sorted({*sources_by_row.flat, *(name for step in steps for name in step.read_ranges)}):
            expanded[source] = self._expand_read_ranges(
                source, steps, (sources_by_row == source).sum(axis=1) * phase.seq_len
            )
        kept = {source: pieces for source, pieces in expanded.items() if pieces is not None}
        if len(kept) == len(expanded):
            for source, (pieces, passed) in kept.items():
                self._result.sources[source].tokens += int(pieces.tokens.sum())
                self._add_coverage(source, pieces, steps[-1].step)
                self.record_skipped_shards(source, passed)
            self._check_mixture(steps, phase, first_row, {source: pieces for source, (pieces, _) in kept.items()})
            self._check_digests(
                steps, phase, sources_by_row, {source: pieces for source, (pieces, _) in kept.items()}, first_row
            )
        elif len(steps) > 1:
            for index, step in enumerate(steps):
                self.check([step], phase, first_row + index * phase.global_batch_size)
        else:
            self.broken_sources |= expanded.keys()
            self._num_phase_rows = -1

    def record_skipped_shards(self, source: str, ranges: ShardRanges) -> None:
        """The pieces, of shards that are left out, were passed by."""
        if len(ranges):
            self._add_coverage(source, ranges, 0)
            files, skipped_tokens = (
                self._sources.reading_orders[source].shard_files,
                self._result.sources[source].skipped_shard_tokens,
            )
            for shard in np.unique(ranges.shard_index):
                tokens = int(ranges.tokens[ranges.shard_index == shard].sum())
                skipped_tokens[files[shard]] = skipped_tokens.get(files[shard], 0) + tokens

    def record_rollback(self, source: str, start: int, end: int) -> None:
        """Places [start, end) were read for steps that a rollback took back, and are taken by none."""
        source_result = self._result.sources[source]
        source_result.rollback_tokens += end - start
        source_result.rollback_ranges += self._sources.shard_range_names(source, start, end)

    def finish(self, cursor: Mapping[str, int], step: int) -> None:
        """No source was taken twice anywhere, and as many tokens as its cursor says, less what rollbacks passed over."""
        for source, coverage in self._coverage.items():
            self._report_repeats(source, coverage.flush(), step)
            expected_tokens = cursor.get(source, 0) - self._result.sources[source].rollback_tokens
            if source not in self.broken_sources and coverage.tokens != expected_tokens:
                self._result.add_finding(
                    Finding(
                        "lost", f"{source} stands at {cursor.get(source, 0)}; {coverage.tokens} tokens up to there were taken",
                        step, source, lost_tokens=expected_tokens - coverage.tokens,
                    )
                )  # fmt: skip
        if not self._reader:
            return
        for (source, file), (found, listed) in sorted(self._reader.miscounted_shards.items()):
            name = f"{file}:{min(found, listed)}+{abs(found - listed)}"
            message = f"webdataset reads {found} tokens from {file} of {source}; the manifest lists {listed}: {name}"
            self._result.add_finding(Finding("unlike", message, None, source, shard_ranges=[name]))
        for (source, file), tokens in self._reader.unreadable_tokens.items():
            self._result.notes.append(
                f"{source} leaves out {file}; its {tokens} tokens taken before cannot be read again, and the bytes of "
                "the steps that took them are not compared"
            )

    def _check_mixture(
        self, steps: Sequence[StepLine], phase: PhaseConfig, first_row: int, ranges_by_source: Mapping[str, ShardRanges]
    ) -> None:
        """Each source has had its share of the phase's rows to within one row, whichever those are: the one thing here that is
        said without the loader's pattern. Source: the bound of `tandem.trainer.data.mixture`.
        """
        if first_row == 0:
            self._phase_rows_by_source, self._num_phase_rows = Counter(), 0
        if first_row != self._num_phase_rows:  # steps before these are missing, which is on record
            return
        self._num_phase_rows += len(steps) * phase.global_batch_size
        self._phase_rows_by_source.update(
            {source: int(pieces.tokens.sum()) // phase.seq_len for source, pieces in ranges_by_source.items()}
        )
        for source in sorted({*self._phase_rows_by_source, *phase.mixture}):
            num_rows, expected_rows = (
                self._phase_rows_by_source[source],
                phase.mixture.get(source, 0.0) * self._num_phase_rows,
            )
            if abs(num_rows - expected_rows) >= 1 + SHARE_TOLERANCE * self._num_phase_rows:
                self._num_phase_rows = -1
                self._result.add_finding(
                    Finding(
                        "unlike", f"up to step {steps[-1].step} phase {phase.name} has taken {num_rows} rows of {source}; its "
                        f"share is {expected_rows:.1f}", steps[-1].step, source,
                    )
                )  # fmt: skip
                return

    def _expand_read_ranges(
        self, source: str, steps: Sequence[StepLine], expected: IntArray
    ) -> tuple[ShardRanges, ShardRanges] | None:
        """What the steps took of the source and what they passed over; None where that is not what the mixture gives. For one
        step this is then on record; for several it only says that they must be looked at one by one.
        """
        ends = [step.read_ranges.get(source) for step in steps]
        amounts = [after - before for before, after in (each or (0, 0) for each in ends)]
        exact, found, taken = amounts == expected.tolist(), sum(amounts), [each for each in ends if each]
        if exact or (
            self._sources.skipped_shards.get(source)
            and 0 < found <= self._sources.max_span_tokens(source, int(expected.sum()))
        ):
            kept, passed = self._sources.shard_ranges(source, taken[0][0] if taken else 0, taken[-1][1] if taken else 0)
            if (exact and not len(passed)) or (len(steps) == 1 and kept.tokens.sum() == expected[0]):
                return kept, passed
            found = int(kept.tokens.sum())
        if len(steps) == 1:
            before, after = steps[0].read_ranges.get(source, (0, 0))
            ranges = self._sources.shard_range_names(source, before, after) if 0 <= before < after else []
            self._result.add_finding(
                Finding(
                    "unlike", f"step {steps[0].step} took {found} tokens of {source}; its phase gives it {expected[0]}: "
                    f"{format_shard_ranges(ranges)}", steps[0].step, source, shard_ranges=ranges,
                )
            )  # fmt: skip
        return None

    def _add_coverage(self, source: str, ranges: ShardRanges, step: int) -> None:
        self._report_repeats(source, self._coverage[source].add(ranges), step)

    def _report_repeats(self, source: str, repeats: ShardRanges, step: int) -> None:
        if not len(repeats) or source in self.broken_sources:
            return
        ranges, tokens = self._sources.reading_orders[source].shard_range_names(repeats), int(repeats.tokens.sum())
        self._result.add_finding(
            Finding(
                "repeated", f"up to step {step} {tokens} tokens of {source} were taken twice: {format_shard_ranges(ranges)}",
                step, source, shard_ranges=ranges, repeated_tokens=tokens,
            )
        )  # fmt: skip

    def _check_digests(
        self,
        steps: Sequence[StepLine],
        phase: PhaseConfig,
        sources_by_row: np.ndarray,
        ranges_by_source: Mapping[str, ShardRanges],
        first_row: int,
    ) -> None:
        ranges, tokens = np.zeros(sources_by_row.size, np.uint64), np.zeros(sources_by_row.size, np.uint64)
        is_unreadable = np.zeros(sources_by_row.size, bool)
        for source, pieces in ranges_by_source.items():
            row_indices, (cut, starts) = np.flatnonzero(sources_by_row == source), cut_rows(pieces, phase.seq_len)
            ranges[row_indices] = hash_rows(row_indices % phase.global_batch_size, row_contents(source, cut, starts))
            if self._reader:
                read = self._reader(source, cut, starts)
                tokens[row_indices] = hash_rows(row_indices % phase.global_batch_size, [row or b"" for row in read])
                is_unreadable[row_indices] = [row is None for row in read]
        is_wrong_range = ranges.reshape(sources_by_row.shape).sum(axis=1) != np.array(
            [step.ranges_digest for step in steps], np.uint64
        )
        for index in np.flatnonzero(is_wrong_range).tolist():
            self._diagnose(SuspectStep(steps[index], phase, first_row + index * phase.global_batch_size))
        if self._reader:
            is_wrong_token = tokens.reshape(sources_by_row.shape).sum(axis=1) != np.array(
                [step.tokens_digest for step in steps], np.uint64
            )
            for index in np.flatnonzero(
                is_wrong_token & ~is_wrong_range & ~is_unreadable.reshape(sources_by_row.shape).any(axis=1)
            ).tolist():
                self._report_wrong_tokens(steps[index])

    def _diagnose(self, suspect: SuspectStep) -> None:
        found = None
        if self._num_searches < MAX_SEARCHES and self._num_failed_searches < MAX_FAILED_SEARCHES:
            found = diagnose(suspect, self._sources)
            self._num_searches += 1
            self._num_failed_searches += found is None
        self._result.add_finding(found or unexplained_finding(suspect.step, self._sources))

    def _report_wrong_tokens(self, step: StepLine) -> None:
        """Name the ranges that webdataset and the loader's byte offsets read differently, or all ranges if they agree now."""
        assert self._reader
        names, explanation = [], " (webdataset and the loader's byte offsets read these differently)"
        for source, ends in step.read_ranges.items():
            ranges = self._reader.ranges_loader_reads_differently(source, self._sources.shard_ranges(source, *ends)[0])
            names += self._sources.reading_orders[source].shard_range_names(ranges)
        if not names:
            names, explanation = self._sources.step_range_names(step.read_ranges), ""
        message = (
            f"step {step.step} was fed other tokens than its ranges hold: {format_shard_ranges(names)}{explanation}"
        )
        self._result.add_finding(Finding("unlike", message, step.step, shard_ranges=names))
