"""`tandem audit`: prove from a run's ledger and the copies of its manifests that no token was lost or repeated.

* `ledger_lines` and `ledger_history` read the ledger. `reading_order` maps cursors to ranges of shards.
* `replay` and `step_checks` check the steps. `diagnosis` finds the row that explains an error. `step_rows` expands one step.
* `webdataset_reader` reads the shards a second time for `--tokens`.

The audit uses neither checkpoints nor the loader. The run is proven if there are no findings.
"""

import argparse
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from tandem.trainer import config as configuration
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import read_file, safe_print
from tandem.trainer.data import manifest
from tandem.trainer.data.ledger import manifest_copy_path
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.metrics import progress
from tandem.trainer.tools.audit.ledger_history import LedgerHistory
from tandem.trainer.tools.audit.ledger_lines import IMMUTABLE_SETTINGS
from tandem.trainer.tools.audit.reading_order import ReadingOrder, Sources
from tandem.trainer.tools.audit.replay import Replay
from tandem.trainer.tools.audit.result import AuditResult, format_shard_ranges
from tandem.trainer.tools.audit.step_rows import find_step_rows, format_inspect_commands
from tandem.trainer.tools.audit.webdataset_reader import WebdatasetReader

MAX_SHOWN_FINDINGS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    tokens_help = (
        "also read the shards again with webdataset and compare their tokens with those that the run trained on"
    )
    step_help = "instead of a verdict, print a tandem inspect command for each range that step N read"
    add("folder", metavar="RUN", type=Path, help="run folder")
    add("--tokens", action="store_true", help=tokens_help)
    add("--step", metavar="N", type=int, help=step_help)
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the verdict, or the rows of a step. Return 0 if the run is proven, 1 if not.

    Raises: UserError if there is no ledger, or no manifest to compare it with.
    """
    history = LedgerHistory(args.folder)
    manifests = load_manifest_copies(args.folder, history)
    sources = build_sources(history, manifests)
    if args.step is not None:
        rows = find_step_rows(args.step, history, sources)
        file = args.folder / "config.yaml"
        folders = configuration.load_saved_config(file).data.sources if file.is_file() else {}
        safe_print(json.dumps(rows) if args.json else format_inspect_commands(rows, folders))
        return 0
    reader = build_reader(args.folder, manifests, history.skipped_shards) if args.tokens else None
    fingerprints = {source: corpus.fingerprint for source, corpus in manifests.items()}
    with progress.progress_bar("audit", history.num_step_lines, "steps") as advance:
        result = Replay(history, sources, fingerprints, reader).run(advance)
    tree = {"proven": result.proven, **dataclasses.asdict(result)}
    safe_print(json.dumps(tree) if args.json else format_result(args.folder, result))
    return 0 if result.proven else 1


def load_manifest_copies(folder: Path, history: LedgerHistory) -> dict[str, CorpusManifest]:
    """Load the run's copy of the manifest of every source that is named by a start that counts."""
    found = {}
    fingerprints_of_starts = (attempt.start.fingerprints for attempt in history.attempts if attempt.is_effective)
    for source in sorted({source for fingerprints in fingerprints_of_starts for source in fingerprints}):
        path = manifest_copy_path(folder, source)
        if not path.is_file():
            raise UserError(f"{path}: no such file; the audit compares the ledger with it; restore the run folder")
        found[source] = manifest.parse_manifest(read_file(path), path)
    return found


def build_sources(history: LedgerHistory, manifests: Mapping[str, CorpusManifest]) -> Sources:
    """Build the reading orders from the settings of the first start that counts. `Replay` compares them with later starts."""
    start = next(attempt.start for attempt in history.attempts if attempt.is_effective)
    settings = {name: getattr(start, name) for name in IMMUTABLE_SETTINGS}
    reading_orders = {name: ReadingOrder(corpus.train, source=name, **settings) for name, corpus in manifests.items()}
    validation_files = {name: [shard.file for shard in corpus.validation.shards] for name, corpus in manifests.items()}
    return Sources(reading_orders, validation_files)


def build_reader(
    folder: Path, manifests: Mapping[str, CorpusManifest], skipped_shards: Collection[tuple[str, str]]
) -> WebdatasetReader:
    """Open the corpora in config.yaml.  Raises: UserError if they are not the corpora of the ledger."""
    data = configuration.load_saved_config(folder / "config.yaml").data
    for source, corpus in manifests.items():
        remedy = "or leave out --tokens"
        if source not in data.sources:
            raise UserError(
                f"{folder}/config.yaml: has no data.sources.{source}, which the run has read; add it, {remedy}"
            )
        address = data.sources[source]
        if manifest.load_manifest(address).fingerprint != corpus.fingerprint:
            raise UserError(f"{address}: is not the corpus that the run read as {source}; restore it, {remedy}")
    return WebdatasetReader(data.sources, manifests, ShardCache(data.cache), skipped_shards)


def format_result(folder: Path, result: AuditResult) -> str:
    """Format sources, history and findings for people."""
    update_note = f", {result.num_skipped_updates} of them without an update" if result.num_skipped_updates else ""
    lines = [f"{folder}: {result.num_steps} steps{update_note}"]
    for name, source in result.sources.items():
        epochs = source.cursor / source.epoch_tokens
        lines.append(
            f"  {name}: {source.tokens:,} tokens taken, {epochs:.3f} epochs of {source.epoch_tokens:,}; "
            f"cursor {source.cursor:,}, next {source.next_token}; lost {source.lost_tokens}, repeated {source.repeated_tokens}"
        )
        skipped = source.skipped_shard_tokens.items()
        lines += [f"    skipped shard: {file}, {tokens:,} tokens passed over" for file, tokens in skipped]
        if source.rollback_tokens:
            ranges = format_shard_ranges(source.rollback_ranges)
            lines.append(f"    passed over by rollbacks: {source.rollback_tokens:,} tokens, {ranges}")
    lines += [f"  {note}" for note in result.notes]
    if result.proven:
        evidence = "ranges and the shards' tokens" if result.tokens_checked else "ranges"
        hint = "" if result.tokens_checked else " (add --tokens to compare the tokens themselves)"
        lines.append(
            f"proven: every step happened once, every token was read once and in order, and the recorded {evidence} match what "
            f"was read{hint}"
        )
        return "\n".join(lines)
    lines.append(f"NOT proven, {result.num_findings} findings:")
    lines += [f"  {finding.kind}: {finding.message}" for finding in result.findings[:MAX_SHOWN_FINDINGS]]
    if (num_more := result.num_findings - MAX_SHOWN_FINDINGS) > 0:
        lines.append(f"  and {num_more} more; --json has the first {len(result.findings)}")
    return "\n".join(lines)
