"""Records are read back complete and in order, whatever a kill has left of the last line."""

import json
import resource

import pytest

from tandem.trainer import journal

FIRST, SECOND, THIRD = ({"n": n, "words": "x" * n} for n in (1, 2, 3))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


def write(path, *records, **how):
    with journal.open_journal(path, **how) as file:
        for record in records:
            journal.append_record(file, record)


def read(path):
    """Return the records, which must be the same in both directions."""
    found = list(journal.read_records(path))
    assert list(journal.read_records_backwards(path)) == found[::-1]
    return found


def test_records_are_lines_in_order(path):
    write(path, FIRST, SECOND)
    write(path, THIRD)
    assert path.read_bytes() == b"".join(json.dumps(record).encode() + b"\n" for record in (FIRST, SECOND, THIRD))
    assert read(path) == [FIRST, SECOND, THIRD]


def test_a_file_that_is_not_there_and_an_empty_one_have_no_records(path):
    assert read(path) == list(journal.read_records(path, strict=True)) == []
    assert not path.exists(), "reading makes no file"
    for cut in (False, True):
        write(path, cut=cut)
        assert path.read_bytes() == b""
        assert read(path) == list(journal.read_records(path, strict=True)) == []


@pytest.mark.parametrize("torn", [b"{", b'{"n": 2, "words": "x', b"\0" * (2 * journal.TAIL_CHUNK_BYTES)], ids=len)
def test_a_torn_last_line_is_passed_over_and_the_next_record_has_a_line_of_its_own(path, torn):
    write(path, FIRST)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read(path) == list(journal.read_records(path, strict=True)) == [FIRST]
    write(path, SECOND)
    assert path.read_bytes().startswith(whole + torn + b"\n"), "and stays as evidence"
    assert read(path) == [FIRST, SECOND]


@pytest.mark.parametrize("begin", [b"", b'{"n": 1}\n'])
@pytest.mark.parametrize(
    "length", [1, journal.TAIL_CHUNK_BYTES - 9, journal.TAIL_CHUNK_BYTES, 2 * journal.TAIL_CHUNK_BYTES + 1]
)
def test_a_torn_last_line_of_a_file_whose_lines_are_counted_is_removed(path, begin, length):
    path.write_bytes(begin + b"{" * length)
    write(path, cut=True)
    assert path.read_bytes() == begin


def test_a_record_that_lacks_its_newline_alone_counts(path):
    path.write_text(json.dumps(FIRST))
    assert read(path) == list(journal.read_records(path, strict=True)) == [FIRST]
    write(path, SECOND)
    assert read(path) == [FIRST, SECOND]


@pytest.mark.parametrize("line", [b"torn", b"", b"1", b"[]", b'"kind"', b"null", b"\xff"])
def test_lines_that_are_no_record_are_passed_over(path, line):
    write(path, FIRST)
    path.write_bytes(path.read_bytes() + line + b"\n")
    write(path, SECOND)
    assert read(path) == [FIRST, SECOND]
    assert journal.parse_record(line) == {}


def test_a_strict_reader_refuses_them(path):
    path.write_text('{"n": 1}\ntorn\n{"n": 2}\n')
    with pytest.raises(ValueError, match="Expecting value"):
        list(journal.read_records(path, strict=True))


@pytest.mark.parametrize("past", range(-2, 12))
def test_a_line_is_whole_from_the_end_wherever_the_file_is_cut_in_reading(path, past):
    """The chunk boundary falls on each byte of the line before the last, and of its newlines."""
    before = b'{"n": 1}\n'
    last = json.dumps({"n": "x" * (journal.TAIL_CHUNK_BYTES - 10 - past)}).encode() + b"\n"
    path.write_bytes(before * 3 + last)
    assert journal.TAIL_CHUNK_BYTES - len(last) in range(-2, 12), "the border is at this line"
    assert len(read(path)) == 4


def test_from_the_end_only_as_much_is_read_as_is_asked_for(path, monkeypatch):
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(50_000)))
    line_lengths = []
    parsed = journal.parse_record
    monkeypatch.setattr(journal, "parse_record", lambda line: line_lengths.append(len(line)) or parsed(line))
    assert next(journal.read_records_backwards(path)) == {"n": 49_999}
    assert len(line_lengths) == 2


def test_a_line_that_only_a_part_of_has_room_is_an_error(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with journal.open_journal(path) as file:
        journal.append_record(file, FIRST)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        try:
            with pytest.raises(OSError, match="No space left on device"):
                journal.append_record(file, SECOND)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(path, THIRD)
    assert read(path) == [FIRST, THIRD]


def test_what_json_lacks_is_an_error_and_leaves_no_line(path):
    with journal.open_journal(path) as file, pytest.raises(ValueError, match="not JSON compliant"):
        journal.append_record(file, {"loss": float("nan")})
    assert path.read_bytes() == b""
