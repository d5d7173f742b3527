"""webdataset tars, written by the library itself, as text and as token ids."""

import gc
import gzip
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tandem.data_prep import readers
from tandem.data_prep.input_files import FilePart, unreadable_error
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.remote_files import AccessDenied, FileChanged, RemoteError
from tests.data_prep.corpus_writer import small_tokenizer
from tests.data_prep.test_prepare import decoded, documents
from tests.data_prep.test_readers import listed

README = Path(__file__).parents[2] / "data_prep/README.md"
EOS_ID = small_tokenizer().token_to_id("<|endoftext|>")
SEQUENCE = 65
"""Ids of a sample in open_lm's form: the length of a row and one more."""


def write_shards(folder, samples, per_shard=40, **options):
    """ShardWriter's tars of these samples; the pattern that names them, with braces."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=per_shard, verbose=0, mtime=0, **options) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": f"{number:05}"} | sample)
    return f"{folder}/{{000000..{len(list(folder.glob('*.tar'))) - 1:06}}}.tar"


def write_tar(path, *members):
    """A tar of (name, data) with headers as `tar` writes them."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(path, *fields, counts=None):
    (file,) = listed(path)
    reading = readers.read_documents(FilePart(file, 0, 1), "text", list(fields), lambda count: None, counts)
    return [(document.location.removeprefix(f"{file.name}:"), document.text, document.fields) for document in reading]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(small_tokenizer().to_str())
    return path


@pytest.fixture
def stream(texts):
    """The ids of all texts, each ended by EOS."""
    return [one for text in texts for one in [*small_tokenizer().encode(text).ids, EOS_ID]]


def packed(stream, padding_id=None):
    """open_lm's sequences: the stream cut without overlap, the last one padded or dropped."""
    samples = [stream[first : first + SEQUENCE] for first in range(0, len(stream), SEQUENCE)]
    if padding_id is None:
        return samples[:-1]
    return [*samples[:-1], samples[-1] + [padding_id] * (SEQUENCE - len(samples[-1]))]


def adopted(output):
    return [ids.tolist() for ids in [*documents(output), *documents(output, "validation")]]


def cut(samples):
    """The documents that samples of ids stand for."""
    found = []
    for sample in samples:
        ends = [place + 1 for place, one in enumerate(sample) if one == EOS_ID]
        pieces = [sample[first:end] for first, end in zip([0, *ends], [*ends, len(sample)], strict=True)]
        found += [piece if piece[-1] == EOS_ID else [*piece, EOS_ID] for piece in pieces if piece]
    return found


