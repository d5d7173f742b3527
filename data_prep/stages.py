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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data_prep import clean, duplicates, encode, output_folder, readers, shuffle, spill, tar_reader, work_units
from tandem.data_prep.executor import ItemFunction, ProgressCallback
from tandem.data_prep.input_files import FilePart, InputFile
from tandem.data_prep.settings import PrepareSettings
from tandem.data_prep.shuffle import LoadDropMask, ShardKeyRange
from tandem.data_prep.spill import Spill
from tandem.data_prep.tokenizers import build, encoding
from tandem.data_prep.tokenizers.encoding import EncoderSpec
from tandem.data_prep.work_units import WorkUnit
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit, Shard
from tandem.trainer.disk import atomic_write

CHECK_SAMPLE_DOCUMENTS, CHECK_SAMPLE_CHARACTERS = 200, 1 << 20
"""The sample on which an encoding library is compared with the reference before it is used."""
TOKENIZER_TRAINING_BYTES = 1 << 30
"""Approximate limit of the text that a tokenizer is trained on."""
DROPPED_COUNT_NAMES = (
    "empty_documents", "filtered_documents", "undecodable_files", tar_reader.OTHER_MEMBERS,
    "short_documents", "contaminated_documents", "duplicate_documents",
)  # fmt: skip

StartProgress = Callable[[str, int], ProgressCallback]
"""Shows a bar with this name and total, and returns the function that advances it."""
RunItems = Callable[..., None]
"""`executor.run` or an equivalent: run(make_item_function, items, advance=...)."""


@dataclass(frozen=True)
class Preparation:
    """What every worker receives."""

    output: Path
    settings: PrepareSettings
    units: list[WorkUnit]
    encoder_spec: EncoderSpec
    tokenizer_json: str

    @property
    def work_folder(self) -> Path:
        return self.output / output_folder.WORK_FOLDER

    @property
    def corpus_work_folder(self) -> Path:
        """The files that depend on all units: duplicates, ranges of shards, records of finished shards."""
        names = hashlib.sha256("".join(unit.name for unit in self.units).encode()).hexdigest()
        return self.work_folder / f"whole-{names[:24]}"


