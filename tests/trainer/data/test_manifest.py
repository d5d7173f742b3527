import dataclasses
import hashlib
import json
import subprocess
import sys
from functools import reduce

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


FIRST_SHARD = "train-000000.tar"
IMPOSSIBLE = {
    "vocab": [
        (0, "vocab: 0 is not a finite number at least 1"), (1 << 40, "vocab: 1099511627776 is not a"),
        (True, "vocab: True is of type bool"), ("500", "vocab: '500' is of type str"), (500.0, "vocab: 500.0 is of type float"),
        (1 << 63, "vocab: 9223372036854775808 does not fit in 64 bits"),
    ],
    "eos_id": [(500, "eos_id 500 is not below vocab 500"), (-1, "eos_id: -1 is not"), (None, "eos_id: None is of type")],
    "sample_tokens": [
        (0, "sample_tokens: 0 is not"), (513, "sample_tokens 513 of uint16 do not fill whole blocks of 512 bytes"),
        (1 << 62, "sample_tokens: 4611686018427387904 is not"),
    ],
    "dtype": [("uint8", "dtype: 'uint8' is not valid"), ("uint32", "dtype uint32, but ids below vocab 500 are")],
    "unigram_entropy_nats": [(-1e-9, "unigram_entropy_nats: -1e-09"), (99.0, "unigram_entropy_nats: 99.0")],
    "tokenizer_sha256": [("1" * 63, "is not a SHA-256 in hexadecimal"), ("G" * 64, "is not a SHA-256 in hexadecimal")],
    "counts": [({"tokens": -1}, "counts.tokens: -1"), ([], "counts: [] is not a mapping")],
    "groups": [({"web": {"tokens": 1.5}}, "groups.web.tokens: 1.5 is of type float")],
    "train.tokens": [(1 << 62, "train.tokens is 4611686018427387904, but its shards have"), (1, "train.tokens is 1, but")],
    "train.documents": [(3, "train.documents is 3, but its shards have 40")],
    "train.shards": [({}, "train.shards: {} is not a list"), ([{}], "train.shards[0].file: is missing")],
    "train.shards[0].tokens": [(1 << 62, f"{FIRST_SHARD} with"), (-1, "train.shards[0].tokens: -1 is not")],
    "train.shards[0].documents": [(1 << 62, "tokens and 4611686018427387904 documents"), (-1, "documents: -1 is not")],
    "train.shards[0].bytes": [(1023, f"{FIRST_SHARD} with 1023 bytes"), (-1, "train.shards[0].bytes: -1 is not")],
    "train.shards[0].xxh3_128": [("0" * 31, "is not an XXH3-128 in hexadecimal")],
    "train.shards[0].sha256": [("../" + "0" * 61, "is not a SHA-256 in hexadecimal")],
    "train.shards[0].file": [
        (name, "file: {name!r} is not the name of a tar in the folder")
        for name in ("../a.tar", "/etc/a.tar", "a/b.tar", "..", "a\n.tar", "a\x1b[2J.tar", ".a.tar", "a.txt", "", "a" * 204)
    ] + [("validation-000000.tar", "validation-000000.tar is listed twice")],
    "settings": [(1, "settings: 1 is not a mapping")],
    "extra": [(1, "extra: 1 is given, but there is no such field")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "message"), [(key, *case) for key, cases in IMPOSSIBLE.items() for case in cases]
)
def test_impossible_values_are_refused_in_one_line_although_the_fingerprint_matches(make_corpus, key, value, message):
    path = make_corpus("a") / manifest.MANIFEST_FILE
    tree = json.loads(path.read_text())
    *parents, name = key.replace("[0]", ".0").split(".")
    section = reduce(lambda found, parent: found[int(parent) if parent.isdigit() else parent], parents, tree)
    section[name] = value
    content = {name: value for name, value in tree.items() if name not in ("format", "version", "fingerprint")}
    tree["fingerprint"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"^{path}: ") as caught:
        manifest.load_manifest(path.parent)
    text = str(caught.value)
    assert message.replace("{name!r}", repr(value)) in text.replace("...", "") or (
        len(str(value)) > 50 and "is not the name" in text
    )
    assert text.endswith("; prepare the corpus again")
    assert "\n" not in text


def test_a_key_that_is_given_twice_is_refused(make_corpus):
    path = make_corpus("a") / manifest.MANIFEST_FILE
    path.write_text(path.read_text().replace('"vocab": 500', '"vocab": 500, "vocab": 500'))
    with pytest.raises(UserError, match=r"manifest.json: is not a corpus manifest \(.*the key 'vocab' is given twice"):
        manifest.load_manifest(path.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "is not a corpus manifest"),
        ("[]", "is not a corpus manifest"),
        ('{"format": "tandem-corpus"}', "is not a corpus manifest"),
        ('{"format": "tandem-corpus", "version": 99, "fingerprint": ""}', "but this version of Tandem reads"),
        ('{"format": "tandem-corpus", "version": true, "fingerprint": ""}', "has format tandem-corpus True, but"),
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