@pytest.mark.parametrize("extension", ["txt", "txt.gz", "json", "json.gz", "jsonl", "jsonl.gz"])
def test_text_in_every_extension_is_the_text_of_jsonl(prepared, tmp_path, texts, extension, tokenizer):
    records = [{"text": text, "id": number} for number, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    kind = extension.removesuffix(".gz")
    values = {"txt": texts, "json": records, "jsonl": [json.dumps(record) + "\n" for record in records]}[kind]
    pattern = write_shards(tmp_path / "shards", [{extension: value} for value in values], per_shard=100)
    options = ["--tokenizer", tokenizer, "--tokenizer-library", "tokenizers"]
    expected = prepared("expected", "--input", tmp_path / "a.jsonl", *options)
    output = prepared("out", "--input", pattern, *options)
    assert sorted(adopted(output)) == sorted(adopted(expected))
    assert sorted(decoded(output)) == sorted(text for text in texts if text)


def test_the_trained_tokenizer_and_every_document_are_those_of_jsonl_over_http_too(
    prepared, verified, tmp_path, texts, address, content
):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    write_shards(tmp_path / "shards", [{"txt": text} for text in texts], per_shard=100)
    expected = prepared("expected", "--input", tmp_path / "a.jsonl")
    here = prepared("here", "--input", tmp_path / "shards/{000000..000003}.tar")
    again = prepared("again", "--input", *sorted((tmp_path / "shards").glob("*.tar")), "--workers", 2)
    there = prepared("there", "--input", f"{address}/shards/{{000000..000003}}.tar")
    verified(here)
    assert content(here) == content(again)
    files = (content(one) for one in (here, there))
    kept = [{name: data for name, data in found.items() if name.endswith(".tar")} for found in files]
    assert kept[0] == kept[1]
    assert (here / "tokenizer.json").read_bytes() == (expected / "tokenizer.json").read_bytes()
    assert sorted(adopted(here)) == sorted(adopted(expected))


@pytest.mark.parametrize("extension", ["json.gz", "json", "txt", "npy"])
def test_an_adopted_corpus_has_exactly_the_ids_that_were_written(
    prepared, verified, tmp_path, stream, tokenizer, extension
):
    samples = packed(stream)
    encode = {"npy": lambda ids: np.array(ids, np.int32), "txt": str}.get(extension, json.dumps)
    pattern = write_shards(tmp_path / "tok", [{extension: encode(ids)} for ids in samples])
    output = prepared("out", "--input", pattern, "--tokens", extension, "--tokenizer", tokenizer)
    verified(output)
    assert sorted(adopted(output)) == sorted(cut(samples))
    counts = manifest.load_manifest(output).counts
    added = sum(sample[-1] != EOS_ID for sample in samples)
    assert (counts["samples"], counts["added_eos_tokens"]) == (len(samples), added)
    assert counts["tokens"] == len(samples) * SEQUENCE + added
    assert (output / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_adopted_bytes_do_not_depend_on_workers_units_or_spills(
    prepared, tmp_path, stream, tokenizer, content, monkeypatch
):
    pattern = write_shards(tmp_path / "tok", [{"json.gz": json.dumps(ids)} for ids in packed(stream)])
    options = ["--input", pattern, "--tokens", "json.gz", "--tokenizer", tokenizer]
    expected = content(prepared("whole", *options))
    assert len(expected) > 6
    monkeypatch.setattr("tandem.data_prep.work_units.MIN_UNIT_BYTES", 3_000)
    monkeypatch.setattr("tandem.data_prep.encode.MAX_SPILL_BYTES", 2_000)
    monkeypatch.setattr("tandem.data_prep.encode.BATCH_TOKENS", 500)
    for workers in (1, 2):
        assert content(prepared(f"{workers}", *options, "--workers", workers)) == expected


@pytest.mark.parametrize("padding_id", [7, 299_000])
def test_padding_after_a_whole_document_is_removed_and_the_same_id_elsewhere_is_not(
    prepared, tmp_path, stream, tokenizer, padding_id
):
    samples = packed(stream, padding_id)
    assert samples[-1][-1] == padding_id
    real = [[5, 7, 7], [EOS_ID, 5, 7]]
    pattern = write_shards(tmp_path / "tok", [{"json": ids} for ids in [*samples, *real, [padding_id] * 3]])
    output = prepared(
        "out", "--input", pattern, "--tokens", "json", "--padding-id", padding_id, "--tokenizer", tokenizer
    )
    samples[-1] = samples[-1][: len(stream) % SEQUENCE]
    assert sorted(adopted(output)) == sorted(cut([*samples, *real]))


def test_padding_with_eos_keeps_the_eos_of_the_last_document(prepared, tmp_path, tokenizer):
    samples = [[5, 7, EOS_ID, EOS_ID, 8, *[EOS_ID] * 4], [5, EOS_ID], [5, 6], [EOS_ID] * 3]
    pattern = write_shards(tmp_path / "tok", [{"json": ids} for ids in samples])
    output = prepared("out", "--input", pattern, "--tokens", "json", "--padding-id", EOS_ID, "--tokenizer", tokenizer)
    assert sorted(adopted(output)) == sorted(cut([[5, 7, EOS_ID, EOS_ID, 8, EOS_ID], [5, EOS_ID], [5, 6]]))
    assert manifest.load_manifest(output).counts["padding_tokens"] == 3 + 3


def test_a_gzip_bomb_is_refused_before_it_is_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.data_prep.tar_reader.MAX_MEMBER_BYTES", 1_000)
    path = write_tar(tmp_path / "a.tar", ("a.txt.gz", gzip.compress(b"a" * 600) + gzip.compress(b"a" * 400) + bytes(9)))
    assert [text for _, text, _ in read(path)] == ["a" * 1_000]
    path = write_tar(tmp_path / "b.tar", ("a.txt.gz", gzip.compress(b"a" * 600) + gzip.compress(b"a" * (1 << 24))))
    with pytest.raises(
        UserError, match=rf"^{path}: a.txt.gz: contains more than 1,000 bytes after decompression; split it"
    ):
        read(path)


def test_a_member_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.data_prep.tar_reader.MAX_RECORD_BYTES", 1_000)
    tar = write_tar(tmp_path / "a.tar", ("a.txt", b"a" * 1_001)).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar))
    with pytest.raises(UserError, match=r"a.tar.gz: a.txt: has 1,001 bytes, more than 1,000; split it"):
        read(tmp_path / "a.tar.gz")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_hundreds_of_headers_that_extend_one_another_are_one_line(tmp_path, kind):
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 9
    data = b"9 path=a\n" if kind == tarfile.XHDTYPE else b"a.txt\0\0\0\0"
    path = tmp_path / "a.tar"
    path.write_bytes((header.tobuf(tarfile.USTAR_FORMAT) + data.ljust(512, b"\0")) * 3_000 + bytes(1024))
    with pytest.raises(
        UserError, match=rf"^{path}: cannot be read at its beginning \(.*\); restore or leave out the file$"
    ) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_the_manifest_of_a_tokenised_corpus_lists_its_shards_and_counts(prepared, tmp_path, stream, tokenizer, address):
    write_shards(tmp_path / "tok", [{"json.gz": json.dumps(ids)} for ids in packed(stream)])
    names = sorted(path.stem for path in (tmp_path / "tok").glob("*.tar"))[:2]
    path = tmp_path / "tok" / "manifest.jsonl"
    path.write_text("\n".join(json.dumps({"shard": name, "num_sequences": 40}) for name in names))
    options = ["--tokens", "json.gz", "--tokenizer", tokenizer]
    for number, given in enumerate((path, f"{address}/tok/manifest.jsonl")):
        output = prepared(f"out{number}", "--input", given, *options)
        assert manifest.load_manifest(output).counts["samples"] == 80
    path.write_text(json.dumps({"shard": names[0], "num_sequences": 41}))
    with pytest.raises(UserError, match=r"000000.tar: has 40 samples, but manifest.jsonl states 41; download it again"):
        prepared("short", "--input", path, *options)
    path.write_text('{"shards": 1}')
    with pytest.raises(UserError, match=r"manifest.jsonl: is not a manifest of shards"):
        prepared("none", "--input", path, *options)
    folder = prepared("folder", "--input", tmp_path / "tok", *options)
    assert manifest.load_manifest(folder).counts["samples"] == len(packed(stream)), "a folder's manifest is no input"


