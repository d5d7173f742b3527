"""The stages of a preparation: train the tokenizer, encode units, find duplicates, plan and gather shards, finish.

Each stage writes files to the work folder and skips those that exist, so it can be run again by any process at any time.
The last stage writes the manifest and removes the work folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data_prep import (
    clean,
    duplicates,
    encode,
    output_folder,
    provenance,
    readers,
    shuffle,
    spill,
    work_files,
    work_units,
)  # fmt: skip
from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import FilePart, InputFile
from tandem.data_prep.records import MAX_BAD_RECORD_SAMPLES
from tandem.data_prep.settings import DROPPED_COUNT_NAMES, PrepareSettings
from tandem.data_prep.shuffle import ShardKeyRange, ShardKeyRanges
from tandem.data_prep.spill import CORPUS_FOLDER_PREFIX, Spill, UnitRecord
from tandem.data_prep.tokenizers import build, encoding
from tandem.data_prep.tokenizers.encoding import EncoderSpec
from tandem.data_prep.work_units import WorkUnit
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit, Shard

CHECK_SAMPLE_DOCUMENTS, CHECK_SAMPLE_CHARACTERS = 200, 1 << 20
"""Size of the sample on which an encoding library is compared with the reference before it is used."""
BAD_RECORDS_ENTRY = "bad_records"
"""Entry of the manifest's settings with some records that were left out."""
MAX_UNKNOWN_SHARE = 0.5
"""A corpus with more unknown tokens than known ones teaches nothing."""
TOKENIZER_TRAINING_BYTES = 1 << 30
"""Approximate limit of the text that a tokenizer is trained on."""

StartProgress = Callable[[str, int], ProgressCallback]
"""Shows a bar with this name and total, and returns the function that advances it."""
RunItems = Callable[..., None]
"""`executor.run` or an equivalent: run(make_item_function, items, advance=...)."""


@dataclass(frozen=True)
class TrainedTokenizer:
    """The record of a trained tokenizer: the text of its tokenizer.json."""

    tokenizer_json: str


