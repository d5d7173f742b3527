"""`tandem verify` accepts prepared corpora and nothing else."""

import io
import random
import re
import shutil
import tarfile
from argparse import Namespace
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from xxhash import xxh3_128_hexdigest

from tandem.data_prep import verify
from tandem.data_prep.shard_writer import write_shard
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tests.data_prep import corpus_writer
from tests.data_prep.conftest import run_verb

DOCUMENTS = [" ".join(["the", "row", "of", "shards", "é漢🙂"][n % 5] for n in range(k)) for k in range(1, 60)]


@pytest.fixture
def made(tmp_path):
    """A folder and its manifest; three shards, one of them of held-out documents."""
    folder = tmp_path / "corpus"
    corpus = corpus_writer.write_corpus(folder, DOCUMENTS, DOCUMENTS[:5], shard_tokens=2500)
    assert len(corpus.train.shards) == 2
    return folder, corpus


def refused(folder, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        verify.run(Namespace(corpus=str(folder), workers=1))
    assert "\n" not in str(caught.value)


def test_a_prepared_corpus_passes(prepared, folder, capsys):
    run_verb(verify, prepared("out", "--input", folder), "--workers", 1)
    assert re.search(r"[\d,]+ tokens in \d+ shards match the manifest; .* [KM]iB/s", capsys.readouterr().out)


def test_several_processes_find_the_same(made, capsys, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(verify, "SINGLE_PROCESS_BYTES", 0)
    run_verb(verify, folder, "--workers", 2)
    assert "5,172 tokens in 3 shards match" in capsys.readouterr().out


def test_a_changed_byte_anywhere_in_any_file_is_found_and_the_file_named(tmp_path):
    folder = tmp_path / "corpus"
    corpus_writer.write_corpus(folder, DOCUMENTS[:9], DOCUMENTS[:5])
    run_verb(verify, folder, "--workers", 1)
    rng = random.Random(0)
    files = sorted(folder.iterdir())
    assert len(files) == 5
    for path in files:
        content = bytearray(path.read_bytes())
        places = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(58))}
        for place in places:
            damaged = content.copy()
            # A bit, or a byte that the formats may take for the same: blank for newline, letters in either case.
            damaged[place] ^= rng.choice([1 << rng.randrange(8), 7, 32, 42])
            path.write_bytes(damaged)
            refused(folder, f"{path.name}: ")
        path.write_bytes(content)
    run_verb(verify, folder, "--workers", 1)


def test_white_space_between_the_words_of_a_manifest_is_part_of_it(made):
    folder, _ = made
    path = folder / manifest.MANIFEST_FILE
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    manifest.load_manifest(folder)
    refused(folder, r"manifest.json: was changed or damaged after it was written")