def test_a_json_member_beside_text_holds_its_fields(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        ("x/1.json", b'{"text": "not this", "lang": "en"}'),
        ("x/1.txt", b"one"),
        ("x/2.en.TXT", b"two"),
        ("x/2.en.json", b'{"lang": "en"}'),
        ("x/2.jpg", b"\0"),
        ("x/README", b"none"),
        ("3.json", b'{"text": "three", "lang": "fr"}'),
    )
    counts = Counter()
    assert read(path, "lang", counts=counts) == [
        ("x/1.txt", "one", {"text": "not this", "lang": "en"}),
        ("x/2.en.txt", "two", {"lang": "en"}),
        ("3.json", "three", {"lang": "fr"}),
    ]
    assert counts == {"other_members": 2}


def test_a_json_member_with_another_name_than_the_text_is_a_document(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        ("doc.v1.txt", b"one"),
        ("doc.v2.json", b'{"text": "two"}'),
        ("key.en.txt", b"three"),
        ("key.json", b'{"text": "not this", "lang": "en"}'),
    )
    assert [(name, text, fields.get("lang")) for name, text, fields in read(path, "lang")] == [
        ("doc.v1.txt", "one", None),
        ("doc.v2.json", "two", None),
        ("key.en.txt", "three", "en"),
    ]


