"""A damaged file of unfinished work never changes a corpus: it is refused in one line that names it and a remedy that works."""

import dataclasses
import glob
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tandem.data_prep import prepare, shuffle, stages, work_files, work_units
from tandem.data_prep.cluster.submissions import Submission
from tandem.data_prep.output_folder import Claim
from tandem.data_prep.shuffle import ShardKeyRanges, ShardRecord
from tandem.data_prep.spill import UnitRecord
from tandem.data_prep.stages import TrainedTokenizer
from tandem.data_prep.work_files import DamagedWork
from tandem.trainer.config import UserError
from tests.data_prep.conftest import WORDS, file_contents, run_verb
from tests.fuzz.mutations import mutate_bytes, mutate_tree

RECORDS = {
    "preparing.json": Claim,
    "work/jobs.json": Submission,
    "work/tokenizer-*.json": TrainedTokenizer,
    "work/[0-9a-f]*.json": UnitRecord,
    "work/whole-*/ranges.json": ShardKeyRanges,
    "work/whole-*/train-000000.json": ShardRecord,
}
NUM_MUTATIONS = 60
"""Number of damaged records of each kind."""


@pytest.fixture(autouse=True, scope="module")
def _several_units():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_units, "MIN_UNIT_BYTES", 8_000)
        patch.setattr(stages, "CHECK_SAMPLE_DOCUMENTS", 1)
        yield


def prepare_records(output: Path) -> dict[str, bytes]:
    """Prepare the records next to the folder, and return the files of the corpus."""
    options = "--workers 1 --sample-tokens 512 --shard-tokens 1500 --held-out 0.1 --vocab-size 270 --deduplicate"
    records = output.parents[1] / "records.jsonl"
    run_verb(prepare, "--input", records, "--output", output, *options.split(), "--group-field", "set")
    return file_contents(output)


@pytest.fixture(scope="module")
def stopped(_several_units, tmp_path_factory) -> Path:
    """A preparation that was stopped after its first shard, as if Slurm had done it. Tests copy it."""
    folder, rng = tmp_path_factory.mktemp("work_files"), random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(100)]
    lines = [json.dumps({"text": text, "set": f"s{len(text) % 2}"}) for text in [*texts, *texts[:9]]]
    (folder / "records.jsonl").write_text("\n".join(lines))
    output, gather = folder / "stopped" / "out", shuffle.gather_shard

    def stop(*arguments, **sizes):
        gather(*arguments, **sizes)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "gather_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_records(output)
    return output


@pytest.fixture(scope="module")
def expected(stopped) -> dict[str, bytes]:
    """The files of a preparation that was not stopped."""
    return prepare_records(stopped.parents[1] / "whole" / "out")


@pytest.fixture
def copied(stopped):
    """copied(): a new copy of the stopped preparation, always at the same path."""

    def copy() -> Path:
        output = stopped.parents[1] / "copied" / "out"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(stopped, output)
        return output

    return copy


def find(output: Path, pattern: str) -> list[Path]:
    found = sorted(Path(path) for path in glob.glob(str(output / pattern)))
    assert found, pattern
    return found


def refusal(output: Path, expected: dict[str, bytes]) -> str | None:
    """Continue. Return the line of the refusal, or None if the corpus is that of a preparation that was not stopped."""
    try:
        files = prepare_records(output)
    except UserError as error:
        return one_line(error)
    assert files == expected
    return None


def one_line(error: UserError) -> str:
    assert "\n" not in str(error)
    return str(error)


def follow(message: str) -> None:
    """Remove what the message says."""
    for name in re.search(r"remove (.+) and run the same command again$", message)[1].split(" and "):
        found = glob.glob(name)
        assert found, name
        for path in map(Path, found):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def change_a_digit(path: Path, rng: random.Random) -> None:
    """Change a number or a hash in a record, which stays valid JSON of the same types."""
    digits = [match.start() for match in re.finditer(rb"(?<=[0-9])[0-9]", path.read_bytes())]
    content, place = bytearray(path.read_bytes()), rng.choice(digits)
    content[place] = ord("1") + (content[place] - ord("0")) % 9
    path.write_bytes(content)


def write_submission(output: Path) -> None:
    Submission("logs", {"encode": "12", "gather": "13"}).save(output)


@pytest.mark.parametrize("pattern", RECORDS)
def test_every_damaged_record_is_refused(copied, pattern):
    """Whether or not its hash fits."""
    output, rng = copied(), random.Random(pattern)
    write_submission(output)
    path = find(output, pattern)[0]
    original, tree = path.read_bytes(), json.loads(path.read_bytes())
    read = work_files.read_record(path, RECORDS[pattern])
    for number in range(NUM_MUTATIONS):
        wrong = mutate_tree(tree["content"], rng) if number % 3 else tree["content"]
        sealed = json.dumps({"sha256": work_files._hash(path, wrong), "content": wrong}).encode()
        changed = [sealed, json.dumps(tree | {"content": wrong}).encode(), mutate_bytes(original, rng)][number % 3]
        path.write_bytes(changed)
        try:
            found, message = work_files.read_record(path, RECORDS[pattern]), ""
        except DamagedWork as error:
            found, message = None, one_line(error)
        if found is None:
            assert message.startswith(f"{path}: ")
            assert message.endswith(f"; remove {path} and run the same command again")
        elif changed == sealed:
            assert json.dumps(dataclasses.asdict(found)) == json.dumps(wrong)
        else:
            assert found == read


