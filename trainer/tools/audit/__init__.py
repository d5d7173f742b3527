"""`tandem audit`: what a run was fed, proven from its ledger and the copies of its manifests alone.

`records` and `history` read the ledger as it counts, `expansion` turns positions into ranges of shards, `replay` and `feed`
check, `search` and `naming` say which row it was, `tokens` reads the shards again, `one_step` looks at a single step. Neither
checkpoints nor the loader are asked. The verdict is a list of what was lost, repeated or read out of order; an empty list is
the proof.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tandem.trainer import config as configuration
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.ledger import manifest_copy
from tandem.trainer.data.manifest import Manifest
from tandem.trainer.data.shard_cache import Cache
from tandem.trainer.metrics import progress
from tandem.trainer.tools.audit.ledger_history import History
from tandem.trainer.tools.audit.reading_order import Expansion
from tandem.trainer.tools.audit.replay import Replay
from tandem.trainer.tools.audit.result import Verdict, ranges_words
from tandem.trainer.tools.audit.sources import Corpora
from tandem.trainer.tools.audit.step_rows import rows_of, step_words
from tandem.trainer.tools.audit.tar_reader import TarReader

MOST_SHOWN = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--tokens", action="store_true", help="read the shards again and compare what they hold")
    parser.add_argument(
        "--step",
        metavar="N",
        type=int,
        help="print what each row of the N-th step was fed, for tandem inspect, and no verdict",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")


def run(args: argparse.Namespace) -> int:
    """The verdict, or the rows of a step, are printed; returns 0 if all is proven, 1 if not.

    Raises: UserError where there is no ledger or no manifest to compare it with.
    """
    history = History(args.folder)
    manifests = copies(args.folder, history)
    corpora = corpora_of(history, manifests)
    if args.step is not None:
        found = rows_of(args.step, history, corpora)
        file = args.folder / "config.yaml"
        folders = configuration.load(file).data.sources if file.is_file() else {}
        print(json.dumps(found) if args.json else step_words(found, folders))
        return 0
    verdict = audit(args.folder, history, corpora, manifests, tokens=args.tokens)
    print(json.dumps(machine_words(verdict)) if args.json else words(args.folder, verdict))
    return 0 if verdict.proven else 1


def audit(
    folder: Path, history: History, corpora: Corpora, manifests: Mapping[str, Manifest], *, tokens: bool = False
) -> Verdict:
    """The verdict on a run; with `tokens` also on the bytes of the shards, which are where config.yaml says."""
    reader = reader_of(folder, manifests, history.left_out) if tokens else None
    fingerprints = {source: corpus.fingerprint for source, corpus in manifests.items()}
    replay = Replay(history, corpora, fingerprints, reader)
    with progress.shown("audit", history.steps_made, "steps") as advance:
        return replay.run(advance)


def copies(folder: Path, history: History) -> dict[str, Manifest]:
    """The copies of the manifests of every source that a start names, if the run as it counts comes from it."""
    found = {}
    named = (attempt.start.fingerprints for attempt in history.attempts if attempt.counts)
    for source in sorted({source for fingerprints in named for source in fingerprints}):
        path = manifest_copy(folder, source)
        if not path.is_file():
            raise UserError(f"{path}: no such file; an audit compares the ledger with it; restore the run folder")
        found[source] = manifest.parsed(path.read_bytes(), path)
    return found


def corpora_of(history: History, manifests: Mapping[str, Manifest]) -> Corpora:
    """The corpora in the order of the first start's settings; that later starts have the same is for the replay to check."""
    fixed = next(attempt for attempt in history.attempts if attempt.counts).fixed
    expansions = {source: Expansion(corpus.train, name=source, **fixed) for source, corpus in manifests.items()}
    held_out = {source: [shard.file for shard in corpus.validation.shards] for source, corpus in manifests.items()}
    return Corpora(expansions, held_out)


def reader_of(folder: Path, manifests: Mapping[str, Manifest], left_out: Collection[tuple[str, str]]) -> TarReader:
    """A reader of the corpora that config.yaml names, which must be those of the ledger, but for shards left out."""
    data = configuration.load(folder / "config.yaml").data
    for source, corpus in manifests.items():
        if source not in data.sources:
            raise UserError(
                f"{folder}/config.yaml: has no data.sources.{source}, which the run has read; add it, or leave out --tokens"
            )
        if manifest.load(data.sources[source]).fingerprint != corpus.fingerprint:
            raise UserError(
                f"{data.sources[source]}: is not the corpus that the run read as {source}; restore it, or leave out --tokens"
            )
    return TarReader(data.sources, manifests, Cache(data.cache), left_out)


def machine_words(verdict: Verdict) -> dict[str, Any]:
    """The verdict as it goes into JSON."""
    return {"proven": verdict.proven, **dataclasses.asdict(verdict)}


def words(folder: Path, verdict: Verdict) -> str:
    """The verdict for people: sources, history, and what is wrong."""
    without = f", {verdict.steps_without_update} of them without an update" if verdict.steps_without_update else ""
    lines = [f"{folder}: {verdict.steps} steps{without}"]
    for name, source in verdict.sources.items():
        epochs = source.cursor / source.epoch_tokens
        lines.append(
            f"  {name}: {source.tokens:,} tokens taken, {epochs:.3f} epochs of {source.epoch_tokens:,}; "
            f"cursor {source.cursor:,}, next {source.next}; lost {source.lost_tokens}, repeated {source.repeated_tokens}"
        )
        lines += [f"    left out: {file}, {tokens:,} tokens passed over" for file, tokens in source.passed_over.items()]
        if source.rollback_tokens:
            ranges = ranges_words(source.rollback_ranges)
            lines.append(f"    passed over by rollbacks: {source.rollback_tokens:,} tokens, {ranges}")
    lines += [f"  {note}" for note in verdict.notes]
    if verdict.proven:
        read = (
            "their ranges and the shards' bytes agree"
            if verdict.checked_tokens
            else "their ranges agree (bytes: --tokens)"
        )
        return "\n".join([*lines, f"proven: each step once, each token once and in order; {read} with what was read"])
    lines.append(f"NOT proven, {verdict.num_findings} findings:")
    lines += [f"  {finding.kind}: {finding.says}" for finding in verdict.findings[:MOST_SHOWN]]
    if verdict.num_findings > MOST_SHOWN:
        lines.append(f"  and {verdict.num_findings - MOST_SHOWN} more; --json has the first {len(verdict.findings)}")
    return "\n".join(lines)
