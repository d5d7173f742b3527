"""A file is read as what it holds, whatever its name is, or is refused with a remedy."""

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
import time
from collections import Counter

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from tandem.data_prep import formats, input_files, json_values, readers, records
from tandem.data_prep.input_files import FilePart, unreadable_error
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tests.data_prep.conftest import zstd_frame
from tests.data_prep.test_prepare import decoded

RECORDS = [{"text": f"words {number} é", "n": number} for number in range(5)]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
COMPRESS = {
    "": bytes, ".gz": gzip.compress, ".zst": zstd_frame, ".zstd": zstd_frame, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"


def read(path, *, text_field="text", skip=False, counts=None, samples=None, **options):
    files = input_files.list_input_files([str(path)], options.pop("glob", None), path.parent / "none",
                                         text_field=text_field, **options)  # fmt: skip
    return [
        document.text
        for file in files
        for document in readers.read_documents(
            FilePart(file, 0, 1), text_field, [], lambda count: None, counts, skip_bad_records=skip, samples=samples
        )
    ]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson", "a.jsonl.txt", "a.txt", "a", "a.dat"])
def test_json_lines_are_records_whatever_the_name_and_the_compression(tmp_path, name, suffix):
    assert read(write(tmp_path / f"{name}{suffix}", COMPRESS[suffix](LINES))) == TEXTS
    wrong = ".gz" if suffix != ".gz" else ".xz"
    assert read(write(tmp_path / f"{name}{wrong}", COMPRESS[suffix](LINES))) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("form", ["array", "long array", "pretty array", "pretty", "concatenated", "one"])
def test_other_json_is_read_record_by_record(tmp_path, monkeypatch, name, form):
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", 40)
    monkeypatch.setattr(formats, "HEAD_BYTES", 30)
    content = {
        "array": json.dumps(RECORDS), "long array": " [ " + ",\n\n ".join(map(json.dumps, RECORDS)) + "\n]\n\n",
        "pretty array": json.dumps(RECORDS, indent=2, ensure_ascii=False),
        "pretty": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
        "concatenated": "".join(json.dumps(record, indent=1) for record in RECORDS),
        "one": json.dumps(RECORDS[0], indent=4) + "\n",
    }[form]  # fmt: skip
    data = b"\xef\xbb\xbf" + content.encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert read(path) == (TEXTS[:1] if form == "one" else TEXTS)
    broken = data.rstrip()[:-1]
    path = write(tmp_path / name, gzip.compress(broken) if name.endswith("gz") else broken)
    with pytest.raises(UserError, match=r": record \d is truncated or is not JSON|:\d+: is not JSON"):
        read(path)


def test_a_fault_in_json_is_found_before_the_rest_of_the_file_is_read():
    values = json_values.JsonValues('[{"a": 1}, {"b" 2}' + ' {"c": 3}' * 9)
    assert values.next_value() == {"a": 1}
    with pytest.raises(ValueError, match="delimiter at character 6 of the record"):
        values.next_value()


def test_text_that_only_quotes_json_is_text(tmp_path):
    for content in ('{"a": 1}\nis an object', '{"a": 1}', "[1, 2]", '{\n "text": 1\n}', "{ not JSON", ""):
        assert read(write(tmp_path / "a.txt", content)) == [content]
        assert read(write(tmp_path / "a.py", content)) == [content]
    assert read(write(tmp_path / "a.py", LINES)) == [LINES.decode()]


def test_a_json_file_without_the_text_is_refused_and_the_remedies_work(tmp_path):
    path = write(tmp_path / "package.json", '{\n "name": "x",\n "meta": {"body": "words"}\n}\n')
    with pytest.raises(
        UserError, match=r"package.json: record 1: has no field 'text' \(its fields: name, meta\); .*--format text"
    ):
        read(path)
    assert read(path, file_format="text") == [path.read_text()]
    assert read(path, text_field="meta.body") == ["words"]
    write(tmp_path / "in" / "package.json", path.read_bytes())
    write(tmp_path / "in" / "a.json", json.dumps(RECORDS))
    write(tmp_path / "in" / "_SUCCESS", b"")
    write(tmp_path / "in" / "__MACOSX" / "a.json", LINES)
    write(tmp_path / "in" / "tsconfig.json", "// a comment\n{}")
    listing = input_files.Listing()
    assert read(tmp_path / "in", listing=listing) == TEXTS
    assert listing.left_out == {".json": 2, "": 1}
    (note,) = listing.notes()
    assert note.startswith(
        "--input: left out 3 files of folders, because their names show no format (.json: 2, no suffix: 1)"
    )


def test_columns_are_read_by_content_from_any_name(tmp_path):
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.pq")
    for name in ("a", "a.jsonl", "a.txt"):
        assert read(write(tmp_path / name, (tmp_path / "a.pq").read_bytes())) == TEXTS
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    for name in ("a.feather", "a.arrow"):
        assert read(tmp_path / name) == TEXTS
        data = (tmp_path / name).read_bytes()
        assert read(write(tmp_path / "b", data)) == TEXTS
        for end in (-1, -8, -200):
            with pytest.raises(UserError, match=r"c.arrow: (is truncated|cannot be read)"):
                read(write(tmp_path / "c.arrow", data[:end]))
    with pytest.raises(UserError, match=r"a.parquet.gz is a parquet file compressed by gzip; decompress it"):
        read(write(tmp_path / "a.parquet.gz", gzip.compress((tmp_path / "a.pq").read_bytes())))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_every_type_of_text_column_is_read_and_any_other_is_one_line(tmp_path, kind):
    path, strings = tmp_path / f"a.{kind}", pyarrow.array(TEXTS)

    def written(**columns):
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path) if kind == "parquet" else pyarrow.feather.write_feather(table, path)
        return path

    for column in (strings.dictionary_encode(), strings.cast(pyarrow.large_string()), strings.cast(pyarrow.string_view()),
                   strings.cast(pyarrow.binary()), strings.cast(pyarrow.large_binary())):  # fmt: skip
        assert read(written(text=column)) == TEXTS, column.type
    nested = pyarrow.array([{"a": {"text": text}} for text in TEXTS])
    assert read(written(meta=nested), text_field="meta.a.text") == TEXTS
    assert read(written(meta=nested, **{"meta.a.text": ["x"] * 5}), text_field="meta.a.text") == ["x"] * 5
    for column, message in ((pyarrow.nulls(5), "is empty in every row"), ([[text] for text in TEXTS], r"is list<.*>, not text"),
                            (nested, r"is struct<.*>, not text")):  # fmt: skip
        with pytest.raises(UserError, match=rf"a.{kind}: field 'text' {message}; name another"):
            read(written(text=column))
    inner = pyarrow.array([{"c": text} for text in TEXTS])
    assert read(written(**{"a": pyarrow.array([{"x": 1}] * 5), "a.b": inner}), text_field="a.b.c") == TEXTS
    bad = pyarrow.array([b"a", None, b"\xff", b"d"], pyarrow.binary())
    with pytest.raises(UserError, match=rf"a.{kind}: row 2: has no 'text'"):
        read(written(text=bad))
    counts = Counter()
    assert read(written(text=bad.cast(pyarrow.binary())), skip=True, counts=counts) == ["a", "d"]
    assert counts == {"records_without_text": 1, "undecodable_records": 1}
    twice = pyarrow.Table.from_arrays([strings, strings], ["text", "text"])
    pyarrow.parquet.write_table(twice, path) if kind == "parquet" else pyarrow.ipc.new_file(path, twice.schema).write(
        twice
    )
    if kind == "parquet":
        with pytest.raises(UserError, match=r"a.parquet: has 2 columns named 'text'; rename all but one"):
            read(path)


