"""Find the ranges that each row of one step had to read, for example to inspect the data of a loss spike."""

import shlex
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.ledger_history import LedgerHistory
from tandem.trainer.tools.audit.ledger_lines import Attempt, BadStepLine, SkipLine, StepLine
from tandem.trainer.tools.audit.reading_order import Sources, cut_rows


def find_step_rows(step: int, history: LedgerHistory, sources: Sources) -> list[dict[str, Any]]:
    """Return the ranges that each row of a step had to read, according to the last attempt that made the step.

    Raises: UserError if the ledger has no such step.
    """
    attempt = history.attempts[0]
    for line in history.effective_lines():
        if isinstance(line, StepLine):
            if line.step == step:
                return expand_step(line, attempt, sources)
        elif not isinstance(line, BadStepLine):
            if isinstance(line, Attempt):
                attempt, sources.skipped_shards = line, {}
            for skipped in [(line.source, line.shard)] if isinstance(line, SkipLine) else attempt.skipped_shards:
                sources.skip_shard(*skipped)
    raise UserError(f"--step: {history.path} has no step {step}; name a step that the run has completed")


def expand_step(step: StepLine, attempt: Attempt, sources: Sources) -> list[dict[str, Any]]:
    def invalid_ledger(problem: str) -> UserError:
        return UserError(f"--step: step {step.step} {problem}; run tandem audit without --step to find the cause")

    if (span := attempt.phase_span_at(step.step)) is None:
        raise invalid_ledger("is outside every phase that the preceding start record lists, so the ledger was edited")
    phase, first_step, _ = span
    first_row = (step.step - 1 - first_step) * phase.global_batch_size
    sources_by_row = row_sources(phase, first_row, phase.global_batch_size)
    rows_by_source = {}
    for source, (start, end) in step.read_ranges.items():
        num_tokens = sources_by_row.count(source) * phase.seq_len
        if source not in sources or end - start > sources.max_span_tokens(source, num_tokens):
            raise invalid_ledger(f"read {end - start} tokens of {source}, which its phase does not allow")
        ranges, row_starts = cut_rows(sources.shard_ranges(source, start, end)[0], phase.seq_len)
        rows_by_source[source] = iter([ranges.select(np.arange(*ends)) for ends in pairwise(row_starts.tolist())])
    found = []
    for row_index, source in enumerate(sources_by_row):
        if (row := next(rows_by_source.get(source, iter(())), None)) is None:
            raise invalid_ledger(f"read fewer tokens of {source} than its phase requires")
        order = sources.reading_orders[source]
        epoch, names = int(row.position[0]) // order.epoch_tokens, order.shard_range_names(row, limit=len(row))
        found.append({"row": row_index, "source": source, "epoch": epoch, "shards": names})
    return found


def format_inspect_commands(rows: list[dict[str, Any]], folders: Mapping[str, str]) -> str:
    """Return the commands that show the ranges of each row. `folders` are the folders or addresses of sources, if known."""
    lines = []
    for row in rows:
        corpus = shlex.quote(folders.get(row["source"], row["source"].upper()))
        for shard in row["shards"]:
            file, tokens = shard.rsplit(":", 1)
            command = f"tandem inspect {corpus} --shard {shlex.quote(file)} --tokens {tokens}"
            lines.append(f"row {row['row']}, {row['source']}, epoch {row['epoch']}: {command}")
    return "\n".join(lines)
