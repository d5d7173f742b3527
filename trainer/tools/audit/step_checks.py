"""What a chunk of neighbouring steps was fed: amounts by the mixture, ranges by the evidence, each token at most once.

All at once for numpy's sake; a chunk with anything odd in it is taken apart and checked step by step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tandem.trainer.config import Phase
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.coverage import Coverage
from tandem.trainer.tools.audit.diagnosis import Suspect, named, unnamed
from tandem.trainer.tools.audit.ledger_lines import Step
from tandem.trainer.tools.audit.misread_search import digests
from tandem.trainer.tools.audit.reading_order import Ints, Pieces, rows
from tandem.trainer.tools.audit.result import Finding, Verdict, ranges_words
from tandem.trainer.tools.audit.sources import Corpora, contents
from tandem.trainer.tools.audit.tar_reader import TarReader

MOST_SEARCHES, MOST_IN_VAIN = 32, 4
"""Steps whose mistake is searched for, and those that nothing was found for; a search among 1,000 rows takes some seconds."""
ROUNDING = 1e-5
"""Of a share that needs a long pattern, see `tandem.trainer.data.mixture`."""


class Feed:
    """Checks chunks, one after the other, and keeps what has been taken of each source."""

    def __init__(self, corpora: Corpora, verdict: Verdict, tokens: TarReader | None):
        self._corpora, self._verdict, self._tokens = corpora, verdict, tokens
        self._coverage = {source: Coverage(each) for source, each in corpora.expansions.items()}
        self._searches = self._in_vain = 0
        self._shares: Counter[str] = Counter()
        self._shared = 0
        """Rows of the phase so far, of each source and of all; -1: no longer known."""
        self.broken: set[str] = set()
        """Sources that have been seen not to be read in one line, so that the count of their tokens cannot come out."""

    def check(self, steps: Sequence[Step], phase: Phase, first_row: int) -> None:
        """Whatever is wrong with the steps, which begin with row `first_row` of their phase, is on record."""
        names = np.array(row_sources(phase, first_row, len(steps) * phase.rows)).reshape(len(steps), phase.rows)
        taken = {}
        for source in sorted({*names.flat, *(name for step in steps for name in step.taken)}):
            taken[source] = self._taken(source, steps, (names == source).sum(axis=1) * phase.seq_len)
        kept = {source: pieces for source, pieces in taken.items() if pieces is not None}
        if len(kept) == len(taken):
            for source, (pieces, passed) in kept.items():
                self._verdict.sources[source].tokens += int(pieces.tokens.sum())
                self._cover(source, pieces, steps[-1].number)
                self.pass_over(source, passed)
            self._check_shares(steps, phase, first_row, {source: pieces for source, (pieces, _) in kept.items()})
            self._check_digests(
                steps, phase, names, {source: pieces for source, (pieces, _) in kept.items()}, first_row
            )
        elif len(steps) > 1:
            for index, step in enumerate(steps):
                self.check([step], phase, first_row + index * phase.rows)
        else:
            self.broken |= taken.keys()
            self._shared = -1

    def pass_over(self, source: str, pieces: Pieces) -> None:
        """The pieces, of shards that are left out, were passed by."""
        if len(pieces):
            self._cover(source, pieces, 0)
            files, passed = self._corpora.expansions[source].files, self._verdict.sources[source].passed_over
            for shard in np.unique(pieces.shard):
                tokens = int(pieces.tokens[pieces.shard == shard].sum())
                passed[files[shard]] = passed.get(files[shard], 0) + tokens

    def roll_past(self, source: str, start: int, end: int) -> None:
        """Places [start, end) were read for steps that a rollback took back, and are taken by none."""
        standing = self._verdict.sources[source]
        standing.rollback_tokens += end - start
        standing.rollback_ranges += self._corpora.named(source, start, end)

    def end(self, cursor: Mapping[str, int], step: int) -> None:
        """No source was taken twice anywhere, and as many tokens as its cursor says, less what rollbacks passed over."""
        for source, coverage in self._coverage.items():
            self._report(source, coverage.sorted_in(), step)
            due = cursor.get(source, 0) - self._verdict.sources[source].rollback_tokens
            if source not in self.broken and coverage.tokens != due:
                self._verdict.find(
                    Finding(
                        "lost", f"{source} stands at {cursor.get(source, 0)}; {coverage.tokens} tokens up to there were taken",
                        step, source, lost_tokens=due - coverage.tokens,
                    )
                )  # fmt: skip
        for (source, file), tokens in self._tokens.gone_tokens.items() if self._tokens else []:
            self._verdict.notes.append(
                f"{source} leaves out {file}; its {tokens} tokens taken before cannot be read again, and the bytes of "
                "the steps that took them are not compared"
            )

    def _check_shares(self, steps: Sequence[Step], phase: Phase, first_row: int, kept: Mapping[str, Pieces]) -> None:
        """Each source has had its share of the phase's rows to within one row, whichever those are: the one thing here that is
        said without the loader's pattern. Source: the bound of `tandem.trainer.data.mixture`.
        """
        if first_row == 0:
            self._shares, self._shared = Counter(), 0
        if first_row != self._shared:  # steps before these are missing, which is on record
            return
        self._shared += len(steps) * phase.rows
        self._shares.update({source: int(pieces.tokens.sum()) // phase.seq_len for source, pieces in kept.items()})
        for source in sorted({*self._shares, *phase.mixture}):
            found, due = self._shares[source], phase.mixture.get(source, 0.0) * self._shared
            if abs(found - due) >= 1 + ROUNDING * self._shared:
                self._shared = -1
                self._verdict.find(
                    Finding(
                        "unlike", f"up to step {steps[-1].number} phase {phase.name} has taken {found} rows of {source}; its "
                        f"share is {due:.1f}", steps[-1].number, source,
                    )
                )  # fmt: skip
                return

    def _taken(self, source: str, steps: Sequence[Step], expected: Ints) -> tuple[Pieces, Pieces] | None:
        """What the steps took of the source and what they passed over; None where that is not what the mixture gives. For one
        step this is then on record; for several it only says that they must be looked at one by one.
        """
        ends = [step.taken.get(source) for step in steps]
        amounts = [after - before for before, after in (each or (0, 0) for each in ends)]
        exact, found, taken = amounts == expected.tolist(), sum(amounts), [each for each in ends if each]
        if exact or (
            self._corpora.left_out.get(source) and 0 < found <= self._corpora.most(source, int(expected.sum()))
        ):
            kept, passed = self._corpora.pieces(source, taken[0][0] if taken else 0, taken[-1][1] if taken else 0)
            if (exact and not len(passed)) or (len(steps) == 1 and kept.tokens.sum() == expected[0]):
                return kept, passed
            found = int(kept.tokens.sum())
        if len(steps) == 1:
            before, after = steps[0].taken.get(source, (0, 0))
            ranges = self._corpora.named(source, before, after) if 0 <= before < after else []
            self._verdict.find(
                Finding(
                    "unlike", f"step {steps[0].number} took {found} tokens of {source}; its phase gives it {expected[0]}: "
                    f"{ranges_words(ranges)}", steps[0].number, source, shards=ranges,
                )
            )  # fmt: skip
        return None

    def _cover(self, source: str, pieces: Pieces, step: int) -> None:
        self._report(source, self._coverage[source].add(pieces), step)

    def _report(self, source: str, twice: Pieces, step: int) -> None:
        if not len(twice) or source in self.broken:
            return
        ranges, tokens = self._corpora.expansions[source].named(twice), int(twice.tokens.sum())
        self._verdict.find(
            Finding(
                "repeated", f"up to step {step} {tokens} tokens of {source} were taken twice: {ranges_words(ranges)}",
                step, source, shards=ranges, repeated_tokens=tokens,
            )
        )  # fmt: skip

    def _check_digests(
        self, steps: Sequence[Step], phase: Phase, names: np.ndarray, kept: Mapping[str, Pieces], first_row: int
    ) -> None:
        ranges, tokens = np.zeros(names.size, np.uint64), np.zeros(names.size, np.uint64)
        gone = np.zeros(names.size, bool)
        for source, pieces in kept.items():
            mine, (cut, starts) = np.flatnonzero(names == source), rows(pieces, phase.seq_len)
            ranges[mine] = digests(mine % phase.rows, contents(source, cut, starts))
            if self._tokens:
                read = self._tokens(source, cut, starts)
                tokens[mine] = digests(mine % phase.rows, [row or b"" for row in read])
                gone[mine] = [row is None for row in read]
        wrong = ranges.reshape(names.shape).sum(axis=1) != np.array([step.ranges for step in steps], np.uint64)
        for index in np.flatnonzero(wrong).tolist():
            self._name(Suspect(steps[index], phase, first_row + index * phase.rows))
        if self._tokens:
            other = tokens.reshape(names.shape).sum(axis=1) != np.array([step.tokens for step in steps], np.uint64)
            for index in np.flatnonzero(other & ~wrong & ~gone.reshape(names.shape).any(axis=1)).tolist():
                self._other_tokens(steps[index])

    def _name(self, suspect: Suspect) -> None:
        found = None
        if self._searches < MOST_SEARCHES and self._in_vain < MOST_IN_VAIN:
            found = named(suspect, self._corpora)
            self._searches += 1
            self._in_vain += found is None
        self._verdict.find(found or unnamed(suspect.step, self._corpora))

    def _other_tokens(self, step: Step) -> None:
        shards = [words for source, ends in step.taken.items() for words in self._corpora.named(source, *ends)]
        self._verdict.find(
            Finding(
                "unlike", f"step {step.number} was fed other tokens than its ranges hold: {ranges_words(shards)}",
                step.number, shards=shards,
            )
        )  # fmt: skip