def member_of(kind, name="b.txt", **options):
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in options.items():
        setattr(member, field, value)
    return member


def test_members_that_webdataset_drops_are_counted(tmp_path):
    path, counts = write_tar(tmp_path / "a.tar", ("a.txt", b"a"), ("__meta__/x.txt", b"b"), ("__x__", b"c")), Counter()
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            tar.addfile(member_of(kind, linkname="a.txt"))
    assert read(path, counts=counts) == [("a.txt", "a", {})]
    assert counts == {"other_members": 5}


def test_sparse_members_and_impossible_sizes_are_refused(tmp_path):
    negative = bytearray(member_of(tarfile.REGTYPE, size=9).tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 11 + b"\x00"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)

    def pax(**records):
        return member_of(tarfile.REGTYPE, pax_headers=records).tobuf(tarfile.PAX_FORMAT)

    cases = {
        "sparse": (
            member_of(tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT),
            r"has a sparse member, 'b.txt'; write the",
        ),
        "pax": (pax(**{"GNU.sparse.major": "1"}), r"has a sparse member, '.*'; write the tar without --sparse"),
        "negative": (bytes(negative), r"is not a tar, or its first header is damaged \(the size of 'b.txt' is -256\)"),
        "size": (pax(size="-5"), r"is damaged at member '.*' \(its pax size is '-5'\)"),
    }
    for name, (header, message) in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(header + bytes(2048))
        with pytest.raises(UserError, match=rf"^{path}: {message}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_the_size_in_pax_records_is_the_size_of_the_member(tmp_path):
    path = tmp_path / "a.tar"
    header = member_of(tarfile.REGTYPE, pax_headers={"size": "600"}).tobuf(tarfile.PAX_FORMAT)
    last = member_of(tarfile.REGTYPE, "c.txt", size=1).tobuf()
    path.write_bytes(header + b"x" * 600 + bytes(424) + last + b"y".ljust(512, b"\0") + bytes(1024))
    assert [text for _, text, _ in read(path)] == ["x" * 600, "y"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_long_names_folders_and_compression_are_read(tmp_path, form, suffix):
    name = f"{'folder/' * 30}é-{'n' * 120}.txt"
    path = tmp_path / f"a{suffix}"
    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        member = tarfile.TarInfo(name)
        member.size, member.uname = 4, "ü"
        tar.addfile(member, io.BytesIO(b"text"))
    assert read(path) == [(name, "text", {})]


def damaged(folder):
    """name -> (a tar, what is wrong with it)."""
    folder.mkdir()
    good = write_tar(folder / "good.tar", *((f"{number}.txt", b"x" * 3000) for number in range(9))).read_bytes()
    header = bytearray(good)
    header[4 * 3584 + 3] ^= 1
    pax = member_of(tarfile.REGTYPE, pax_headers={"comment": "x"}).tobuf(tarfile.PAX_FORMAT)
    pax = pax.replace(b"13 comment", b"00 comment")
    cases = {
        "header": (bytes(header), r"is damaged after member '3.txt' \(bad checksum\)"),
        "pax": (good[:3584] + pax + good[3584:], r"is damaged after member '0.txt' \(invalid header\); restore"),
        "member": (good[: 5 * 3584 + 2000], r"is truncated at member '5.txt'"),
        "between": (good[: 5 * 3584], r"is truncated at member '4.txt'"),
        "joined": (good + good, r"continues after its end, as concatenated tars do"),
        "no tar": (b"plain text " * 99, r"is not a tar, or its first header is damaged \(invalid header\)"),
        "nothing": (b"", r"is truncated at its beginning"),
    }
    for name, (data, _) in cases.items():
        (folder / f"{name}.tar").write_bytes(data)
    compressed = folder / "cut.tar.gz"
    compressed.write_bytes(gzip.compress(good)[:-9])
    bad = {
        "json": (("a.txt", b"a"), ("b.json", b"{"), r"b.json: is not JSON"),
        "field": (("b.json.gz", gzip.compress(b'{"body": 1}')), r"b.json.gz: has no field 'text' \(its fields: body\)"),
        "line": (("b.jsonl", b'{"text": "a"}\n\n[]\n'), r"b.jsonl:3: has no field 'text'"),
        "gz": (
            ("b.txt.gz", gzip.compress(b"words")[:-3]),
            r"b.txt.gz: is truncated: the compressed data stops before its end marker",
        ),
        "no gz": (
            ("b.txt.gz", b"words"),
            r"b.txt.gz: cannot be read \(Error -3 while decompressing data: incorrect header check\)",
        ),
        "control": (("b\n\x1b[2J.json", b"{"), r"b\\n\\x1b\[2J.json: is not JSON"),
        "control twice": (("b.tx\nt.txt", b"a"), ("b.tx\nt.txt", b"b"), r"b.tx\\nt.txt: occurs twice"),
        "empty gz": (("b.txt.gz", b""), r"b.txt.gz: is truncated"),
        "latin": (("b.txt", b"na\xefve"), r"b.txt: is not UTF-8 \(.* at byte 2\)"),
        "twice": (("b.txt", b"a"), ("b.txt", b"b"), r"b.txt: occurs twice; give each sample a unique key"),
        "apart": (("b.txt", b"a"), ("c.txt", b"c"), ("b.json", b"{}"), r"b.json: the sample 'b' occurred before"),
    }
    for name, (*members, message) in bad.items():
        write_tar(folder / f"{name}.tar", *members)
        cases[name] = (None, message)
    paths = {name: (folder / f"{name}.tar", message) for name, (_, message) in cases.items()}
    return paths | {"tar.gz": (compressed, r"cannot be read after member '8.txt' \(Truncated compressed stream\)")}


def test_a_damaged_tar_is_one_line_that_names_file_and_member(tmp_path):
    for name, (path, message) in damaged(tmp_path / "in").items():
        with pytest.raises(UserError, match=rf"^{path}: {message}") as caught:
            read(path)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (FileChanged("other"), "run the same command again"),
        (AccessDenied("403"), "correct the credentials"),
        (RemoteError("reset"), "restore the file or the connection to it"),
        (OSError("disk"), "restore or leave out the file"),
    ],
)
def test_the_remedy_fits_the_error(error, remedy):
    assert str(unreadable_error("a.tar", error)) == f"a.tar: cannot be read ({error}); {remedy}"


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.jsonl"])
def test_a_failed_download_is_not_called_damage_of_the_file(tmp_path, server, name):
    write_tar(tmp_path / name, ("a.txt", b"a"))
    (file,) = listed(f"{server.address}/{name}")
    server.faults[f"/{name}"].append("404 always")
    with pytest.raises(
        UserError, match=r"cannot be read .*FileNotFoundError.*\); restore the file or the connection to it$"
    ):
        list(readers.read_documents(FilePart(file, 0, 1), "text", [], lambda count: None))