def test_files_that_are_missing_truncated_or_strange_are_named(made):
    folder, _ = made
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        refused(folder, path.name)
        for cut in (len(content) // 2, 0):
            path.write_bytes(content[:cut])
            refused(folder, path.name)
        path.write_bytes(content + b"\0")
        refused(folder, path.name)
        path.write_bytes(content)
    for stranger in ("train-000002.tar", "notes.txt"):
        shutil.copy(folder / "train-000000.tar", folder / stranger)
        refused(folder, f"{stranger}: is not in manifest.json; remove it")
        (folder / stranger).unlink()
    (folder / "notes.txt").touch()
    (folder / "train-000000.tar").unlink()
    refused(folder, "train-000000.tar: cannot be read")  # a lost shard is reported first


def test_one_reading_names_every_damaged_shard(made):
    folder, _ = made
    (folder / "train-000001.tar").unlink()
    with (folder / "validation-000000.tar").open("r+b") as file:
        file.write(b"X")
    refused(folder, r"train-000001.tar: cannot be read .*and 1 more: validation-000000.tar")


def test_a_manifest_with_a_false_claim_is_refused(made):
    folder, corpus = made
    half = {"documents": 30, "tokens": corpus.counts["tokens"]}
    others = {
        "unigram_entropy_nats": (corpus.unigram_entropy_nats + 1e-5, "unigram_entropy_nats"),
        "groups": ({"web": half, "": half}, "the sum of tokens in groups is 10344, but"),
        "counts": (corpus.counts | {"tokens": 7}, "counts.tokens is 7, but"),
        "train": (replace(corpus.train, documents=3), "train.documents is 3, but"),
        "vocab": (corpus.vocab + 1, "tokenizer.json: EOS id, vocab"),
        "eos_id": (corpus.eos_id + 1, "tokenizer.json: EOS id, vocab"),
        "validation": (replace(corpus.validation, tokens=9), "validation.tokens is 9, but its shards have"),
        "settings": (corpus.settings | {"num_input_files": 3}, "inputs.json: num_input_files is 2, but"),
    }
    for name, (value, message) in others.items():
        corpus_writer.rewrite_manifest(folder, corpus, **{name: value})
        refused(folder, message)
    whole = {name: corpus.counts[name] for name in ("documents", "tokens")}
    corpus_writer.rewrite_manifest(folder, corpus, groups={"web": whole, "none": {"documents": 0, "tokens": 0}})
    run_verb(verify, folder, "--workers", 1)


def rewritten(folder, corpus, tokens=None, tar=None):
    """Replace the first shard and put its hash into the manifest."""
    before = corpus.train.shards[0]
    if tar is None:
        made = write_shard(folder, "train-000000", tokens, before.documents, corpus_writer.SAMPLE_TOKENS)
    else:
        (folder / before.file).write_bytes(tar)
        made = replace(before, bytes=len(tar), sha256=sha256(tar).hexdigest(), xxh3_128=xxh3_128_hexdigest(tar))
    made = replace(made, tokens=before.tokens)
    corpus_writer.rewrite_manifest(folder, corpus, train=replace(corpus.train, shards=[made, *corpus.train.shards[1:]]))


def test_a_shard_with_its_hash_but_other_tokens_than_promised_is_refused(made):
    folder, corpus = made
    texts = [corpus_writer.encode_document(text) for text in DOCUMENTS[: corpus.train.shards[0].documents]]
    tokens = np.concatenate(texts)
    assert len(tokens) == corpus.train.shards[0].tokens
    eos, beyond, cut, swapped = (tokens.copy() for _ in range(4))
    words = np.flatnonzero(tokens != corpus.eos_id)
    eos[words[5]] = corpus.eos_id
    beyond[words[7]] = corpus.vocab
    cut[-2:] = cut[-2:][::-1]
    swapped[words[3:5]] = 9
    for changed, message in (
        (eos, r"train-000000.tar: contains \d+ tokens in \d+ documents, but manifest.json states \d+ tokens in"),
        (beyond, r"train-000000.tar: contains id \d+, but vocab is"),
        (cut, r"train-000000.tar: ends inside a document"),
        (tokens[1:], r"train-000000.tar: sample \d has name, type, offset and size"),
        (swapped, "unigram_entropy_nats"),
    ):
        rewritten(folder, corpus, changed)
        refused(folder, message)
    rewritten(folder, corpus, tokens)
    run_verb(verify, folder, "--workers", 1)


def test_a_shard_with_its_hash_but_another_tar_than_readers_expect_is_refused(made):
    folder, corpus = made
    whole = (folder / "train-000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]

    def packed(change):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (member, content) in enumerate(members):
                other = tarfile.TarInfo(member.name)
                other.size = len(content)
                change(number, other)
                tar.addfile(other, io.BytesIO(content))
        return file.getvalue()

    rewritten(folder, corpus, tar=packed(lambda number, member: None))
    run_verb(verify, folder, "--workers", 1)
    for name in ("train-000000-000009.u16", "train-000000-000001.u32", "x" * 99):
        changed = packed(
            lambda number, member, name=name: setattr(member, "name", name if number == 1 else member.name)
        )
        rewritten(folder, corpus, tar=changed)
        refused(folder, r"train-000000.tar: sample 1 has name, type, offset and size")
    rewritten(folder, corpus, tar=b"no tar!!" * 7_680)
    refused(folder, r"train-000000.tar: is not a tar")
    rewritten(folder, corpus, tar=whole[: corpus.sample_offset(1) - 512] + bytes(1024))
    refused(folder, r"manifest.json: states impossible counts: train-000000.tar with 2560 bytes, 2\d+ tokens")
    rewritten(folder, corpus, tar=whole[: corpus.sample_offset(1) - 512] + bytes(len(whole)))
    refused(folder, r"train-000000.tar: contains 512 tokens in \d+ documents, but manifest.json states \d+ tokens in")


def test_a_corpus_elsewhere_is_verified_over_the_network(made, address):
    folder, _ = made
    run_verb(verify, f"{address}/corpus", "--workers", 1)
    with (folder / "train-000001.tar").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    refused(f"{address}/corpus", r"http.*train-000001.tar: sha256")