def create_preparation(
    output: Path, settings: PrepareSettings, inputs: list[InputFile], tokenizer_json: str | None, *,
    vocab_size: int, tokenizer_library: str, start_progress: StartProgress,
) -> Preparation:  # fmt: skip
    """Train the tokenizer if none is given, choose the encoding library and plan the units.

    Raises: UserError if the inputs cannot be read.
    """
    work_folder = output / output_folder.WORK_FOLDER
    work_folder.mkdir(exist_ok=True)
    text = tokenizer_json
    if text is None:
        text = _train_tokenizer(work_folder, settings, inputs, vocab_size, start_progress)
    error_prefix = "--tokenizer" if tokenizer_json is not None else "--eos"
    encoder = encoding.select_encoder(
        text, settings.eos, error_prefix, library=tokenizer_library, sample_texts=_sample_texts(settings, inputs)
    )
    settings_dict = settings.to_dict() | {"tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest()}
    preparation = Preparation(output, settings, work_units.plan_units(inputs, settings_dict), encoder, text)
    for other in set(work_folder.glob("whole-*")) - {preparation.corpus_work_folder}:
        shutil.rmtree(other)  # of other inputs, whose shards in the output are about to be overwritten
    preparation.corpus_work_folder.mkdir(exist_ok=True)
    return preparation


def _sample_texts(settings: PrepareSettings, inputs: list[InputFile]) -> list[str]:
    """The first texts of the inputs, before any filter."""
    texts: list[str] = []
    for file in inputs if settings.tokens is None else ():
        with suppress(readers.UndecodableText):  # reported or counted when it is encoded
            for document in readers.read_documents(FilePart(file, 0, 1), settings.text_field, [], lambda count: None):
                texts.append(document.text)
                if len(texts) >= CHECK_SAMPLE_DOCUMENTS or sum(map(len, texts)) >= CHECK_SAMPLE_CHARACTERS:
                    return texts
    return texts


def _train_tokenizer(
    work_folder: Path,
    settings: PrepareSettings,
    inputs: list[InputFile],
    vocab_size: int,
    start_progress: StartProgress,
) -> str:
    """Train a BPE on text that is not held out, at most about TOKENIZER_TRAINING_BYTES; keep it in the work folder."""
    path = trained_tokenizer_path(work_folder, inputs)
    if not path.exists():
        advance = start_progress("training the tokenizer", sum(file.size_bytes for file in inputs))
        share = min(1.0, TOKENIZER_TRAINING_BYTES / max(1, sum(file.estimated_text_bytes for file in inputs)))
        texts = (
            text
            for text in _training_texts(settings, inputs, share, advance)
            if clean.uniform_hash(text) >= settings.held_out
        )
        atomic_write(path, build.train_bpe(texts, vocab_size, settings.eos))
    return path.read_text(encoding="utf-8")


def trained_tokenizer_path(work_folder: Path, inputs: list[InputFile]) -> Path:
    """Where the tokenizer trained on these inputs is stored."""
    versions = json.dumps([[file.name, file.size_bytes, file.version] for file in inputs])
    return work_folder / f"tokenizer-{hashlib.sha256(versions.encode()).hexdigest()[:24]}.json"


def _training_texts(
    settings: PrepareSettings, inputs: list[InputFile], share: float, advance: ProgressCallback
) -> Iterator[str]:
    """Yield this share of the cleaned text in order, from the beginnings of files throughout the inputs."""
    target_bytes = read_characters = 0.0
    for file in inputs:
        target_bytes += share * file.estimated_text_bytes
        unit = WorkUnit("", 0, (FilePart(file, 0, 1),))
        if share == 1:
            yield from (document.text for document in encode.documents_to_encode(settings, unit, Counter(), advance))
            continue
        if read_characters < target_bytes:
            for document in encode.documents_to_encode(settings, unit, Counter(), lambda count: None):
                yield document.text
                read_characters += len(document.text)
                if read_characters >= target_bytes:
                    break
        advance(file.size_bytes)


@dataclass(frozen=True)
class Stage:
    """Independent items of work that need all items of the previous stage."""

    name: str
    progress_title: str
    """The title of its progress bar."""
    items: Callable[[Preparation], Sequence[Any]]
    """All items, in the same order for every process; called once the previous stage is finished."""
    is_finished: Callable[[Preparation, Any], bool]
    make_item_function: Callable[[Preparation], ItemFunction]
    item_size: Callable[[Any], int] = lambda item: 1
    has_single_item: bool = False
    """Whether it has one item for any corpus."""

    def unfinished_items(self, preparation: Preparation) -> list[Any]:
        return [item for item in self.items(preparation) if not self.is_finished(preparation, item)]


def run(preparation: Preparation, run_items: RunItems, start_progress: StartProgress) -> CorpusManifest:
    """Run all stages, which leaves a finished corpus."""
    for stage in active_stages(preparation.settings):
        items, unfinished = stage.items(preparation), stage.unfinished_items(preparation)
        advance = start_progress(stage.progress_title, sum(map(stage.item_size, items)))
        advance(sum(map(stage.item_size, items)) - sum(map(stage.item_size, unfinished)))
        run_items(partial(stage.make_item_function, preparation), unfinished, advance=advance)
    return manifest.load_manifest(preparation.output)


def active_stages(settings: PrepareSettings) -> list[Stage]:
    """The stages that these settings need, in order."""
    return [stage for stage in STAGES if settings.deduplicate or stage.name != "find-duplicates"]


def _is_encoded(preparation: Preparation, unit: WorkUnit) -> bool:
    return encode.is_finished(preparation.work_folder, unit)


def _make_encode_unit(preparation: Preparation) -> ItemFunction:
    return partial(encode.encode_unit, preparation.settings, preparation.encoder_spec, preparation.work_folder)


def _band_ranges(preparation: Preparation) -> list[duplicates.BandRange]:
    return duplicates.plan_band_ranges(_band_and_mask_paths(preparation)[0], preparation.corpus_work_folder)


def _make_link_range(preparation: Preparation) -> ItemFunction:
    bands = tuple(_band_and_mask_paths(preparation)[0])

    def link(part: duplicates.BandRange, advance: ProgressCallback) -> None:
        duplicates.write_links(bands, part)
        advance(1)

    return link


def _band_and_mask_paths(preparation: Preparation) -> tuple[list[Path], list[Path]]:
    spills = _all_spills(preparation)
    return [encode.bands_path(one) for one in spills], [_mask_path(preparation, one) for one in spills]


def _mask_path(preparation: Preparation, source_spill: Spill) -> Path:
    return preparation.corpus_work_folder / f"{source_spill.index_path.stem}.dropped.npy"


def _make_plan_shards(preparation: Preparation) -> ItemFunction:
    """Write the masks of the documents to leave out of every spill, and the ranges of the shards."""

    def arrange(path: Path, advance: ProgressCallback) -> None:
        if preparation.settings.deduplicate:
            duplicates.write_masks(*_band_and_mask_paths(preparation), _band_ranges(preparation))
        found = shuffle.plan_shard_key_ranges(
            _all_spills(preparation), _drop_mask_loader(preparation), preparation.settings.shard_tokens
        )
        if not any(span.split == "train" for span in found):
            _raise_no_training_documents(preparation)
        atomic_write(
            path, json.dumps([[span.split, span.shard_index, span.first_key, span.last_key] for span in found])
        )
        advance(1)

    return arrange


def _shard_ranges_path(preparation: Preparation) -> Path:
    return preparation.corpus_work_folder / "ranges.json"


def _load_shard_key_ranges(preparation: Preparation) -> list[ShardKeyRange]:
    return [ShardKeyRange(*span) for span in json.loads(_shard_ranges_path(preparation).read_text(encoding="utf-8"))]


def _is_gathered(preparation: Preparation, shard_range: ShardKeyRange) -> bool:
    return shuffle.shard_record_path(preparation.corpus_work_folder, shard_range.file_stem).exists()


def _make_gather_shard(preparation: Preparation) -> ItemFunction:
    load_drop_mask = _drop_mask_loader(preparation)
    spills, vocab_size = _all_spills(preparation), preparation.encoder_spec.vocab_size

    def gather(span: ShardKeyRange, advance: ProgressCallback) -> None:
        shuffle.gather_shard(
            preparation.output, preparation.corpus_work_folder, spills, load_drop_mask, span,
            dtype=manifest.token_dtype(vocab_size), vocab_size=vocab_size, sample_tokens=preparation.settings.sample_tokens,
        )  # fmt: skip
        advance(1)

    return gather


def _all_spills(preparation: Preparation) -> list[Spill]:
    return [one for unit in preparation.units for one in spill.unit_spills(preparation.work_folder, unit.name)]


def _drop_mask_loader(preparation: Preparation) -> LoadDropMask:
    if not preparation.settings.deduplicate:
        return lambda spill: None
    return lambda spill: np.load(_mask_path(preparation, spill), mmap_mode="r")


def _raise_no_training_documents(preparation: Preparation) -> None:
    records = [spill.load_record(preparation.work_folder, unit.name) for unit in preparation.units]
    documents = sum(record["documents"] for record in records)
    if documents:
        raise output_folder.UnusableSettings(
            f"--held-out: {preparation.settings.held_out} leaves none of {documents} documents for training; lower it"
        )
    counted: Counter[str] = sum((Counter(record["counts"]) for record in records), Counter())
    why = (
        ", ".join(f"{counted[name]} {name.replace('_', ' ')}" for name in DROPPED_COUNT_NAMES if counted[name])
        or "no documents"
    )
    raise output_folder.UnusableSettings(
        f"--input: holds no text to train on ({why}); name another path or take less out"
    )


def finish(preparation: Preparation) -> CorpusManifest:
    """Write the manifest and remove the work folder."""
    settings, output = preparation.settings, preparation.output
    records = [spill.load_record(preparation.work_folder, unit.name) for unit in preparation.units]
    counts: Counter[str] = sum((Counter(record["counts"]) for record in records), Counter())
    splits, groups, token_counts = _collect_shards(preparation)
    documents, tokens = (sum(getattr(split, name) for split in splits.values()) for name in ("documents", "tokens"))
    if settings.deduplicate:
        counts["duplicate_documents"] = sum(record["documents"] for record in records) - documents
    corpus_manifest = CorpusManifest(
        dtype=manifest.token_dtype(preparation.encoder_spec.vocab_size),
        sample_tokens=settings.sample_tokens,
        vocab=preparation.encoder_spec.vocab_size,
        eos_token=settings.eos,
        eos_id=preparation.encoder_spec.eos_id,
        tokenizer_sha256=hashlib.sha256(preparation.tokenizer_json.encode()).hexdigest(),
        unigram_entropy_nats=_entropy_nats(token_counts),
        counts=dict(sorted(counts.items())) | {"documents": documents, "tokens": tokens},
        groups=groups if settings.group_field else {},
        settings=settings.to_dict() | output_folder.summarize_inputs(preparation.units, records),
        **splits,
    )
    output_folder.finish_corpus(output, preparation.units, records, preparation.tokenizer_json, corpus_manifest)
    return corpus_manifest


def _collect_shards(preparation: Preparation) -> tuple[dict[str, CorpusSplit], dict[str, dict[str, int]], np.ndarray]:
    """Return the splits, the documents and tokens of every group, and the counts of each id in the training tokens."""
    shards: dict[str, list[Shard]] = {split: [] for split in spill.SPLITS}
    groups: Counter[tuple[str, str]] = Counter()
    token_counts = np.zeros(preparation.encoder_spec.vocab_size, np.int64)
    for span in _load_shard_key_ranges(preparation):
        shard, counted = shuffle.load_shard_record(preparation.corpus_work_folder, span.file_stem)
        shards[span.split].append(shard)
        for name, (documents, tokens) in counted.items():
            groups[name, "documents"] += documents
            groups[name, "tokens"] += tokens
        if span.split == "train":
            token_counts += np.load(shuffle.token_counts_path(preparation.corpus_work_folder, span.file_stem))
    splits = {
        split: CorpusSplit(sum(shard.tokens for shard in found), sum(shard.documents for shard in found), found)
        for split, found in shards.items()
    }
    names = sorted({name for name, _ in groups})
    return splits, {name: {of: groups[name, of] for of in ("documents", "tokens")} for name in names}, token_counts


def _entropy_nats(token_counts: np.ndarray) -> float:
    shares = token_counts[token_counts > 0] / token_counts.sum()
    # Rounded, because the order of a sum, and with it the last bits, may differ between processors.
    return round(float(-(shares * np.log(shares)).sum()), 6)


def _exists(preparation: Preparation, path: Path) -> bool:
    return path.exists()


def _make_finish(preparation: Preparation) -> ItemFunction:
    def do(path: Path, advance: ProgressCallback) -> None:
        finish(preparation)
        advance(1)

    return do


STAGES = (
    Stage("encode", "encoding", lambda it: it.units, _is_encoded, _make_encode_unit, lambda unit: unit.size_bytes),
    Stage("find-duplicates", "looking for duplicates", _band_ranges, lambda _, part: part.links_path.exists(),
          _make_link_range),
    Stage("plan-shards", "cutting into shards", lambda it: [_shard_ranges_path(it)], _exists, _make_plan_shards,
          has_single_item=True),
    Stage("gather", "shuffling", _load_shard_key_ranges, _is_gathered, _make_gather_shard),
    Stage("finish", "finishing", lambda it: [it.output / manifest.MANIFEST_FILE], _exists, _make_finish,
          has_single_item=True),
)  # fmt: skip