def test_a_sample_that_is_no_list_of_known_ids_is_one_line_that_names_it(prepared, tmp_path, tokenizer):
    vocab = small_tokenizer().get_vocab_size()
    npy = io.BytesIO()
    np.save(npy, np.ones(3))
    ids = io.BytesIO()
    np.save(ids, np.ones(3, np.int64))
    ints, second, huge = ids.getvalue(), io.BytesIO(), io.BytesIO()
    np.lib.format.write_array(second, np.ones(3, np.int64), version=(2, 0))
    np.lib.format.write_array_header_1_0(huge, {"shape": (2**40,), "fortran_order": False, "descr": "<i8"})
    cases = {
        "json": (b"[1, 2", r"a.json: is not JSON"),
        "words": (b'["a"]', r"a.json: is not one list of whole numbers \(<U1 in 1 dimensions\)"),
        "null": (b"{}", r"a.json: is not one list of whole numbers \(object in 0 dimensions\)"),
        "vocab": (b"[1, %d]" % vocab, rf"a.json: has id {vocab}, but --tokenizer has ids 0 to {vocab - 1}; name the"),
        "negative": (b"[-1]", r"a.json: has id -1, but"),
        "float": (npy.getvalue(), r"a.npy: is not one list of whole numbers \(float64 in 1 dimensions\)"),
        "cut": (ints[:-3], r"a.npy: has 21 bytes of data, but its header states 3 x 8; restore it"),
        "zip.npy": (b"PK\x03\x04" + b"\0" * 60, r"a.npy: is not a .npy file; write it with numpy.save, or restore it"),
        "unbalanced.npy": (ints.replace(b"(3,)", b"((((")[:200], r"a.npy: has a damaged header \("),
        "version.npy": (
            second.getvalue().replace(b"NUMPY\x02", b"NUMPY\x09"),
            r"a.npy: has a damaged header \(.*unknown version \(9, 0\)",
        ),
        "long.npy": (ints + b"\0", r"a.npy: has 25 bytes of data, but its header states 3 x 8; restore it"),
        "huge.npy": (
            huge.getvalue() + bytes(24),
            r"a.npy: has 24 bytes of data, but its header states 1,099,511,627,776 x 8; restore it",
        ),
    }
    for name, (data, message) in cases.items():
        extension = "npy" if b"NUMPY" in data or name.endswith(".npy") else "json"
        path = write_tar(tmp_path / f"{name}.tar", (f"a.{extension}", data))
        with pytest.raises(UserError, match=rf"^{path}: {message}") as caught:
            prepared("out", "--input", path, "--tokens", extension, "--tokenizer", tokenizer)
        assert "\n" not in str(caught.value)


