import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from tandem.trainer.config import ShardCacheConfig, UserError
from tandem.trainer.data import manifest
from tests.trainer.data.shard_copies import SHORT_TIMEOUT_SECONDS

QUICK = ShardCacheConfig(max_attempts=4, timeout_seconds=SHORT_TIMEOUT_SECONDS)


def test_what_is_written_is_what_is_read(make_corpus):
    folder = make_corpus("a")
    corpus = manifest.load_manifest(folder)
    assert manifest.dump_manifest(corpus) == (folder / manifest.MANIFEST_FILE).read_text()
    assert corpus.train.tokens == sum(shard.tokens for shard in corpus.train.shards) > 0


def test_a_corpus_elsewhere_is_opened_as_one_in_a_folder(make_corpus, server, caplog):
    digest = hashlib.sha256(b"{}").hexdigest()
    folder, address = make_corpus("a", tokenizer=digest), f"{server.address}/a"
    (folder / manifest.TOKENIZER_FILE).write_text("{}")
    server.faults["/a/manifest.json"] += ["500", "truncated", "silence"]
    corpus = manifest.load_manifest(address, QUICK)
    assert corpus == manifest.load_manifest(folder)
    assert [f"attempt {n} of 4 failed" in record.message for n, record in enumerate(caplog.records, start=1)] == [
        True
    ] * 3
    manifest.check_shard_files(address, corpus)
    manifest.check_tokenizer(f"{address}/{manifest.TOKENIZER_FILE}", corpus, "data.tokenizer")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404 always", "no such file"),
        ("500 always", r"cannot be read \(.*500"),
        # One byte is changed. Whether the file is still JSON depends on the byte.
        ("wrong", "does not match its fingerprint|is not a corpus manifest"),
    ],
)
def test_a_corpus_elsewhere_that_cannot_be_opened_is_refused_in_one_line(make_corpus, server, fault, message):
    make_corpus("a")
    server.faults["/a/manifest.json"].append(fault)
    with pytest.raises(UserError, match=rf"http://127.0.0.1:\d+/a/manifest.json: ({message})") as caught:
        manifest.load_manifest(f"{server.address}/a", QUICK)
    assert "\n" not in str(caught.value)


def test_a_changed_number_in_the_manifest_is_found(make_corpus):
    folder = make_corpus("a")
    path = folder / manifest.MANIFEST_FILE
    tree = json.loads(path.read_text())
    tree["train"]["shards"][0]["tokens"] += 1
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"manifest.json: does not match its fingerprint"):
        manifest.load_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["train"].update(tokens=1 << 62), r"train with 4611686018427387904 tokens, but \d+ in its"),
        (lambda tree: tree["train"]["shards"][0].update(tokens=1 << 62), r"train-000000.tar with \d+ bytes, 46116860"),
        (
            lambda tree: tree["train"]["shards"][0].update(documents=1 << 62),
            r"tokens and 4611686018427387904 documents",
        ),
        (lambda tree: tree["train"]["shards"][0].update(documents=-1), r"tokens and -1 documents"),
        (lambda tree: tree.update(vocab=1 << 40), "vocab 1099511627776 does not fit in uint16"),
        (lambda tree: tree.update(sample_tokens=0), "dtype uint16 and sample_tokens 0"),
    ],
)
def test_counts_that_would_fill_the_memory_are_refused_although_the_fingerprint_matches(make_corpus, change, message):
    path = make_corpus("a") / manifest.MANIFEST_FILE
    tree = json.loads(path.read_text())
    change(tree)
    content = {name: value for name, value in tree.items() if name not in ("format", "version", "fingerprint")}
    tree["fingerprint"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"manifest.json: states impossible counts: .*{message}"):
        manifest.load_manifest(path.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "is not a corpus manifest"),
        ("[]", "is not a corpus manifest"),
        ('{"format": "tandem-corpus"}', "is not a corpus manifest"),
        ('{"format": "tandem-corpus", "version": 99, "fingerprint": ""}', "but this version of Tandem reads"),
    ],
)
def test_a_manifest_that_is_none_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / manifest.MANIFEST_FILE).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        manifest.load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_short_shard_is_named(make_corpus):
    folder = make_corpus("a")
    corpus = manifest.load_manifest(folder)
    path = folder / corpus.train.shards[1].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name}: has \d+ bytes, not \d+ as in manifest.json"):
        manifest.check_shard_files(folder, corpus)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}: the shard is missing"):
        manifest.check_shard_files(folder, corpus)


def test_the_tokenizer_must_be_the_corpus_s(make_corpus, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    corpus = manifest.load_manifest(make_corpus("a", tokenizer=digest))
    manifest.check_tokenizer(file, corpus, "data.tokenizer")
    other = dataclasses.replace(corpus, tokenizer_sha256="0" * 64)
    with pytest.raises(UserError, match=r"data.tokenizer: .*tokenizer.json has sha256"):
        manifest.check_tokenizer(file, other, "data.tokenizer")
    with pytest.raises(UserError, match=r"data.tokenizer: .*cannot be read"):
        manifest.check_tokenizer(tmp_path / "none.json", corpus, "data.tokenizer")


def test_a_resume_with_another_corpus_is_refused():
    manifest.check_fingerprints({"a": "1" * 64, "gone": "3" * 64}, {"a": "1" * 64, "new": "2" * 64})
    with pytest.raises(UserError, match=r"data.sources.a: the corpus has fingerprint 222222222222, .*111111111111"):
        manifest.check_fingerprints({"a": "1" * 64}, {"a": "2" * 64})


def test_a_local_corpus_is_opened_without_torch_numpy_or_fsspec(make_corpus):
    folder = make_corpus("a")
    code = (
        "import sys; from tandem.trainer.config import ShardCacheConfig; "
        "from tandem.trainer.data import manifest, shard_cache; "
        f"corpus = manifest.load_manifest({str(folder)!r}); "
        f"shard_cache.ShardCache(ShardCacheConfig()).open_shard({str(folder)!r}, corpus.train.shards[0]); "
        "sys.exit(bool({'torch', 'numpy', 'fsspec', 'aiohttp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