@pytest.mark.parametrize("damage", [flip_a_bit, cut, change_a_digit])
def test_a_preparation_with_a_damaged_record_stops_and_continues_after_the_remedy(copied, expected, damage):
    rng = random.Random(0)
    output = copied()
    for pattern in (pattern for pattern in RECORDS if pattern.startswith("work/")):
        if pattern == "work/jobs.json":
            write_submission(output)
        path = find(output, pattern)[0]
        damage(path, rng)
        message = refusal(output, expected)
        assert message
        assert message.startswith(f"{path}: ")
        assert find(output, "preparing.json"), "nothing was removed"
        follow(message)
    assert refusal(output, expected) is None


def test_a_damaged_claim_is_refused_and_nothing_is_removed(copied, expected):
    for damage in (flip_a_bit, cut, change_a_digit):
        output = copied()
        damage(output / "preparing.json", random.Random(0))
        before = sorted(output.rglob("*"))
        message = refusal(output, expected)
        assert message.startswith(f"{output / 'preparing.json'}: is damaged or of another version (")
        assert message.endswith("; name another folder, or remove this one first")
        assert sorted(output.rglob("*")) == before


def test_records_of_two_units_are_not_taken_for_each_other(copied, expected):
    output = copied()
    one, other, *_ = find(output, "work/[0-9a-f]*.json")
    one_content, other_content = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_content)
    other.write_bytes(one_content)
    assert "does not match its hash" in refusal(output, expected)


def forget_plan(output: Path) -> None:
    """Go back to the moment after the search for duplicates."""
    for pattern in ("work/whole-*/*.json", "work/whole-*/*.npy", "*.tar"):
        for path in find(output, pattern):
            path.unlink()


def change_nothing(output: Path) -> None:
    pass


@pytest.mark.parametrize("damage", [flip_a_bit, cut])
@pytest.mark.parametrize(
    ("pattern", "go_back"),
    [
        ("work/*.tokens", change_nothing),
        ("work/*-000.npy", change_nothing),
        ("work/whole-*/*.dropped.npy", change_nothing),
        ("work/whole-*/*.occurrences.npy", change_nothing),
        ("work/*-000.npy", forget_plan),
        ("work/*.bands.npy", forget_plan),
        ("work/whole-*/links-*", forget_plan),
    ],
)
def test_a_damaged_file_that_a_record_describes_is_refused(copied, expected, pattern, go_back, damage):
    output = copied()
    go_back(output)
    path = find(output, pattern)[-1]
    damage(path, random.Random(1))
    if message := refusal(output, expected):
        assert message.startswith((f"{path}: ", f"{output / 'work'}: "))
        follow(message)
        assert refusal(output, expected) is None


def drop_all_documents(path: Path) -> None:
    """In a mask of dropped documents."""
    mask = np.load(path)
    np.save(path, np.ones_like(mask))


def make_documents_equal(path: Path) -> None:
    """In the sorted hashes of the bands of a spill."""
    bands = np.load(path)
    bands["hash"] = bands["hash"][:, :1]
    np.save(path, bands)


def link_other_documents(path: Path) -> None:
    """In a file of links, whose last bytes are its hash."""
    content = path.read_bytes()
    path.write_bytes(np.array([2, 1], "<u8").tobytes() + content[16:])


@pytest.mark.parametrize(
    ("pattern", "go_back", "damage"),
    [
        ("work/whole-*/*.dropped.npy", change_nothing, drop_all_documents),
        ("work/*.bands.npy", forget_plan, make_documents_equal),
        ("work/whole-*/links-*", forget_plan, link_other_documents),
    ],
)
def test_files_of_duplicates_that_would_drop_other_documents_are_refused(copied, expected, pattern, go_back, damage):
    output = copied()
    go_back(output)
    damage(find(output, pattern)[0])
    message = refusal(output, expected)
    assert message
    follow(message)
    assert refusal(output, expected) is None


def test_a_finished_shard_of_another_size_is_refused(copied, expected):
    output = copied()
    cut(output / "train-000000.tar", random.Random(0))
    message = refusal(output, expected)
    assert re.search(
        r"train-000000.tar: has \d+ bytes, not \d+ as when it was written; remove .*train-000000.json", message
    )
    follow(message)
    assert refusal(output, expected) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"documents": 1}, r"documents: 1 is given, but there is no such field"),
        ({"groups": None}, r"groups: None is not a list"),
        ({"counts": {"files": -1}}, r"counts.files: -1 is not a finite number at least 0"),
        ({"counts": {"files": 1.0}}, r"counts.files: 1.0 is of type float"),
        ({"counts": {"files": 10**30}}, r"counts.files: 10+ does not fit in 64 bits"),
    ],
)
def test_a_record_of_other_fields_types_or_ranges_is_refused_even_if_its_hash_fits(tmp_path, change, problem):
    path, content = tmp_path / "unit.json", dataclasses.asdict(UnitRecord([], [""], {}, "hash", [], {})) | change
    path.write_text(json.dumps({"sha256": work_files._hash(path, content), "content": content}))
    with pytest.raises(DamagedWork, match=rf"^{path}: {problem}; remove {path} and run the same command again$"):
        work_files.read_record(path, UnitRecord)
