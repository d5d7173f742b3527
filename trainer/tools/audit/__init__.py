"""`tandem audit`: what a run was fed, proven from its ledger and the copies of its manifests alone.

`ledger_lines` and `ledger_history` read the ledger as it counts, `reading_order` turns positions into ranges of shards,
`replay` and `step_checks` check, `misread_search` and `diagnosis` say which row it was, `webdataset_reader` reads the shards
again, `step_rows` looks at a single step. Neither checkpoints nor the loader are asked. The verdict is a list of what was lost,
repeated or read out of order; an empty list is the proof.
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
from tandem.trainer.data.ledger import manifest_copy_path
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.metrics import progress
from tandem.trainer.tools.audit.ledger_history import LedgerHistory
from tandem.trainer.tools.audit.reading_order import ReadingOrder
from tandem.trainer.tools.audit.replay import Replay
from tandem.trainer.tools.audit.result import AuditResult, format_shard_ranges
from tandem.trainer.tools.audit.sources import Sources
from tandem.trainer.tools.audit.step_rows import find_step_rows, format_inspect_commands
from tandem.trainer.tools.audit.webdataset_reader import WebdatasetReader

MAX_SHOWN_FINDINGS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="read the shards again through webdataset and compare their tokens with those that were fed",
    )
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
    history = LedgerHistory(args.folder)
    manifests = load_manifest_copies(args.folder, history)
    sources = build_sources(history, manifests)
    if args.step is not None:
        rows = find_step_rows(args.step, history, sources)
        file = args.folder / "config.yaml"
        folders = configuration.load_config(file).data.sources if file.is_file() else {}
        print(json.dumps(rows) if args.json else format_inspect_commands(rows, folders))
        return 0
    result = audit(args.folder, history, sources, manifests, check_tokens=args.tokens)
    print(json.dumps(result_to_json(result)) if args.json else format_result(args.folder, result))
    return 0 if result.proven else 1


def audit(
    folder: Path,
    history: LedgerHistory,
    sources: Sources,
    manifests: Mapping[str, CorpusManifest],
    *,
    check_tokens: bool = False,
) -> AuditResult:
    """The verdict on a run; with `check_tokens` also on the bytes of the shards, which are where config.yaml says."""
    reader = build_reader(folder, manifests, history.skipped_shards) if check_tokens else None
    fingerprints = {source: corpus.fingerprint for source, corpus in manifests.items()}
    replay = Replay(history, sources, fingerprints, reader)
    with progress.progress_bar("audit", history.num_step_lines, "steps") as advance:
        return replay.run(advance)


def load_manifest_copies(folder: Path, history: LedgerHistory) -> dict[str, CorpusManifest]:
    """The copies of the manifests of every source that a start names, if the run as it counts comes from it."""
    found = {}
    fingerprints_of_starts = (attempt.start.fingerprints for attempt in history.attempts if attempt.is_effective)
    for source in sorted({source for fingerprints in fingerprints_of_starts for source in fingerprints}):
        path = manifest_copy_path(folder, source)
        if not path.is_file():
            raise UserError(f"{path}: no such file; an audit compares the ledger with it; restore the run folder")
        found[source] = manifest.parse_manifest(path.read_bytes(), path)
    return found


def build_sources(history: LedgerHistory, manifests: Mapping[str, CorpusManifest]) -> Sources:
    """The corpora in the order of the first start's settings; that later starts have the same is for the replay to check."""
    settings = next(attempt for attempt in history.attempts if attempt.is_effective).immutable_settings
    reading_orders = {
        source: ReadingOrder(corpus.train, source=source, **settings) for source, corpus in manifests.items()
    }
    validation_files = {
        source: [shard.file for shard in corpus.validation.shards] for source, corpus in manifests.items()
    }
    return Sources(reading_orders, validation_files)


def build_reader(
    folder: Path, manifests: Mapping[str, CorpusManifest], skipped_shards: Collection[tuple[str, str]]
) -> WebdatasetReader:
    """A reader of the corpora that config.yaml names, which must be those of the ledger, but for shards left out."""
    data = configuration.load_config(folder / "config.yaml").data
    for source, corpus in manifests.items():
        if source not in data.sources:
            raise UserError(
                f"{folder}/config.yaml: has no data.sources.{source}, which the run has read; add it, or leave out --tokens"
            )
        if manifest.load_manifest(data.sources[source]).fingerprint != corpus.fingerprint:
            raise UserError(
                f"{data.sources[source]}: is not the corpus that the run read as {source}; restore it, or leave out --tokens"
            )
    return WebdatasetReader(data.sources, manifests, ShardCache(data.cache), skipped_shards)


def result_to_json(result: AuditResult) -> dict[str, Any]:
    """The verdict as it goes into JSON."""
    return {"proven": result.proven, **dataclasses.asdict(result)}


def format_result(folder: Path, result: AuditResult) -> str:
    """The verdict for people: sources, history, and what is wrong."""
    update_note = f", {result.num_skipped_updates} of them without an update" if result.num_skipped_updates else ""
    lines = [f"{folder}: {result.num_steps} steps{update_note}"]
    for name, source in result.sources.items():
        epochs = source.cursor / source.epoch_tokens
        lines.append(
            f"  {name}: {source.tokens:,} tokens taken, {epochs:.3f} epochs of {source.epoch_tokens:,}; "
            f"cursor {source.cursor:,}, next {source.next_token}; lost {source.lost_tokens}, repeated {source.repeated_tokens}"
        )
        lines += [
            f"    left out: {file}, {tokens:,} tokens passed over"
            for file, tokens in source.skipped_shard_tokens.items()
        ]
        if source.rollback_tokens:
            ranges = format_shard_ranges(source.rollback_ranges)
            lines.append(f"    passed over by rollbacks: {source.rollback_tokens:,} tokens, {ranges}")
    lines += [f"  {note}" for note in result.notes]
    if result.proven:
        evidence_note = (
            "their ranges and the shards' bytes agree"
            if result.tokens_checked
            else "their ranges agree (bytes: --tokens)"
        )
        return "\n".join(
            [*lines, f"proven: each step once, each token once and in order; {evidence_note} with what was read"]
        )
    lines.append(f"NOT proven, {result.num_findings} findings:")
    lines += [f"  {finding.kind}: {finding.message}" for finding in result.findings[:MAX_SHOWN_FINDINGS]]
    if result.num_findings > MAX_SHOWN_FINDINGS:
        lines.append(
            f"  and {result.num_findings - MAX_SHOWN_FINDINGS} more; --json has the first {len(result.findings)}"
        )
    return "\n".join(lines)