@dataclass(frozen=True)
class PreparationRequest:
    """The arguments of a preparation, from which every process creates it."""

    output: Path
    settings: PrepareSettings
    inputs: list[InputFile]
    tokenizer_json: str | None
    """None: train a tokenizer of `vocab_size` ids."""
    vocab_size: int
    tokenizer_library: str
    dangling_links: int = 0
    """Number of links that were left out."""

    @property
    def work_folder(self) -> Path:
        return self.output / output_folder.WORK_FOLDER

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer was given or is already trained."""
        return self.tokenizer_json is not None or self._trained_tokenizer_path.exists()

    @property
    def _trained_tokenizer_path(self) -> Path:
        versions = json.dumps([[file.name, file.size_bytes, file.version] for file in self.inputs])
        return self.work_folder / f"tokenizer-{hashlib.sha256(versions.encode()).hexdigest()[:24]}.json"

    def create_preparation(self, start_progress: StartProgress = lambda name, total: lambda count: None) -> Preparation:
        """Train the tokenizer if none is given or trained, choose the encoding library and plan the units.

        Raises: UserError if the inputs cannot be read.
        """
        self.work_folder.mkdir(exist_ok=True)
        text, error_prefix = self.tokenizer_json, "--tokenizer"
        if text is None:
            text, error_prefix = self._train_tokenizer(start_progress), "--eos"
        encoder = encoding.select_encoder(
            text, self.settings.eos, error_prefix, library=self.tokenizer_library, sample_texts=self._sample_texts()
        )
        if self.settings.tokens is None and encoding.drops_unknown_text(encoder):
            safe_print(
                f"{error_prefix}: gives no token for characters that it does not know, so they are lost; choose one with an "
                "unk_token, or with byte_fallback and all bytes, to keep or count them"
            )
        settings_dict = self.settings.to_dict() | {"tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest()}
        units = work_units.plan_units(self.inputs, settings_dict)
        preparation = Preparation(self.output, self.settings, units, encoder, text, self.dangling_links)
        for other in set(self.work_folder.glob(f"{CORPUS_FOLDER_PREFIX}*")) - {preparation.corpus_work_folder}:
            shutil.rmtree(other)  # of other inputs, whose shards in the output are about to be overwritten
        preparation.corpus_work_folder.mkdir(exist_ok=True)
        return preparation

    def _sample_texts(self) -> list[str]:
        """Return the first texts of the inputs, before any filter."""
        texts: list[str] = []
        for file in self.inputs if self.settings.tokens is None else ():
            part = FilePart(file, 0, 1)
            with suppress(readers.UndecodableText):  # reported or counted when it is encoded
                documents = readers.read_documents(
                    part, self.settings.text_field, [], lambda count: None,
                    skip_bad_records=self.settings.skip_bad_lines,
                )  # fmt: skip
                for document in documents:
                    texts.append(document.text)
                    if len(texts) >= CHECK_SAMPLE_DOCUMENTS or sum(map(len, texts)) >= CHECK_SAMPLE_CHARACTERS:
                        return texts
        return texts

    def _train_tokenizer(self, start_progress: StartProgress) -> str:
        """Train a BPE on text that is not held out, and keep it in the work folder."""
        path, held_out = self._trained_tokenizer_path, self.settings.held_out
        if not path.exists():
            advance = start_progress("training the tokenizer", sum(file.size_bytes for file in self.inputs))
            texts = (text for text in self._training_texts(advance) if clean.uniform_hash(text) >= held_out)
            trained = TrainedTokenizer(build.train_bpe(texts, self.vocab_size, self.settings.eos))
            work_files.write_record(path, trained)
        return work_files.read_record(path, TrainedTokenizer).tokenizer_json

    def _training_texts(self, advance: ProgressCallback) -> Iterator[str]:
        """Yield about TOKENIZER_TRAINING_BYTES of cleaned text, from the beginnings of files throughout the inputs."""
        share = min(1.0, TOKENIZER_TRAINING_BYTES / max(1, sum(file.estimated_text_bytes for file in self.inputs)))
        target_bytes = read_characters = 0.0
        for file in self.inputs:
            target_bytes += share * file.estimated_text_bytes
            unit = WorkUnit("", 0, (FilePart(file, 0, 1),))
            if share == 1:
                documents = encode.documents_to_encode(self.settings, unit, Counter(), advance)
                yield from (document.text for document in documents)
                continue
            if read_characters < target_bytes:
                for document in encode.documents_to_encode(self.settings, unit, Counter(), lambda count: None):
                    yield document.text
                    read_characters += len(document.text)
                    if read_characters >= target_bytes:
                        break
            advance(file.size_bytes)


@dataclass(frozen=True)
class Preparation:
    """The data that every worker receives."""

    output: Path
    settings: PrepareSettings
    units: list[WorkUnit]
    encoder_spec: EncoderSpec
    tokenizer_json: str
    dangling_links: int = 0

    @property
    def work_folder(self) -> Path:
        return self.output / output_folder.WORK_FOLDER

    @cached_property
    def corpus_work_folder(self) -> Path:
        """The folder of files that depend on all units: duplicates, ranges of shards, records of finished shards."""
        names = hashlib.sha256("".join(unit.name for unit in self.units).encode()).hexdigest()
        return self.work_folder / f"{CORPUS_FOLDER_PREFIX}{names[:24]}"

    @property
    def shard_ranges_path(self) -> Path:
        return self.corpus_work_folder / "ranges.json"

    @cached_property
    def spills(self) -> list[Spill]:
        """The spills of all units, known once all are encoded."""
        return [one for unit in self.units for one in spill.unit_spills(self.work_folder, unit.name)]

    def drop_mask_path(self, source_spill: Spill) -> Path:
        return self.corpus_work_folder / f"{source_spill.index_path.stem}.dropped.npy"

    def load_drop_mask(self, source_spill: Spill) -> np.ndarray | None:
        """Return which documents of the spill to drop, in the order read; None drops none."""
        return duplicates.load_mask(self.drop_mask_path(source_spill)) if self.settings.deduplicate else None

    def load_unit_records(self) -> tuple[list[UnitRecord], Counter[str]]:
        """Return the records of all units, and the sums of their counts."""
        records = [spill.load_record(self.work_folder, unit.name) for unit in self.units]
        return records, sum((Counter(record.counts) for record in records), Counter())


@dataclass(frozen=True)
class Stage:
    """Independent items of work that need all items of the previous stage."""

    name: str
    progress_title: str
    items: Callable[[Preparation], Sequence[Any]]
    """Returns all items, in the same order in every process, once the previous stage is finished."""
    result_path: Callable[[Preparation, Any], Path]
    """Returns the path of the file that marks an item as finished."""
    run_item: Callable[[Preparation, Any, ProgressCallback], None]
    item_size: Callable[[Any], int] = lambda item: 1
    has_single_item: bool = False
    """Whether it has a single item for every corpus."""

    def is_finished(self, preparation: Preparation, item: Any) -> bool:
        return self.result_path(preparation, item).exists()

    def unfinished_items(self, preparation: Preparation) -> list[Any]:
        return [item for item in self.items(preparation) if not self.is_finished(preparation, item)]


def run(preparation: Preparation, run_items: RunItems, start_progress: StartProgress) -> CorpusManifest:
    """Run all stages until the corpus is finished."""
    for stage in active_stages(preparation.settings):
        items, unfinished = stage.items(preparation), stage.unfinished_items(preparation)
        advance = start_progress(stage.progress_title, sum(map(stage.item_size, items)))
        advance(sum(map(stage.item_size, items)) - sum(map(stage.item_size, unfinished)))
        # Each worker calls the outer partial once, and for each item the inner one that it returns.
        run_items(partial(partial, stage.run_item, preparation), unfinished, advance=advance)
    return manifest.load_manifest(preparation.output)


def active_stages(settings: PrepareSettings) -> list[Stage]:
    """Return the stages that these settings need, in order."""
    return [stage for stage in STAGES if settings.deduplicate or stage.name != "find-duplicates"]


def _encode_unit(preparation: Preparation, unit: WorkUnit, advance: ProgressCallback) -> None:
    encode.encode_unit(preparation.settings, preparation.encoder_spec, preparation.work_folder, unit, advance)


def _bands_paths(preparation: Preparation) -> list[Path]:
    return [one.bands_path for one in preparation.spills]


def _plan_band_ranges(preparation: Preparation) -> list[duplicates.BandRange]:
    return duplicates.plan_band_ranges(_bands_paths(preparation), preparation.corpus_work_folder)


def _write_links(preparation: Preparation, band_range: duplicates.BandRange, advance: ProgressCallback) -> None:
    duplicates.write_links(_bands_paths(preparation), band_range)
    advance(1)


def _plan_shards(preparation: Preparation, path: Path, advance: ProgressCallback) -> None:
    """Write the masks of the duplicates of every spill, and the key ranges of the shards."""
    settings, spills = preparation.settings, preparation.spills
    for unit in preparation.units:
        spill.check_unit_files(preparation.work_folder, unit.name)
    if settings.deduplicate:
        mask_paths = [preparation.drop_mask_path(one) for one in spills]
        duplicates.write_masks(_bands_paths(preparation), mask_paths, _plan_band_ranges(preparation))
    found = shuffle.plan_shard_key_ranges(spills, preparation.load_drop_mask, settings.shard_tokens)
    if not any(shard_range.split == "train" for shard_range in found):
        _raise_no_training_documents(preparation)
    work_files.write_record(path, ShardKeyRanges(found))
    advance(1)


def _raise_no_training_documents(preparation: Preparation) -> None:
    records, counts = preparation.load_unit_records()
    if documents := sum(record.documents for record in records):
        raise output_folder.UnusableSettings(
            f"--held-out: {preparation.settings.held_out} leaves none of {documents} documents for training; lower it"
        )
    if (where := preparation.settings.where) and counts["filtered_documents"]:
        met: Counter[str] = sum((Counter(record.other_values) for record in records), Counter())
        values = ", ".join(f"{value[:40]} ({number:,})" for value, number in met.most_common(encode.MAX_NAMED_VALUES))
        raise output_folder.UnusableSettings(
            f"--where: no document has {where[0]}={where[1]}; its values are {values}; name one of them"
        )
    dropped = [f"{counts[name]} {name.replace('_', ' ')}" for name in DROPPED_COUNT_NAMES if counts[name]]
    raise output_folder.UnusableSettings(
        f"--input: contains no text to train on ({', '.join(dropped) or 'no documents'}); "
        "name another path, or leave out fewer documents"
    )


def _load_shard_key_ranges(preparation: Preparation) -> list[ShardKeyRange]:
    return work_files.read_record(preparation.shard_ranges_path, ShardKeyRanges).ranges


def _gather_shard(preparation: Preparation, shard_range: ShardKeyRange, advance: ProgressCallback) -> None:
    vocab_size = preparation.encoder_spec.vocab_size
    shuffle.gather_shard(
        preparation.output, preparation.corpus_work_folder, preparation.spills, preparation.load_drop_mask, shard_range,
        dtype=manifest.token_dtype(vocab_size), vocab_size=vocab_size, sample_tokens=preparation.settings.sample_tokens,
    )  # fmt: skip
    advance(1)


def _finish(preparation: Preparation, _: Path, advance: ProgressCallback) -> None:
    """Write the manifest and remove the work folder."""
    settings, spec = preparation.settings, preparation.encoder_spec
    records, counts = preparation.load_unit_records()
    input_entries = provenance.list_entries(preparation.units, records)
    splits, groups, token_counts = _collect_shards(preparation)
    documents, tokens = (sum(getattr(split, name) for split in splits.values()) for name in ("documents", "tokens"))
    if counts["unknown_tokens"] > MAX_UNKNOWN_SHARE * tokens:
        remedy = "name a tokenizer that was made for this text"
        if settings.tokens is not None:
            remedy = "name the tokenizer that made these ids, or prepare the text with one that was made for it"
        raise output_folder.UnusableSettings(
            f"--tokenizer: {counts['unknown_tokens']:,} of {tokens:,} tokens are its token for unknown text, id {spec.unk_id}, "
            f"more than {MAX_UNKNOWN_SHARE:.0%}; {remedy}"
        )
    if (empty := counts["documents_without_tokens"]) > documents / 2:
        raise output_folder.UnusableSettings(
            f"--tokenizer: gives no token for the text of {empty:,} of {documents:,} documents; name a tokenizer that was made "
            "for this text"
        )
    if settings.deduplicate:
        counts["duplicate_documents"] = sum(record.documents for record in records) - documents
    if preparation.dangling_links:
        counts["dangling_links"] = preparation.dangling_links
    corpus_manifest = CorpusManifest(
        dtype=manifest.token_dtype(spec.vocab_size),
        sample_tokens=settings.sample_tokens,
        vocab=spec.vocab_size,
        eos_token=settings.eos,
        eos_id=spec.eos_id,
        tokenizer_sha256=hashlib.sha256(preparation.tokenizer_json.encode()).hexdigest(),
        # Rounded, because the order of a sum, and with it the last bits, may differ between processors.
        unigram_entropy_nats=round(shuffle.entropy_nats(token_counts), shuffle.ENTROPY_DECIMALS),
        counts=dict(sorted(counts.items())) | {"documents": documents, "tokens": tokens},
        groups=groups if settings.group_field else {},
        settings=settings.to_dict() | provenance.summarize(input_entries) | _bad_records(records),
        **splits,
    )
    output_folder.finish_corpus(preparation.output, input_entries, preparation.tokenizer_json, corpus_manifest)
    advance(1)


def _bad_records(records: list[UnitRecord]) -> dict[str, Any]:
    """Return the entry of the manifest with the first bad records, if there are any."""
    samples = [one for record in records for one in record.bad_records][:MAX_BAD_RECORD_SAMPLES]
    return {BAD_RECORDS_ENTRY: samples} if samples else {}


def _collect_shards(preparation: Preparation) -> tuple[dict[str, CorpusSplit], dict[str, dict[str, int]], np.ndarray]:
    """Return the splits, the documents and tokens of every group, and the counts of each id in the training tokens."""
    shards: dict[str, list[Shard]] = {split: [] for split in spill.SPLITS}
    groups: dict[str, Counter[str]] = {}
    token_counts = np.zeros(preparation.encoder_spec.vocab_size, np.int64)
    for shard_range in _load_shard_key_ranges(preparation):
        record = shuffle.load_shard_record(preparation.corpus_work_folder, shard_range.file_stem)
        shards[shard_range.split].append(record.shard)
        for name, counted in record.groups.items():
            groups.setdefault(name, Counter()).update(documents=counted.documents, tokens=counted.tokens)
        shard_token_counts = shuffle.load_token_counts(preparation.output, preparation.corpus_work_folder, record)
        if shard_range.split == "train":
            token_counts += shard_token_counts
    splits = {
        split: CorpusSplit(sum(shard.tokens for shard in found), sum(shard.documents for shard in found), found)
        for split, found in shards.items()
    }
    return splits, {name: dict(groups[name]) for name in sorted(groups)}, token_counts


STAGES = (
    Stage("encode", "encoding", lambda it: it.units, lambda it, unit: spill.record_path(it.work_folder, unit.name),
          _encode_unit, item_size=lambda unit: unit.size_bytes),
    Stage("find-duplicates", "finding duplicates", _plan_band_ranges, lambda _, band_range: band_range.links_path,
          _write_links),
    Stage("plan-shards", "planning shards", lambda it: [it.shard_ranges_path], lambda _, path: path, _plan_shards,
          has_single_item=True),
    Stage("gather", "shuffling", _load_shard_key_ranges,
          lambda it, shard_range: shuffle.shard_record_path(it.corpus_work_folder, shard_range.file_stem), _gather_shard),
    Stage("finish", "finishing", lambda it: [it.output / manifest.MANIFEST_FILE], lambda _, path: path, _finish,
          has_single_item=True),
)  # fmt: skip