def test_compressed_files_of_several_members_are_read_to_their_end(tmp_path):
    half = len(LINES) // 2
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        first, second = COMPRESS[suffix](LINES[:half]), COMPRESS[suffix](LINES[half:])
        path = tmp_path / f"a.jsonl{suffix}"
        assert read(write(path, first + second)) == TEXTS
        for end in (-1, -len(second) + 3):
            with pytest.raises(UserError, match=rf"a.jsonl{suffix}:\d: cannot be read \(.*\); restore or leave out"):
                read(write(path, (first + second)[:end]))
        with pytest.raises(UserError, match=rf"a.jsonl{suffix}:\d: cannot be read"):
            read(write(path, first + second + b"garbage"))
        if suffix != ".zst":
            assert read(write(path, first + b"\0" * 8 + second + b"\0" * 900)) == TEXTS
    assert read(write(tmp_path / "b.zst", SKIPPABLE_FRAME + zstd_frame(LINES) + SKIPPABLE_FRAME)) == TEXTS
    with pytest.raises(UserError, match=r"a.gz.gz is compressed twice \(gzip of gzip\); decompress it once"):
        read(write(tmp_path / "a.gz.gz", gzip.compress(gzip.compress(LINES))))


def test_a_zstd_file_of_a_long_window_is_refused_with_the_command_that_makes_it_readable(tmp_path):
    # The header of a frame: a window of 2 GiB, no size. Made by `zstd --long=31`.
    path = write(tmp_path / "a.jsonl.zst", bytes.fromhex("28b52ffd04a801") + b"\0" * 40)
    with pytest.raises(
        UserError, match=r"a.jsonl.zst:1: .* more than 128 MiB\); compress it again: (zstd -d --long=31 .*)"
    ) as caught:
        read(path)
    assert str(path) in str(caught.value).split("--long=31")[1]
    refusal = unreadable_error("https://host/a.zst", OSError("Frame requires too much memory"))
    assert str(refusal).endswith("; download it and compress it again: zstd -d --long=31 -c a.zst | zstd -o new-a.zst")


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_the_command_for_a_zstd_file_of_a_long_window_makes_a_file_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["zstd", "--quiet", "--long=31", "--stdout"]
    path = write(
        tmp_path / "it's: a.jsonl.zst", subprocess.run(command, input=LINES, stdout=subprocess.PIPE, check=True).stdout
    )
    with pytest.raises(UserError, match=r"compress it again: zstd") as caught:
        read(path)
    subprocess.run(
        ["sh", "-c", str(caught.value).split("compress it again: ")[1]], check=True, stderr=subprocess.DEVNULL
    )
    assert read(tmp_path / "new-it's: a.jsonl.zst") == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "PK\x03\x04", "is a zip archive; unzip it"),
        ("a.jsonl", "{}".encode("utf-16"), "is UTF-16; run iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "words".encode("utf-16"), r"is not UTF-8 .*; convert it with iconv -f UTF-16"),
        ("a.csv", "text\nwords\n", "is a table of text; convert it"),
        ("a.json", "words", "does not begin with JSON; give --format"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_a_remedy(tmp_path, name, content, message):
    with pytest.raises(UserError, match=rf"{name}:? {message}"):
        read(write(tmp_path / name, content))


def test_what_python_writes_as_json_is_read_and_half_a_surrogate_pair_in_the_text_is_not(tmp_path):
    lines = b'\xef\xbb\xbf{"text": "a", "x": NaN}\r\n{"text": "b", "x": "\\ud800"}\r\n'
    lines += b'{"text": "c\\u0000", "text": "d\\u0000"}\r\n'
    path = write(tmp_path / "a.jsonl", lines)
    assert read(path) == ["a", "b", "d\0"]
    with pytest.raises(
        UserError, match=r"a.jsonl:4: is not JSON of Unicode text \(half a surrogate pair at character 2\)"
    ):
        read(write(path, lines + b'{"text": "a\\udc00"}\n'))


def test_fields_have_one_syntax_of_paths_in_every_format(prepared, tmp_path):
    made = [{"a.b": "exact", "a": {"b": "nested", "ok": number > 1, "n": None, "set": "s"}} for number in range(4)]
    write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in made))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), tmp_path / "a.parquet")
    assert json_values.lookup({"a": {"b.c": 1}}, "a.b.c") == 1
    assert json_values.lookup({"a": 1, "a.b": {"c": 2}}, "a.b.c") == 2
    assert json_values.lookup({"a": [1]}, "a.b") is json_values.MISSING
    for kind in ("jsonl", "parquet"):
        path = tmp_path / f"a.{kind}"
        assert read(path, text_field="a.b") == ["exact"] * 4
        assert read(path, text_field="a.set") == ["s"] * 4
        options = ["--input", path, "--text-field", "a.b", "--held-out", 0]
        corpus = manifest.load_manifest(
            prepared(f"ok {kind}", *options, "--where", "a.ok=true", "--group-field", "a.set")
        )
        assert (corpus.counts["documents"], corpus.groups["s"]["documents"]) == (2, 2)
    with pytest.raises(
        UserError, match=r"^--where: no document has a.ok=yes; its values are (true|false) \(2\), .* \(2\); name one"
    ):
        prepared("none", *options, "--where", "a.ok=yes")
    with pytest.raises(UserError, match=r"^--where: no document has x=y; its values are \(no such field\) \(4\)"):
        prepared("none", *options, "--where", "x=y")


