"""What each row of one step was to read: for who wants to know what a spike of the loss was fed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.ledger_history import LedgerHistory
from tandem.trainer.tools.audit.ledger_lines import Attempt, BadStepLine, SkipLine, StepLine
from tandem.trainer.tools.audit.sources import Sources


def find_step_rows(step: int, history: LedgerHistory, sources: Sources) -> list[dict[str, Any]]:
    """What each row of the `step`-th step was to read, by the cursors of its last attempt.

    Raises: UserError where the ledger has no such step.
    """
    attempt = history.attempts[0]
    for line in history.effective_lines():
        if isinstance(line, StepLine):
            if line.step == step:
                return expand_step(line, attempt, sources)
            continue
        if isinstance(line, BadStepLine):
            continue
        if isinstance(line, Attempt):
            attempt, sources.skipped_shards = line, {}
        for source, shard in [(line.source, line.shard)] if isinstance(line, SkipLine) else attempt.skipped_shards:
            sources.skip_shard(source, shard)
    raise UserError(f"--step: {step}; {history.path} has no such step; name one that the run has made")


def expand_step(step: StepLine, attempt: Attempt, sources: Sources) -> list[dict[str, Any]]:
    span = attempt.phase_span_at(step.step)
    if span is None:
        raise UserError(
            f"--step: {step.step}; its start has no phase for it; the ledger was edited; see tandem audit without --step"
        )
    phase, first_step, _ = span
    sources_by_row = row_sources(phase, (step.step - 1 - first_step) * phase.global_batch_size, phase.global_batch_size)
    ranges_by_source = {}
    for source, (before, after) in step.read_ranges.items():
        if source not in sources or after - before > sources.max_span_tokens(
            source, sources_by_row.count(source) * phase.seq_len
        ):
            raise UserError(
                f"--step: {step.step}; it took {after - before} tokens of {source}, which its phase does not give; "
                "see tandem audit without --step"
            )
        pieces, starts = sources.cut_rows(source, before, after, phase.seq_len)
        ranges = [pieces.select(np.arange(begin, end)) for begin, end in pairwise(starts.tolist())]
        ranges_by_source[source] = iter([(row, sources.reading_orders[source]) for row in ranges])
    found = []
    for row_index, source in enumerate(sources_by_row):
        row, expansion = next(ranges_by_source.get(source, iter(())), (None, None))
        if row is None or expansion is None:
            raise UserError(f"--step: {step.step}; it took too little of {source}; see tandem audit without --step")
        epoch = int(row.position[0]) // expansion.epoch_tokens
        found.append(
            {
                "row": row_index,
                "source": source,
                "epoch": epoch,
                "shards": expansion.shard_range_names(row, limit=len(row)),
            }
        )
    return found


def format_inspect_commands(rows: list[dict[str, Any]], folders: Mapping[str, str]) -> str:
    """The command that shows each range of each row; `corpora` are the folders or addresses of sources, where known."""
    lines = []
    for row in rows:
        for shard in row["shards"]:
            file, tokens = shard.rsplit(":", 1)
            corpus = shlex.quote(folders.get(row["source"], row["source"].upper()))
            command = f"tandem inspect {corpus} --shard {shlex.quote(file)} --tokens {tokens}"
            lines.append(f"row {row['row']}, {row['source']}, epoch {row['epoch']}: {command}")
    return "\n".join(lines)
