"""Check consecutive steps: token counts against the mixture, ranges against the digests, and that no token was read twice.

Steps are checked in chunks, which is fast in numpy. If a chunk has a wrong token count, its steps are checked one by one.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from tandem.trainer.config import PhaseConfig
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.coverage import Coverage
from tandem.trainer.tools.audit.diagnosis import diagnose, hash_rows
from tandem.trainer.tools.audit.ledger_lines import StepLine
from tandem.trainer.tools.audit.reading_order import IntArray, ShardRanges, Sources, cut_rows, row_contents
from tandem.trainer.tools.audit.result import AuditResult, Finding, format_shard_ranges
from tandem.trainer.tools.audit.webdataset_reader import WebdatasetReader

MAX_SEARCHES, MAX_FAILED_SEARCHES = 32, 4
"""Limits on all searches for a mistake and on the unsuccessful ones. A search among 1,000 rows takes some seconds."""
SHARE_TOLERANCE = 1e-5
"""Tolerance for a share that needs a long pattern, see `tandem.trainer.data.mixture`."""


class StepChecker:
    """Checks chunks in order and keeps track of the tokens that were read from each source."""

    def __init__(self, sources: Sources, result: AuditResult, reader: WebdatasetReader | None):
        self._sources, self._result, self._reader = sources, result, reader
        self._coverage = {source: Coverage(each) for source, each in sources.reading_orders.items()}
        self._num_searches = self._num_failed_searches = 0
        self._phase_rows_by_source: Counter[str] = Counter()
        self._num_phase_rows = 0
        """Rows of the phase so far; -1 if unknown."""
        self.broken_sources: set[str] = set()
        """Sources whose cursors have an error that was reported, so that their token counts cannot match."""

    def check(self, steps: list[StepLine], phase: PhaseConfig, first_row: int) -> None:
        """Add a finding for each error in the steps. `first_row` is the index in the phase of their first row."""
        batch = phase.global_batch_size
        rows = np.array(row_sources(phase, first_row, len(steps) * batch)).reshape(len(steps), batch)
        expanded = {
            source: self._expand_read_ranges(source, steps, (rows == source).sum(axis=1) * phase.seq_len)
            for source in sorted({*rows.ravel().tolist(), *(name for step in steps for name in step.read_ranges)})
        }
        found = {source: ranges for source, ranges in expanded.items() if ranges is not None}
        if len(found) == len(expanded):
            read_ranges = {source: read for source, (read, _) in found.items()}
            for source, (read, skipped) in found.items():
                self._result.sources[source].tokens += int(read.tokens.sum())
                self._report_repeats(source, self._coverage[source].add(read), steps[-1].step)
                self.record_skipped_shards(source, skipped)
            self._check_mixture(steps, phase, first_row, read_ranges)
            self._check_digests(steps, phase, rows, read_ranges, first_row)
        elif len(steps) > 1:
            for index, step in enumerate(steps):
                self.check([step], phase, first_row + index * batch)
        else:
            self.broken_sources |= expanded.keys()
            self._num_phase_rows = -1

    def record_skipped_shards(self, source: str, ranges: ShardRanges) -> None:
        """Record the ranges that the run passed over because their shards are skipped."""
        if len(ranges):
            self._report_repeats(source, self._coverage[source].add(ranges), 0)
            files = self._sources.reading_orders[source].shard_files
            skipped_tokens = self._result.sources[source].skipped_shard_tokens
            for shard in np.unique(ranges.shard_index):
                tokens = int(ranges.tokens[ranges.shard_index == shard].sum())
                skipped_tokens[files[shard]] = skipped_tokens.get(files[shard], 0) + tokens

    def finish(self, cursor: Mapping[str, int], step: int) -> None:
        """Check that no token was read twice and that each source has as many tokens as its cursor, without rollbacks."""
        for source, coverage in self._coverage.items():
            self._report_repeats(source, coverage.flush(), step)
            expected = cursor.get(source, 0) - self._result.sources[source].rollback_tokens
            if source not in self.broken_sources and coverage.tokens != expected:
                message = f"the cursor of {source} is {cursor.get(source, 0)}; {coverage.tokens} tokens up to there were taken"
                self._result.report("lost", step, source, message, lost_tokens=expected - coverage.tokens)
        if not self._reader:
            return
        for (source, file), (found, listed) in sorted(self._reader.miscounted_shards.items()):
            name = f"{file}:{min(found, listed)}+{abs(found - listed)}"
            message = f"webdataset reads {found} tokens from {file} of {source}; the manifest lists {listed}"
            self._result.report("unlike", None, source, message, [name])
        for (source, file), tokens in self._reader.unreadable_tokens.items():
            self._result.notes.append(
                f"{source} skips {file}; {tokens} of its tokens that were read before cannot be read again, so the tokens of "
                "those steps are not compared"
            )

    def _check_mixture(
        self, steps: list[StepLine], phase: PhaseConfig, first_row: int, ranges_by_source: dict[str, ShardRanges]
    ) -> None:
        """Check that each source has its share of the phase's rows to within one row.

        This is the only check that does not use the loader's pattern. Source: the bound of `tandem.trainer.data.mixture`.
        """
        if first_row == 0:
            self._phase_rows_by_source, self._num_phase_rows = Counter(), 0
        if first_row != self._num_phase_rows:  # earlier steps are missing, which already is a finding
            return
        self._num_phase_rows += len(steps) * phase.global_batch_size
        for source, ranges in ranges_by_source.items():
            self._phase_rows_by_source[source] += int(ranges.tokens.sum()) // phase.seq_len
        for source in sorted({*self._phase_rows_by_source, *phase.mixture}):
            num_rows = self._phase_rows_by_source[source]
            expected_rows = phase.mixture.get(source, 0.0) * self._num_phase_rows
            if abs(num_rows - expected_rows) >= 1 + SHARE_TOLERANCE * self._num_phase_rows:
                self._num_phase_rows, step = -1, steps[-1].step
                taken = f"up to step {step} phase {phase.name} has taken {num_rows} rows of {source}"
                self._result.report("unlike", step, source, f"{taken}; its share is {expected_rows:.1f}")
                return

    def _expand_read_ranges(
        self, source: str, steps: list[StepLine], expected: IntArray
    ) -> tuple[ShardRanges, ShardRanges] | None:
        """Return the ranges of the source that the steps read and those that they passed over, or None if the mixture requires
        another number of tokens. In that case add a finding for a single step; several steps must be checked one by one.
        """
        ends = [step.read_ranges.get(source) for step in steps]
        amounts = [after - before for before, after in (each or (0, 0) for each in ends)]
        exact, found, taken = amounts == expected.tolist(), sum(amounts), [each for each in ends if each]
        skips_shards, max_span = self._sources.skipped_shards.get(source), self._sources.max_span_tokens
        if exact or (skips_shards and 0 < found <= max_span(source, int(expected.sum()))):
            read, skipped = self._sources.shard_ranges(source, *((taken[0][0], taken[-1][1]) if taken else (0, 0)))
            if (exact and not len(skipped)) or (len(steps) == 1 and read.tokens.sum() == expected[0]):
                return read, skipped
            found = int(read.tokens.sum())
        if len(steps) == 1:
            step, (before, after) = steps[0], steps[0].read_ranges.get(source, (0, 0))
            names = self._sources.shard_range_names(source, before, after) if 0 <= before < after else []
            message = f"step {step.step} took {found} tokens of {source}; its phase gives it {expected[0]}"
            self._result.report("unlike", step.step, source, message, names)
        return None

    def _report_repeats(self, source: str, repeats: ShardRanges, step: int) -> None:
        if len(repeats) and source not in self.broken_sources:
            names, tokens = self._sources.reading_orders[source].shard_range_names(repeats), int(repeats.tokens.sum())
            message = f"up to step {step} {tokens} tokens of {source} were taken twice"
            self._result.report("repeated", step, source, message, names, repeated_tokens=tokens)

    def _check_digests(
        self, steps: list[StepLine], phase: PhaseConfig, rows: np.ndarray, read: dict[str, ShardRanges], first_row: int
    ) -> None:
        range_hashes, token_hashes = np.zeros(rows.shape, np.uint64), np.zeros(rows.shape, np.uint64)
        is_unreadable = np.zeros(rows.shape, bool)
        for source, ranges in read.items():
            is_source, (cut, row_starts) = rows == source, cut_rows(ranges, phase.seq_len)
            row_indices = np.nonzero(is_source)[1]
            range_hashes[is_source] = hash_rows(row_indices, row_contents(source, cut, row_starts))
            if self._reader:
                contents = self._reader(source, cut, row_starts)
                token_hashes[is_source] = hash_rows(row_indices, [content or b"" for content in contents])
                is_unreadable[is_source] = [content is None for content in contents]
        digests = np.array([(step.ranges_digest, step.tokens_digest) for step in steps], np.uint64)
        has_wrong_ranges = range_hashes.sum(axis=1) != digests[:, 0]
        for index in np.flatnonzero(has_wrong_ranges).tolist():
            self._report_wrong_ranges(steps[index], phase, first_row + index * phase.global_batch_size)
        if self._reader:
            has_wrong_tokens = token_hashes.sum(axis=1) != digests[:, 1]
            for index in np.flatnonzero(has_wrong_tokens & ~has_wrong_ranges & ~is_unreadable.any(axis=1)).tolist():
                self._report_wrong_tokens(steps[index], self._reader)

    def _report_wrong_ranges(self, step: StepLine, phase: PhaseConfig, first_row: int) -> None:
        found = None
        if self._num_searches < MAX_SEARCHES and self._num_failed_searches < MAX_FAILED_SEARCHES:
            found = diagnose(step, phase, first_row, self._sources)
            self._num_searches += 1
            self._num_failed_searches += found is None
        if found:
            self._result.add_finding(found)
            return
        read, names = ", ".join(step.read_ranges), self._sources.step_range_names(step.read_ranges)
        message = f"step {step.step} did not read the ranges of {read} that its cursors give"
        source = read if len(step.read_ranges) == 1 else None
        self._result.report("unlike", step.step, source, f"{message}, and no single row explains it", names)

    def _report_wrong_tokens(self, step: StepLine, reader: WebdatasetReader) -> None:
        """Name the ranges that webdataset and the loader's byte offsets read differently, or all ranges if they agree now."""
        names, explanation = [], " (webdataset and the loader's byte offsets read these differently)"
        for source, ends in step.read_ranges.items():
            differing = reader.ranges_loader_reads_differently(source, self._sources.shard_ranges(source, *ends)[0])
            names += self._sources.reading_orders[source].shard_range_names(differing)
        if not names:
            names, explanation = self._sources.step_range_names(step.read_ranges), ""
        ranges = format_shard_ranges(names) + explanation
        message = f"step {step.step} was fed other tokens than its ranges hold: {ranges}"
        self._result.add_finding(Finding("unlike", message, step.step, shard_ranges=names))