def test_options_that_do_not_go_with_ids_are_refused(prepared, tmp_path, tokenizer, texts):
    path = write_tar(tmp_path / "a.tar", ("a.json", b"[1]"))
    (tmp_path / "a.txt").write_text("words")
    given = ["--input", path, "--tokens", "json"]
    cases = [
        (given, r"--tokens: json needs --tokenizer, for the vocabulary and EOS"),
        (
            [*given, "--tokenizer", tokenizer, "--deduplicate"],
            r"--deduplicate: this option needs text, but --tokens reads ids",
        ),
        (["--input", path, "--padding-id", 3], r"--padding-id: 3 has no effect without --tokens"),
        (
            [*given, "--tokenizer", tokenizer, "--padding-id", -1],
            r"--padding-id: -1 is negative; give the id that pads the samples, 0 or more",
        ),
        (
            ["--input", tmp_path / "a.txt", *given[2:], "--tokenizer", tokenizer],
            r"a.txt is not a webdataset tar, and --tokens",
        ),
        (["--input", tmp_path / "{1..a.tar"], r"1..a.tar has unbalanced braces"),
        (["--input", tmp_path / "{a,b}.tar"], r"b.tar does not exist"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            prepared("out", *arguments)


def test_a_sample_that_is_written_twice_is_adopted_twice(prepared, tmp_path, tokenizer):
    """open_lm names samples by a hash of their ids, and repeats those of sources with a frequency above one."""
    path = write_tar(tmp_path / "a.tar", ("a.json", b"[1, 2]"), ("a.json", b"[1, 2]"))
    output = prepared("out", "--input", path, "--tokens", "json", "--tokenizer", tokenizer, "--held-out", 0)
    assert adopted(output) == [[1, 2, EOS_ID]] * 2


def test_a_corpus_of_no_known_members_says_what_it_holds(prepared, folder):
    output = prepared("corpus", "--input", folder)
    shard = output / "train-000000.tar"
    with pytest.raises(UserError, match=r"--input: contains no text to train on \(\d+ other members\)"):
        prepared("out", "--input", shard)


def test_braces_in_the_name_of_a_file_are_its_name(tmp_path):
    (tmp_path / "{1..2}.txt").write_text("a")
    assert [file.name for file in listed(tmp_path / "{1..2}.txt")] == ["0/{1..2}.txt"]


# webdataset 1.0.2 leaves the last file it read to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_example_of_the_readme_reads_the_shards(prepared, folder):
    output = prepared("out", "--input", folder)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(example.replace("data/demo", str(output)), names)
    tokens = np.concatenate(list(names["dataset"]))
    names.clear()
    gc.collect()
    assert np.array_equal(tokens, np.concatenate(documents(output)))