def test_bad_lines_are_counted_by_kind_and_more_than_half_are_refused(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(records, "MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", 70)
    good = [json.dumps({"text": f"words {number}"}) for number in range(9)]
    bad = [
        "{",
        '{"body": "x"}',
        '{"text": null}',
        '{"text": ["x"]}',
        '{"text": "\\ud800"}',
        '{"text": "' + "x" * 300 + '"}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join([*good[:4], *bad, *good[4:]]) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl:5: is not JSON"):
        prepared("out", "--input", path)
    output = prepared("out", "--input", path, "--skip-bad-lines", "--held-out", 0)
    assert sorted(decoded(output)) == [f"words {number}" for number in range(9)]
    corpus = manifest.load_manifest(output)
    assert {name: corpus.counts.get(name) for name in records.BAD_RECORD_COUNTS} == {
        "invalid_json_records": 1, "records_without_text": 2, "records_of_other_type": 1, "undecodable_records": 1,
        "overlong_records": 1,
    }  # fmt: skip
    assert [line.partition(": ")[0] for line in corpus.settings["bad_records"]] == [
        f"0/a.jsonl:{n}" for n in range(5, 10)
    ]
    said = capsys.readouterr().out
    assert "records without text left out: 2" in said
    assert "left out 0/a.jsonl:5: is not JSON" in said
    prepared("out", "--input", path, "--skip-bad-lines", "--held-out", 0)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was prepared with skip_bad_lines True, not False"):
        prepared("out", "--input", path, "--held-out", 0)
    (file,) = input_files.list_input_files([str(path)], None, tmp_path / "none")
    for count in (2, 3, 7):
        counts = Counter()
        parts = [FilePart(file, number, count) for number in range(count)]
        monkeypatch.setattr(records.BadRecords, "check_share", lambda self: None)
        found = [
            document.text
            for part in parts
            for document in readers.read_documents(part, "text", [], lambda count: None, counts, skip_bad_records=True)
        ]
        assert (found, sum(counts.values())) == ([f"words {number}" for number in range(9)], 6)


def test_a_file_of_mostly_bad_lines_is_refused_even_if_they_may_be_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join([json.dumps({"text": "a"}), *["x"] * 2]))
    with pytest.raises(UserError, match=r"a.jsonl: 2 of 3 records are bad, more than half, .*; one is 2: is not JSON"):
        read(path, skip=True)
    assert read(write(path, "\n".join([json.dumps({"text": "a"}), "x"])), skip=True) == ["a"]


def test_the_records_of_later_settings_do_not_change_corpora_that_do_not_use_them(prepared, tmp_path):
    output = prepared("out", "--input", write(tmp_path / "a.jsonl", LINES))
    assert not {"format", "skip_bad_lines", "bad_records"} & manifest.load_manifest(output).settings.keys()
    with pytest.raises(UserError, match=r"was prepared with format None, not text"):
        prepared("out", "--input", tmp_path / "a.jsonl", "--format", "text")


def test_dangling_links_are_counted_in_the_manifest_and_shown(prepared, tmp_path, capsys):
    write(tmp_path / "blobs" / "abc", LINES)
    (tmp_path / "in").mkdir()
    for name, target in (("a.jsonl", "../blobs/abc"), ("b.jsonl", "../blobs/gone")):
        (tmp_path / "in" / name).symlink_to(target)
    output = prepared("out", "--input", tmp_path / "in", "--skip-dangling-links", "--held-out", 0)
    assert (sorted(decoded(output)), manifest.load_manifest(output).counts["dangling_links"]) == (TEXTS, 1)
    said = capsys.readouterr()
    assert "dangling links left out: 1" in said.out
    assert "note: --input: reads 1 links that lead out of their folder, for example" in said.err


def test_a_pattern_of_names_is_expanded_as_in_bash(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / "in" / name, LINES)
    found = input_files.list_input_files([f"{tmp_path}/in/*.jsonl"], None, tmp_path / "none")
    assert [file.name for file in found] == ["0/a.jsonl", "1/b.jsonl"]
    with pytest.raises(UserError, match=r"\*.pq does not exist"):
        input_files.list_input_files([f"{tmp_path}/in/*.pq"], None, tmp_path / "none")


def test_records_with_a_damaged_first_line_are_still_records(tmp_path):
    good = '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'
    for first in ('{"text": "torn\n', b'{"text": "\xe9"}\n'.decode("latin1")):
        for name in ("a.jsonl", "a.json", "a.txt"):
            path = write(tmp_path / name, (first + good).encode("latin1"))
            with pytest.raises(UserError, match=rf"{name}:1: is not JSON .* --skip-bad-lines"):
                read(path)
            counts = Counter()
            assert read(path, skip=True, counts=counts) == ["a", "b", "c"]
            assert counts == {"invalid_json_records": 1}
    path = write(tmp_path / "torn.txt", good[:-3])
    with pytest.raises(UserError, match=r"torn.txt:3: is not JSON .* with --skip-bad-lines$"):
        read(path)
    assert read(path, skip=True) == ["a", "b"]
    quoted = '{"text": "a"}\n{"text": "b"}\nare two records\nand this is text\n'
    assert read(write(path, quoted)) == [quoted]


def test_json_of_source_code_whose_field_is_no_text_is_left_out(tmp_path):
    write(tmp_path / "in" / "package.json", '{"text": {"en": "Yes"}}')
    write(tmp_path / "in" / "a.py", "words")
    listing = input_files.Listing()
    assert read(tmp_path / "in", listing=listing) == ["words"]
    assert listing.left_out == {".json": 1}
    with pytest.raises(
        UserError, match=r"package.json:1: field 'text' is dict, not text; .*, or read .* --format text"
    ):
        read(tmp_path / "in" / "package.json")


def test_json_lines_named_as_columns_are_read_and_a_tiny_stream_is_truncated(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        assert read(write(tmp_path / name, LINES)) == TEXTS
    for content in (b"", b"words", b"\xff\xff\xff\xff"):
        with pytest.raises(UserError, match=r"b.arrow: is truncated; restore"):
            read(write(tmp_path / "b.arrow", content))


def test_blanks_in_json_take_no_time(tmp_path):
    path, start = write(tmp_path / "a.json", "[" + " " * (8 << 20) + '{"text": "a"}]'), time.process_time()
    assert read(path) == ["a"]
    assert time.process_time() - start < 0.5  # 0.02 s; one character at a time takes 2 s
