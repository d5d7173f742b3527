"""What is read: which files, each document once however a file is cut, and no file that is not what it was."""

import argparse
import gzip
import json
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tandem.data_prep import formats, input_files, prepare, provenance, readers
from tandem.data_prep.input_files import FilePart
from tandem.data_prep.records import Document
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tests.data_prep.conftest import zstd_frame
from tests.data_prep.test_prepare import decoded

NOWHERE = Path(os.devnull)
ROOT = Path(__file__).parents[2]


def listed(*paths, glob=None, **options):
    return input_files.list_input_files([str(path) for path in paths], glob, NOWHERE, **options)


def names(*paths, glob=None):
    return [file.name for file in listed(*paths, glob=glob)]


def documents(part, *more_fields) -> list[Document]:
    return list(readers.read_documents(part, "text", list(more_fields), lambda count: None))


def in_parts(file, count, *more_fields):
    return [document for number in range(count) for document in documents(FilePart(file, number, count), *more_fields)]


def linked(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


@pytest.fixture
def records(tmp_path):
    """Lines of many lengths, blank ones among them, with CRLF, characters of several bytes and no end of the last."""
    lines = [json.dumps({"text": "漢🙂" * (number % 4) + str(number)}, ensure_ascii=False) for number in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\r\n".join(["", *lines[:5], "", *lines[5:]]).encode())
    return path


@pytest.fixture
def table(tmp_path):
    """Row groups of three rows, the last of one, with fields besides the text."""
    meta = [{"set": f"s{number % 2}"} for number in range(10)]
    columns = {"text": [f"text {number}" for number in range(10)], "meta": meta, "id": list(range(10))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=3)
    return tmp_path / "a.parquet"


def test_a_link_is_read_as_what_its_name_says_and_a_file_behind_two_once(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text('{"text": "one"}\n{"text": "two"}\n')
    (blobs / "def").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    cache = tmp_path / "snapshots"
    for name, blob in (("x.jsonl", "abc"), ("y.jsonl", "abc"), ("z.jsonl.gz", "def")):
        linked(cache / name, blobs / blob)
    files = listed(cache)
    assert [file.name for file in files] == ["0/x.jsonl", "0/z.jsonl.gz"]
    assert [document.text for file in files for document in in_parts(file, 1)] == ["one", "two", "three"]
    assert names(cache / "x.jsonl") == ["0/x.jsonl"]


def test_folders_behind_links_are_read_even_where_a_link_leads_back(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    (elsewhere / "a.txt").write_text("a")
    root = tmp_path / "in"
    linked(root / "link", elsewhere.parent)
    linked(root / "again", elsewhere)
    linked(elsewhere / "up", root)
    assert names(root) == ["0/again/a.txt"]
    (root / "again").unlink()
    assert names(root) == ["0/link/deep/a.txt"]
    assert names(root, glob="link/**/*.txt") == ["0/link/deep/a.txt"]
    linked(root / "gone.txt", tmp_path / "nothing")
    linked(root / "loop.txt", root / "loop.txt")
    with pytest.raises(UserError, match=r"gone.txt: cannot be read \(No such file.*; .* with --skip-dangling-links"):
        names(root)
    listing = input_files.Listing(skips_dangling_links=True)
    assert [file.name for file in listed(root, listing=listing)] == ["0/link/deep/a.txt"]
    assert (listing.dangling_links, listing.outside_links) == (2, [f"{root}/link/deep/a.txt -> {elsewhere}/a.txt"])


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.c", ["a.c", "s/b.c", "s/t/d.c"]),
        ("s/*.c", ["s/b.c"]),
        ("s/**/*.c", ["s/b.c", "s/t/d.c"]),
        ("[a-b].c", ["a.c", "s/b.c"]),
        ("./*.C", []),
    ],
)
def test_a_glob_is_of_names_in_the_folder_or_below(tmp_path, glob, expected):
    for name in ("a.c", "s/b.c", "s/t/d.c", "a.x", ".h/a.c"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    if not expected:
        with pytest.raises(UserError, match="contains no file that matches --glob"):
            names(tmp_path / "in", glob=glob)
        return
    assert names(tmp_path / "in", glob=glob) == [f"0/{name}" for name in expected]


def test_a_named_file_of_no_known_kind_is_refused_unless_an_option_says_that_it_is_text(tmp_path, address):
    (tmp_path / "c.json").write_text('{"text": "words"}\n')
    (tmp_path / "notes").write_text("words")
    for given in (tmp_path / "c.json", f"{address}/c.json", f"{address}/c.json?name=c.jsonl"):
        assert [document.text for document in in_parts(*listed(given), 1)] == ["words"]
    for given in (tmp_path / "notes", f"{address}/notes"):
        with pytest.raises(
            UserError, match=r"--input: .*notes has neither .*; give --format, for example --format text"
        ):
            listed(given)
        for files in (listed(given, glob="*"), listed(given, file_format="text")):
            assert [document.text for document in in_parts(*files, 1)] == ["words"]


def test_the_signature_of_a_link_is_not_of_the_name(tmp_path, address):
    (tmp_path / "a b.jsonl").write_text('{"text": "words"}\n')
    (file,) = listed(f"{address}/a%20b.jsonl?sig=x/y.z")
    assert file.name == "0/a b.jsonl"
    assert [document.text for document in in_parts(file, 1)] == ["words"]


def test_every_format_of_records_is_named_in_the_help_and_on_both_pages():
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    [row] = [
        line for line in (ROOT / "data_prep/README.md").read_text().splitlines() if line.startswith("| `readers.py`")
    ]
    [paragraph] = re.findall(
        r"^`tandem prepare` reads .*?\n\n", (ROOT / "launch/guides/data.md").read_text(), re.M | re.S
    )
    texts = {"--help": parser.format_help(), "data_prep/README.md": row, "launch/guides/data.md": paragraph}
    for place, text in texts.items():
        found = re.findall(r"(?<!\S)[`(]*((?:\.[a-z0-9]+)+)", text)
        assert formats.RECORD_SUFFIXES.keys() | formats.COMPRESSION_SUFFIXES <= set(found), place


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt", "a.tar"])
def test_a_file_that_changes_after_it_was_listed_is_refused(tmp_path, table, name, when):
    path = tmp_path / name
    lines = b'{"text": "x"}\n' * 9
    if name == "a.tar":
        (tmp_path / "a.txt").write_text("x")
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "a.txt", "a.txt")
            tar.add(tmp_path / "a.txt", "b.txt")
    elif name != table.name:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    (file,) = listed(path)
    reading = readers.read_documents(FilePart(file, 0, 1), "text", [], lambda count: None)
    if when == "while":
        next(reading)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=rf"{name}: has changed since it was listed; run the same command again"):
        list(reading)
    with pytest.raises(UserError, match="has changed"):
        input_files.content_hash(FilePart(file, 0, 1))


def test_a_file_that_was_cut_meanwhile_has_changed_and_is_not_called_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 99}))
    (file,) = listed(path)
    path.write_text('{"text": "x')
    with pytest.raises(UserError, match=r"a.jsonl: has changed"):
        in_parts(file, 1)


