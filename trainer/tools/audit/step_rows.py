"""What each row of one step was to read: for who wants to know what a spike of the loss was fed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.ledger_history import History
from tandem.trainer.tools.audit.ledger_lines import Attempt, Bad, Skip, Step
from tandem.trainer.tools.audit.sources import Corpora


def rows_of(number: int, history: History, corpora: Corpora) -> list[dict[str, Any]]:
    """What each row of the `number`-th step was to read, by the cursors of its last attempt.

    Raises: UserError where the ledger has no such step.
    """
    attempt = history.attempts[0]
    for record in history.accepted():
        if isinstance(record, Step):
            if record.number == number:
                return step_rows(record, attempt, corpora)
            continue
        if isinstance(record, Bad):
            continue
        if isinstance(record, Attempt):
            attempt, corpora.left_out = record, {}
        for source, shard in [(record.source, record.shard)] if isinstance(record, Skip) else attempt.skips:
            corpora.leave_out(source, shard)
    raise UserError(f"--step: {number}; {history.path} has no such step; name one that the run has made")


def step_rows(step: Step, attempt: Attempt, corpora: Corpora) -> list[dict[str, Any]]:
    span = attempt.span_of(step.number)
    if span is None:
        raise UserError(
            f"--step: {step.number}; its start has no phase for it; the ledger was edited; see tandem audit without --step"
        )
    phase, first_step, _ = span
    names = row_sources(phase, (step.number - 1 - first_step) * phase.rows, phase.rows)
    lines = {}
    for source, (before, after) in step.taken.items():
        if source not in corpora or after - before > corpora.most(source, names.count(source) * phase.seq_len):
            raise UserError(
                f"--step: {step.number}; it took {after - before} tokens of {source}, which its phase does not give; "
                "see tandem audit without --step"
            )
        pieces, starts = corpora.rows(source, before, after, phase.seq_len)
        ranges = [pieces.where(np.arange(begin, end)) for begin, end in pairwise(starts.tolist())]
        lines[source] = iter([(row, corpora.expansions[source]) for row in ranges])
    found = []
    for number, source in enumerate(names):
        row, expansion = next(lines.get(source, iter(())), (None, None))
        if row is None or expansion is None:
            raise UserError(f"--step: {step.number}; it took too little of {source}; see tandem audit without --step")
        epoch = int(row.position[0]) // expansion.epoch_tokens
        found.append({"row": number, "source": source, "epoch": epoch, "shards": expansion.named(row, limit=len(row))})
    return found


def step_words(rows: list[dict[str, Any]], corpora: Mapping[str, str]) -> str:
    """The command that shows each range of each row; `corpora` are the folders or addresses of sources, where known."""
    lines = []
    for row in rows:
        for shard in row["shards"]:
            file, tokens = shard.rsplit(":", 1)
            corpus = shlex.quote(corpora.get(row["source"], row["source"].upper()))
            command = f"tandem inspect {corpus} --shard {shlex.quote(file)} --tokens {tokens}"
            lines.append(f"row {row['row']}, {row['source']}, epoch {row['epoch']}: {command}")
    return "\n".join(lines)
