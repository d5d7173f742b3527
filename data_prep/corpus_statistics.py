"""Statistics of a corpus: the facts of its manifest and the lengths of its documents.

Lengths are counted from tokens. Documents are shuffled over shards, so a few shards represent all. `collect_statistics`
returns a dict, which `--json` prints. `print_statistics` prints it as tables.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tandem.data_prep.corpus_reader import CorpusReader
from tandem.data_prep.settings import DROPPED_COUNT_NAMES
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.data.manifest import Shard
from tandem.trainer.runtime.processors import usable_processors

QUARTILES = {"quarter": 0.25, "median": 0.5, "three_quarters": 0.75}


def sample_shards(shards: Sequence[Shard], num_shards: int) -> list[Shard]:
    """Return `num_shards` evenly spaced shards, or all if there are fewer."""
    num_shards = min(num_shards, len(shards))
    return [shards[index * len(shards) // num_shards] for index in range(num_shards)]


def _scan_shards(
    corpus: CorpusReader, shards: Sequence[Shard], advance: Callable[[int], None]
) -> tuple[Counter[int], int]:
    """Read every token of the shards, in one thread per core.

    Return the number of documents of each length in tokens, EOS included, and the UTF-8 bytes of their text, which are 0
    if the tokenizer is not byte-level.
    """
    lengths: Counter[int] = Counter()
    text_bytes = 0
    with ThreadPoolExecutor(usable_processors()) as pool:
        for shard, (found, found_bytes) in zip(shards, pool.map(partial(_scan_shard, corpus), shards), strict=True):
            lengths.update(found)
            text_bytes += found_bytes
            advance(shard.bytes)
    return lengths, text_bytes


def _scan_shard(corpus: CorpusReader, shard: Shard) -> tuple[Counter[int], int]:
    eos, widths = corpus.manifest.eos_id, corpus.vocabulary.token_sizes_bytes
    ends, first, text_bytes = [np.zeros(1, np.int64)], 0, 0
    for sample in corpus.read_samples(shard):
        ends.append(np.flatnonzero(sample == eos) + first + 1)
        first += len(sample)
        if widths is not None:
            text_bytes += int(widths.take(sample).sum(dtype=np.int64)) - len(ends[-1]) * int(widths[eos])
    lengths, counts = np.unique(np.diff(np.concatenate(ends)), return_counts=True)
    return Counter(dict(zip(lengths.tolist(), counts.tolist(), strict=True))), text_bytes


def collect_statistics(
    corpus: CorpusReader, scanned_shards: Sequence[Shard], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Return the statistics of the corpus as values for JSON. The lengths of documents are those of the scanned shards.

    Raises: DamagedShard.
    """
    manifest, vocabulary = corpus.manifest, corpus.vocabulary
    length_counts, text_bytes = _scan_shards(corpus, scanned_shards, advance)
    tokens, lengths = manifest.train.tokens + manifest.validation.tokens, _summarize_lengths(length_counts)
    splits = {name: getattr(manifest, name) for name in ("train", "validation")}
    tokenizer = {
        "model": vocabulary.model_type,
        "byte_level": vocabulary.is_byte_level,
        "sha256": manifest.tokenizer_sha256,
    }
    size_bytes = sum(shard.bytes for shard in manifest.shards)
    return {
        "corpus": corpus.folder, "fingerprint": manifest.fingerprint, "tokenizer": tokenizer, "vocab": manifest.vocab,
        "eos": {"token": manifest.eos_token, "id": manifest.eos_id},
        "dtype": manifest.dtype, "sample_tokens": manifest.sample_tokens,
        "documents": sum(split.documents for split in splits.values()),
        "tokens": tokens, "shards": len(manifest.shards), "bytes": size_bytes,
        "overhead": size_bytes / (tokens * manifest.token_bytes) - 1,
        "unigram_entropy_nats": manifest.unigram_entropy_nats,
        "splits": {name: asdict(split) | {"shards": len(split.shards)} for name, split in splits.items()},
        "groups": {
            name: counts | {"share": counts["tokens"] / tokens, "mean_length": counts["tokens"] / counts["documents"]}
            for name, counts in manifest.groups.items()
        },
        "left_out": {name: count for name, count in manifest.counts.items() if name in DROPPED_COUNT_NAMES and count},
        "padding_tokens": manifest.counts.get("padding_tokens", 0), "settings": manifest.settings,
        "scanned_shards": len(scanned_shards),
        "text_bytes_per_token": text_bytes / lengths["tokens"] if vocabulary.is_byte_level else None,
        "lengths": lengths,
    }  # fmt: skip