def test_a_file_elsewhere_that_changes_is_refused(tmp_path, address):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 9)
    (file,) = listed(f"{address}/a.jsonl")
    reading = readers.read_documents(FilePart(file, 0, 1), "text", [], lambda count: None)
    next(reading)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r"http.*a.jsonl: has changed since it was listed"):
        list(reading)


@pytest.mark.parametrize("over_http", [False, True])
def test_lines_are_the_same_in_any_number_of_parts(records, over_http, address):
    (file,) = listed(f"{address}/a.jsonl" if over_http else records)
    whole = in_parts(file, 1)
    assert [document.text[-1] for document in whole] == list("012345678")
    content = records.read_bytes()
    for document in whole:
        place = int(document.location.removeprefix("0/a.jsonl:"))
        assert json.loads(content[place:].splitlines()[0])["text"] == document.text
    # As many parts as bytes: every byte begins one.
    for count in range(2, 5) if over_http else (*range(2, 20), file.size_bytes):
        assert in_parts(file, count) == whole, count


def test_rows_are_the_same_in_any_number_of_parts_with_their_fields(table):
    (file,) = listed(table)
    whole = in_parts(file, 1, "meta", "id", "none")
    assert [document.location for document in whole] == [f"0/a.parquet:{number}" for number in range(1, 11)]
    expected = [(f"text {number}", {"meta": {"set": f"s{number % 2}"}, "id": number}) for number in range(10)]
    assert [(document.text, document.fields) for document in whole] == expected
    for count in range(2, 10):
        assert in_parts(file, count, "meta", "id") == whole, count
    assert in_parts(file, 3, "id")[4].fields == {"id": 4}


