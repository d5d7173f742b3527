"""The stages of a preparation, in order: train the tokenizer, encode units, find duplicates, gather shards, finish.

Each stage leaves files below the folder of unfinished work and begins by looking for them, so any stage can be run again,
by anybody, at any time; the last writes the manifest and removes what was unfinished.
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

from tandem.data_prep import clean, duplicates, encode, output_folder, readers, shuffle, spill, work_units
from tandem.data_prep.executor import Advance, Do
from tandem.data_prep.input_files import Input, Part
from tandem.data_prep.settings import Settings
from tandem.data_prep.shuffle import Dropped, Range
from tandem.data_prep.spill import Spill
from tandem.data_prep.tokenizers import build, encoding
from tandem.data_prep.tokenizers.encoding import Encoder
from tandem.data_prep.work_units import Unit
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import Manifest, Shard, Split
from tandem.trainer.disk import write_whole

SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 200, 1 << 20
"""On how much an encoding library is checked against the reference before it is used."""
TRAINING_BYTES = 1 << 30
"""Text that a tokenizer is trained on, about, where there is more."""
LEFT_OUT = (
    "empty_documents", "other_documents", "skipped_files",
    "short_documents", "contaminated_documents", "duplicate_documents",
)  # fmt: skip

Shown = Callable[[str, int], Advance]
"""Shows a bar with this name and total; what it returns moves it."""
Run = Callable[..., None]
"""`executor.run` or another that does the same: run(start, items, advance=...)."""


@dataclass(frozen=True)
class Preparation:
    """What every worker is told."""

    output: Path
    settings: Settings
    units: list[Unit]
    encoder: Encoder
    tokenizer_json: str

    @property
    def work(self) -> Path:
        return self.output / output_folder.WORK

    @property
    def whole(self) -> Path:
        """What concerns all units together: duplicates, ranges of shards, records of finished shards."""
        names = hashlib.sha256("".join(unit.name for unit in self.units).encode()).hexdigest()
        return self.work / f"whole-{names[:24]}"


def begin(
    output: Path, settings: Settings, inputs: list[Input], given: str | None, *,
    vocab: int, library: str, shown: Shown,
) -> Preparation:  # fmt: skip
    """The tokenizer is known, and with it the units of the corpus.

    Raises: UserError where the inputs cannot be read or hold no text.
    """
    work = output / output_folder.WORK
    work.mkdir(exist_ok=True)
    text = given if given is not None else _trained(work, settings, inputs, vocab, shown)
    where = "--tokenizer" if given is not None else "--eos"
    encoder = encoding.encoder(text, settings.eos, where, library=library, sample=_sample(settings, inputs))
    identity = settings.identity() | {"tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest()}
    preparation = Preparation(output, settings, work_units.units(inputs, identity), encoder, text)
    for other in set(work.glob("whole-*")) - {preparation.whole}:
        shutil.rmtree(other)  # of other inputs: their shards in the output are about to be written over
    preparation.whole.mkdir(exist_ok=True)
    return preparation


def _sample(settings: Settings, inputs: list[Input]) -> list[str]:
    """The first texts there are, whatever becomes of them."""
    texts: list[str] = []
    for file in inputs:
        with suppress(readers.Undecodable):  # said, or counted, when it is encoded
            for document in readers.documents(Part(file, 0, 1), settings.text_field, [], lambda count: None):
                texts.append(document.text)
                if len(texts) >= SAMPLE_DOCUMENTS or sum(map(len, texts)) >= SAMPLE_CHARACTERS:
                    return texts
    return texts


def _trained(work: Path, settings: Settings, inputs: list[Input], vocab: int, shown: Shown) -> str:
    """tokenizer.json of a BPE trained on text that is not held out, TRAINING_BYTES of it where there is more; kept in the
    folder of unfinished work.
    """
    path = tokenizer_path(work, inputs)
    if not path.exists():
        advance = shown("training the tokenizer", sum(file.bytes for file in inputs))
        share = min(1.0, TRAINING_BYTES / max(1, sum(file.text_bytes for file in inputs)))
        texts = (text for text in _texts(settings, inputs, share, advance) if clean.draw(text) >= settings.held_out)
        write_whole(path, build.train(texts, vocab, settings.eos))
    return path.read_text(encoding="utf-8")


def tokenizer_path(work: Path, inputs: list[Input]) -> Path:
    """Where the tokenizer trained on these inputs is kept."""
    versions = json.dumps([[file.name, file.bytes, file.version] for file in inputs])
    return work / f"tokenizer-{hashlib.sha256(versions.encode()).hexdigest()[:24]}.json"


def _texts(settings: Settings, inputs: list[Input], share: float, advance: Advance) -> Iterator[str]:
    """The documents as they will be encoded, in order: this share of all text, from the beginnings of files all over it."""
    wanted = taken = 0.0
    for file in inputs:
        wanted += share * file.text_bytes
        unit = Unit("", 0, (Part(file, 0, 1),))
        if share == 1:
            yield from (document.text for document in encode.documents(settings, unit, Counter(), advance))
            continue
        if taken < wanted:
            for document in encode.documents(settings, unit, Counter(), lambda count: None):
                yield document.text
                taken += len(document.text)
                if taken >= wanted:
                    break
        advance(file.bytes)


@dataclass(frozen=True)
class Stage:
    """Items of work that need all items of the stage before and nothing of each other."""

    name: str
    shown: str
    """What its bar is called."""
    items: Callable[[Preparation], Sequence[Any]]
    """All of them, the same to everybody, in the same order; asked for when the stage before is finished."""
    is_finished: Callable[[Preparation, Any], bool]
    start: Callable[[Preparation], Do]
    size: Callable[[Any], int] = lambda item: 1
    is_single: bool = False
    """Whether it is one item, whatever the corpus."""

    def left(self, preparation: Preparation) -> list[Any]:
        """The items that nobody has finished."""
        return [item for item in self.items(preparation) if not self.is_finished(preparation, item)]


def run(preparation: Preparation, run: Run, shown: Shown) -> Manifest:
    """The corpus is finished: its manifest is there, nothing unfinished is."""
    for stage in stages(preparation.settings):
        items, left = stage.items(preparation), stage.left(preparation)
        advance = shown(stage.shown, sum(map(stage.size, items)))
        advance(sum(map(stage.size, items)) - sum(map(stage.size, left)))
        run(partial(stage.start, preparation), left, advance=advance)
    return manifest.load(preparation.output)


def stages(settings: Settings) -> list[Stage]:
    """What turns a preparation into a corpus, in order."""
    return [stage for stage in STAGES if settings.deduplicate or stage.name != "link"]


def _is_encoded(preparation: Preparation, unit: Unit) -> bool:
    return encode.is_finished(preparation.work, unit)


def _encoding(preparation: Preparation) -> Do:
    return partial(encode.encode, preparation.settings, preparation.encoder.load(), preparation.work)


def _links(preparation: Preparation) -> list[duplicates.Part]:
    return duplicates.parts(_bands(preparation)[0], preparation.whole)


def _linking(preparation: Preparation) -> Do:
    bands = tuple(_bands(preparation)[0])

    def link(part: duplicates.Part, advance: Advance) -> None:
        duplicates.write_links(bands, part)
        advance(1)

    return link


def _bands(preparation: Preparation) -> tuple[list[Path], list[Path]]:
    spills = _spills(preparation)
    return [encode.bands_path(one) for one in spills], [_mask_path(preparation, one) for one in spills]


def _mask_path(preparation: Preparation, of: Spill) -> Path:
    return preparation.whole / f"{of.index_path.stem}.dropped.npy"


def _arranging(preparation: Preparation) -> Do:
    """Masks of the documents to leave out, of every spill; and the ranges of the shards."""

    def arrange(path: Path, advance: Advance) -> None:
        if preparation.settings.deduplicate:
            duplicates.write_masks(*_bands(preparation), _links(preparation))
        found = shuffle.ranges(_spills(preparation), _dropped(preparation), preparation.settings.shard_tokens)
        if not any(span.split == "train" for span in found):
            _refuse_without_training_documents(preparation)
        write_whole(path, json.dumps([[span.split, span.number, span.first, span.last] for span in found]))
        advance(1)

    return arrange


def _ranges_path(preparation: Preparation) -> Path:
    return preparation.whole / "ranges.json"


def _ranges(preparation: Preparation) -> list[Range]:
    return [Range(*span) for span in json.loads(_ranges_path(preparation).read_text(encoding="utf-8"))]


def _is_gathered(preparation: Preparation, span: Range) -> bool:
    return shuffle.shard_record_path(preparation.whole, span.stem).exists()


def _gathering(preparation: Preparation) -> Do:
    dropped = _dropped(preparation)
    spills, vocab = _spills(preparation), preparation.encoder.vocab

    def gather(span: Range, advance: Advance) -> None:
        shuffle.gather(
            preparation.output, preparation.whole, spills, dropped, span,
            dtype=manifest.dtype_of(vocab), vocab=vocab, sample_tokens=preparation.settings.sample_tokens,
        )  # fmt: skip
        advance(1)

    return gather


def _spills(preparation: Preparation) -> list[Spill]:
    return [one for unit in preparation.units for one in spill.spills(preparation.work, unit.name)]


def _dropped(preparation: Preparation) -> Dropped:
    if not preparation.settings.deduplicate:
        return lambda spill: None
    return lambda spill: np.load(_mask_path(preparation, spill), mmap_mode="r")


def _refuse_without_training_documents(preparation: Preparation) -> None:
    records = [spill.record(preparation.work, unit.name) for unit in preparation.units]
    documents = sum(record["documents"] for record in records)
    if documents:
        raise output_folder.Useless(
            f"--held-out: {preparation.settings.held_out} leaves none of {documents} documents for training; lower it"
        )
    counted: Counter[str] = sum((Counter(record["counts"]) for record in records), Counter())
    why = ", ".join(f"{counted[name]} {name.replace('_', ' ')}" for name in LEFT_OUT if counted[name]) or "no documents"
    raise output_folder.Useless(f"--input: holds no text to train on ({why}); name another path or take less out")


def finish(preparation: Preparation) -> Manifest:
    """The manifest is there and what was unfinished is not."""
    settings, output = preparation.settings, preparation.output
    records = [spill.record(preparation.work, unit.name) for unit in preparation.units]
    counts: Counter[str] = sum((Counter(record["counts"]) for record in records), Counter())
    splits, groups, occurrences = _written(preparation)
    documents, tokens = (sum(getattr(split, name) for split in splits.values()) for name in ("documents", "tokens"))
    if settings.deduplicate:
        counts["duplicate_documents"] = sum(record["documents"] for record in records) - documents
    corpus = Manifest(
        dtype=manifest.dtype_of(preparation.encoder.vocab),
        sample_tokens=settings.sample_tokens,
        vocab=preparation.encoder.vocab,
        eos_token=settings.eos,
        eos_id=preparation.encoder.eos_id,
        tokenizer_sha256=hashlib.sha256(preparation.tokenizer_json.encode()).hexdigest(),
        unigram_entropy_nats=_entropy_nats(occurrences),
        counts=dict(sorted(counts.items())) | {"documents": documents, "tokens": tokens},
        groups=groups if settings.group_field else {},
        settings=settings.identity() | output_folder.of_inputs(preparation.units, records),
        **splits,
    )
    output_folder.finish(output, preparation.units, records, preparation.tokenizer_json, corpus)
    return corpus


def _written(preparation: Preparation) -> tuple[dict[str, Split], dict[str, dict[str, int]], np.ndarray]:
    """The splits; documents and tokens of every group; how often each id occurs in the training tokens."""
    shards: dict[str, list[Shard]] = {split: [] for split in spill.SPLITS}
    groups: Counter[tuple[str, str]] = Counter()
    occurrences = np.zeros(preparation.encoder.vocab, np.int64)
    for span in _ranges(preparation):
        shard, counted = shuffle.written(preparation.whole, span.stem)
        shards[span.split].append(shard)
        for name, (documents, tokens) in counted.items():
            groups[name, "documents"] += documents
            groups[name, "tokens"] += tokens
        if span.split == "train":
            occurrences += np.load(shuffle.occurrences_path(preparation.whole, span.stem))
    splits = {
        split: Split(sum(shard.tokens for shard in found), sum(shard.documents for shard in found), found)
        for split, found in shards.items()
    }
    names = sorted({name for name, _ in groups})
    return splits, {name: {of: groups[name, of] for of in ("documents", "tokens")} for name in names}, occurrences


def _entropy_nats(occurrences: np.ndarray) -> float:
    shares = occurrences[occurrences > 0] / occurrences.sum()
    # Rounded, since the order of a sum, and so its last bits, may differ between processors.
    return round(float(-(shares * np.log(shares)).sum()), 6)


def _exists(preparation: Preparation, path: Path) -> bool:
    return path.exists()


def _finishing(preparation: Preparation) -> Do:
    def do(path: Path, advance: Advance) -> None:
        finish(preparation)
        advance(1)

    return do


STAGES = (
    Stage("encode", "encoding", lambda all_of: all_of.units, _is_encoded, _encoding, lambda unit: unit.bytes),
    Stage("link", "looking for duplicates", _links, lambda all_of, part: part.path.exists(), _linking),
    Stage("arrange", "cutting into shards", lambda all_of: [_ranges_path(all_of)], _exists, _arranging, is_single=True),
    Stage("gather", "shuffling", _ranges, _is_gathered, _gathering),
    Stage("finish", "finishing", lambda all_of: [all_of.output / manifest.FILE], _exists, _finishing, is_single=True),
)