def _summarize_lengths(length_counts: Counter[int]) -> dict[str, Any]:
    lengths = np.array(sorted(length_counts), np.int64)
    documents = np.array([length_counts[int(length)] for length in lengths], np.int64)
    below, total = documents.cumsum(), int(documents.sum())
    indices = {name: below.searchsorted(share * (total - 1), "right") for name, share in QUARTILES.items()}
    quartiles = {name: int(lengths[index]) for name, index in indices.items()}
    powers = np.log2(lengths).astype(np.int64)
    bins = [
        {
            "from": 1 << power, "to": (2 << power) - 1, "documents": int(documents[powers == power].sum()),
            "tokens": int((documents * lengths)[powers == power].sum()),
        }
        for power in range(int(powers[0]), int(powers[-1]) + 1)
    ]  # fmt: skip
    return {
        "documents": total, "tokens": int((documents * lengths).sum()),
        "shortest": int(lengths[0]), **quartiles, "longest": int(lengths[-1]), "bins": bins,
    }  # fmt: skip


def print_statistics(statistics: dict[str, Any], console: Console) -> None:
    """Print the dict of `collect_statistics` as tables."""
    counts = _format_counts(statistics)
    console.print(
        f"{escape_control_characters(statistics['corpus'])}: {counts}, vocab {statistics['vocab']:,}", soft_wrap=True
    )
    table = Table.grid(padding=(0, 2))
    for name, line in _summary_lines(statistics):
        table.add_row(f"  {name}", Text(escape_control_characters(line, one_line=True), overflow="fold"))
    console.print(table)
    if statistics["groups"]:
        console.print(_groups_table(statistics))
    console.print(_lengths_table(statistics))


def _summary_lines(statistics: dict[str, Any]) -> list[tuple[str, str]]:
    tokenizer, eos = statistics["tokenizer"], statistics["eos"]
    kind = f"{tokenizer['model']}{' of bytes' if tokenizer['byte_level'] else ''}"
    overhead = f"{statistics['overhead']:.2%} more than their tokens"
    lines = [
        ("tokenizer", f"{kind}, sha256 {tokenizer['sha256'][:12]}; documents end with {eos['token']}, id {eos['id']}"),
        ("shards", f"{statistics['shards']:,}, {statistics['bytes']:,} bytes: {overhead}"),
        ("samples", f"of {statistics['sample_tokens']:,} tokens, {statistics['dtype']}"),
    ]
    for name, split in statistics["splits"].items():
        lines.append((name, f"{_format_counts(split)}, {split['shards']:,} shards"))
    if statistics["text_bytes_per_token"]:
        lines.append(("text", f"{statistics['text_bytes_per_token']:.3f} bytes a token"))
    lines.append(
        ("entropy", f"{statistics['unigram_entropy_nats']:.4f} nats, of the frequencies of the training tokens")
    )
    if statistics["left_out"]:
        counts = (f"{count:,} {_spaced_name(name)}" for name, count in statistics["left_out"].items())
        lines.append(("left out", ", ".join(counts)))
    if statistics["padding_tokens"]:
        lines.append(("padding", f"{statistics['padding_tokens']:,} ids removed from the ends of samples"))
    lines.append(("settings", ", ".join(_describe_settings(statistics["settings"]))))
    return [*lines, ("fingerprint", statistics["fingerprint"][:12])]


def _describe_settings(settings: dict[str, Any]) -> Iterator[str]:
    """Describe the settings that are not off, zero or empty."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _describe_settings(value)
        elif value not in (None, False, 0, ""):
            yield _spaced_name(name) if value is True else f"{_spaced_name(name)} {str(value)[:24]}"


def _groups_table(statistics: dict[str, Any]) -> Table:
    table = _new_table("group", "documents", "tokens", "share of tokens", "mean length")
    for name, group in statistics["groups"].items():
        counts = [f"{group[of]:,}" for of in ("documents", "tokens")]
        table.add_row(
            Text(escape_control_characters(name, one_line=True) or "(none)"),
            *counts,
            f"{group['share']:.2%}",
            f"{group['mean_length']:,.0f}",
        )
    return table


def _lengths_table(statistics: dict[str, Any]) -> Table:
    lengths = statistics["lengths"]
    table = _new_table("tokens", "documents", "share", "of tokens")
    table.title = (
        f"lengths of the documents in {statistics['scanned_shards']:,} of {statistics['shards']:,} shards, EOS included\n"
        f"quartiles {', '.join(format(lengths[name], ',') for name in QUARTILES)}; longest {lengths['longest']:,}"
    )
    table.add_column("", ratio=1)
    table.expand = True
    highest = max(one["documents"] for one in lengths["bins"])
    for one in lengths["bins"]:
        shares = [f"{one[name] / lengths[name]:.1%}" for name in ("documents", "tokens")]
        bounds = f"{one['from']:,} to {one['to']:,}" if one["to"] > one["from"] else f"{one['to']:,}"
        table.add_row(bounds, f"{one['documents']:,}", *shares, Bar(highest, 0, one["documents"]))
    return table


def _new_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="", header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number or name == "tokens" else "left", no_wrap=bool(number))
    return table


def _format_counts(counts: dict[str, Any]) -> str:
    return f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"


def _spaced_name(name: str) -> str:
    return name.replace("_", " ")