@pytest.mark.parametrize("block", [3, 4 << 20])
def test_a_bad_line_is_named_with_its_number_whatever_the_part(records, monkeypatch, block):
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", block)
    content = records.read_bytes().split(b"\r\n")
    content[8] = b"{"
    records.write_bytes(b"\r\n".join(content))
    (file,) = listed(records)
    for count in (1, 2, 3, 7, file.size_bytes):
        with pytest.raises(UserError, match=r"a.jsonl:9: is not JSON"):
            in_parts(file, count)


def test_the_number_of_a_bad_line_is_found_without_the_file_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "x" * 1000}) + "\n") * 1000 + "{")
    (file,) = listed(tmp_path / "a.jsonl")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a.jsonl:1001: is not JSON"):
            documents(FilePart(file, 999, 1000))
        assert tracemalloc.get_traced_memory()[1] < file.size_bytes / 4
    finally:
        tracemalloc.stop()


def test_parquet_is_read_in_batches_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PARQUET_BATCH_BYTES", 10_000)
    texts = [f"{number:01000}" for number in range(100)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": [texts] * 100}), tmp_path / "a.parquet")
    (file,) = listed(tmp_path / "a.parquet")
    before = pyarrow.total_allocated_bytes()
    reading = readers.read_documents(FilePart(file, 0, 1), "text", [], lambda count: None)
    assert next(reading).text == texts[0]
    group = pyarrow.parquet.read_metadata(tmp_path / "a.parquet").row_group(0)
    assert 8 <= readers._rows_per_batch(group, ["text"]) <= 10
    assert pyarrow.total_allocated_bytes() - before < 1_000_000
    assert [document.text for document in reading] == texts[1:]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_truncated_and_one_of_no_lines_is_not(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"a.jsonl{suffix}: cannot be read \(Truncated.*; restore or leave out"):
        in_parts(*listed(path), 1)
    path.write_bytes(gzip.compress(b"") if suffix == ".gz" else zstd_frame(b""))
    assert in_parts(*listed(path), 1) == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 1_000)
    content = b'{"text": "a"}\n' + b" " * 999 + b"\n" + b" " * 1_000 + b"\n"
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstd_frame}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content))
    with pytest.raises(UserError, match=rf"a.jsonl{suffix}:3: the line has more than 1,000 bytes; split it, or leave"):
        in_parts(*listed(tmp_path / f"a.jsonl{suffix}"), 1)
    (tmp_path / "a.txt").write_bytes(b"a" * 1_001)
    with pytest.raises(UserError, match=r"a.txt: a text of more than 1,000 bytes is too long; split it"):
        in_parts(*listed(tmp_path / "a.txt"), 1)


def test_groups_and_where_are_of_parquet_too(prepared, table):
    output = prepared("out", "--input", table, "--group-field", "meta.set", "--held-out", 0)
    assert {group: counts["documents"] for group, counts in manifest.load_manifest(output).groups.items()} == {
        "s0": 5,
        "s1": 5,
    }
    output = prepared("some", "--input", table, "--where", "meta.set=s1", "--held-out", 0)
    assert sorted(decoded(output)) == [f"text {number}" for number in (1, 3, 5, 7, 9)]


def test_inputs_over_http_give_the_bytes_that_local_ones_give(
    prepared, records, table, address, tmp_path, content, monkeypatch
):
    monkeypatch.setattr("tandem.data_prep.work_units.MIN_UNIT_BYTES", 200)
    inputs = ("a.jsonl", "a.parquet")
    here = prepared("here", "--input", *(tmp_path / name for name in inputs), "--held-out", 0)
    there = prepared("there", "--input", *(f"{address}/{name}" for name in inputs), "--held-out", 0)
    assert len(decoded(there)) == 19
    kept = [name for name in content(here) if name.endswith(".tar") or name == "tokenizer.json"]
    assert kept
    assert {name: content(here)[name] for name in kept} == {name: content(there)[name] for name in kept}


def test_values_that_python_cannot_hold_are_a_line(tmp_path):
    nanoseconds = pyarrow.array([1], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": nanoseconds}), tmp_path / "a.parquet")
    (file,) = listed(tmp_path)
    assert [document.text for document in documents(FilePart(file, 0, 1))] == ["a"]
    with pytest.raises(UserError, match=r"a.parquet: cannot be read \(Nanosecond"):
        documents(FilePart(file, 0, 1), "when")


def test_what_an_address_needs_is_not_called_damage_of_what_lies_there():
    with pytest.raises(UserError, match=r"^ftp://host/inputs.json: ftp:// is not supported"):
        provenance.load("ftp://host/inputs.json")


def test_inputs_in_the_output_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"--input: .*texts is inside --output .*, whose files are not read"):
        input_files.list_input_files([str(folder)], None, tmp_path)
