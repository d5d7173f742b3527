"""`tandem checkpoint` reports the right facts for checkpoints of any layout, and names each kind of damage."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tandem.trainer import train
from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.layout import (
    COMMIT_MARKER,
    MANIFEST_FILE,
    STATE_KINDS,
    file_sha256,
    fragment_key,
    read_manifest,
)
from tandem.trainer.checkpoint.read import Checkpoint
from tandem.trainer.config import TrainConfig, parse_dataclass
from tandem.trainer.tools import checkpoints
from tandem.trainer.tools.checkpoints import compare
from tests import ranks
from tests.promises.conftest import fork_tandem, two_phase_config, wait_for_exit
from tests.promises.test_resume import reload_and_save

pytestmark = [pytest.mark.dist]
STEPS = (4, 8, 12)


def tree(corpus: Path, root: Path, name: str, **sections: dict) -> dict:
    return two_phase_config(
        "btlm", corpus, root, run={"name": name}, checkpoint={"every_steps": 4, "keep_last": 0}, **sections
    )


def config(tree: dict) -> TrainConfig:
    found: TrainConfig = parse_dataclass(TrainConfig, tree, "")
    return found


def train_and_recut(moved: TrainConfig, source: Path, target: Path) -> int:
    """Train at this world's layout, and save the state at `source` again at that layout without a step."""
    reload_and_save(moved, source, target)
    return train.run(moved)


@pytest.fixture(scope="module")
def root(tmp_path_factory, corpus) -> Path:
    """Run folders `one` and `again`, the same run twice, `halves`, the same at tp 2; `imported`, the weights of `one`; and
    `recut`, the state of `one` at step 8 as two tensor-parallel ranks save it.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "one.yaml").write_text(yaml.safe_dump(tree(corpus, folder, "one")))
    again = ["run.name=again", "checkpoint.every_steps=0"]
    commands = [["train", folder / "one.yaml"], ["train", folder / "one.yaml", *again]]
    commands += [["export-hf", folder / "one", folder / "exported", "--dtype", "fp32"]]
    commands += [["import-hf", folder / "exported", folder / "imported"]]
    assert wait_for_exit(fork_tandem(*commands)) == 0
    halves = config(tree(corpus, folder, "halves", parallel={"tp_size": 2}))
    source = saved(folder / "one", 8)
    assert ranks.run(train_and_recut, 2, folder, halves, source, folder / "recut") == [0, 0]
    facts = read_manifest(source)
    recommit(folder / "recut" / source.name, **{name: facts[name] for name in compare.COMPARED_KEYS if name in facts})
    return folder


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """A copy of the run folder `one` that a test can damage."""
    shutil.copytree(root / "one" / "checkpoints", tmp_path / "copy" / "checkpoints")
    return tmp_path / "copy"


def saved(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def data_file(folder: Path) -> Path:
    return folder / sorted(read_manifest(folder)["files"])[0]


def recommit(folder: Path, **facts: object) -> None:
    """Commit the folder again with its current files and these facts."""
    manifest = read_manifest(folder) | facts
    for file in manifest["files"]:
        described = {"bytes": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
        manifest["files"][file] |= described
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    (folder / COMMIT_MARKER).write_text(file_sha256(folder / MANIFEST_FILE) + "\n")


def put(folder: Path, kind: str, values: dict[int, float | bytes]) -> str:
    """Set elements of a tensor to values, or bits. Return the name of the tensor."""
    fragments = [each for each in read_manifest(folder)["fragments"] if each["numel"] > max(values)]
    fragment = fragments[len(fragments) // 2]
    path = folder / fragment["file"]
    tensors = load_file(path)
    flat = tensors[fragment_key(kind, fragment["name"], fragment["start"])]
    for index, value in values.items():
        bits = value if isinstance(value, bytes) else struct.pack("<f", value)
        flat.view(torch.int32)[index] = struct.unpack("<i", bits)[0]
    save_file(tensors, path)
    recommit(folder)
    name: str = fragment["name"]
    return name


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    """Run a command with and without --json. Check that the exit codes are equal. Return the code and the JSON."""
    command = ["checkpoint", *map(str, arguments)]
    code = main(command)
    capsys.readouterr()
    assert main([*command, "--json"]) == code
    return code, json.loads(capsys.readouterr().out)


def words(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["checkpoint", *map(str, arguments)])
    return capsys.readouterr().out


def test_ls_lists_what_was_saved_oldest_first(root, capsys):
    code, said = asked(capsys, "ls", root / "one")
    rows = said["checkpoints"]
    assert code == 0
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["tokens"] for row in rows] == [1024, 2048, 3072]
    assert [row["time"] for row in rows] == [
        (saved(root / "one", step) / COMMIT_MARKER).stat().st_mtime for step in STEPS
    ]
    sizes = [sum(file.stat().st_size for file in saved(root / "one", step).iterdir()) for step in STEPS]
    assert [row["bytes"] for row in rows] == sizes
    assert said["total_bytes"] == sum(sizes)
    assert {row["state"] for row in rows} == {"committed"}
    assert said["free_bytes"] == pytest.approx(os.statvfs(root).f_bavail * os.statvfs(root).f_frsize, rel=0.01)
    last = words(capsys, "ls", root / "one" / "checkpoints").splitlines()
    assert len(last) == 1 + 3 + 1
    assert last[1].split()[:2] == ["4", "1,024"]
    assert last[-1].startswith("3 committed: ")
    assert "free on this file system: " in last[-1]


def test_ls_says_which_ranks_wrote_it_and_knows_imports(root, capsys):
    [row] = asked(capsys, "ls", root / "recut")[1]["checkpoints"]
    assert (row["tp_size"], row["dp_size"]) == (2, 1)
    assert "2 x 1" in words(capsys, "ls", root / "recut")
    [row] = asked(capsys, "ls", root / "imported")[1]["checkpoints"]
    assert (row["step"], row["tokens"], row["state"]) == (0, None, "committed")


def test_ls_tells_torn_from_damaged_and_counts_them(copy, capsys):
    short, changed, torn = (saved(copy, step) for step in STEPS)
    file, size_bytes = data_file(torn).name, data_file(torn).stat().st_size
    os.truncate(short / file, size_bytes - 1)
    (changed / MANIFEST_FILE).write_text("{")
    (torn / COMMIT_MARKER).unlink()
    (torn / MANIFEST_FILE).unlink()
    rows = asked(capsys, "ls", copy)[1]["checkpoints"]
    assert [row["state"] for row in rows] == ["damaged", "damaged", "torn"]
    assert [row["damage"] for row in rows] == [
        f"{file} is missing or has another size", "manifest.json is not the one that was committed", None,
    ]  # fmt: skip
    assert rows[2]["bytes"] == size_bytes
    lines = words(capsys, "ls", copy).splitlines()
    assert "damaged: manifest.json is not" in lines[2]
    assert "torn: not committed" in lines[3]
    assert lines[-1].startswith("2 committed and 1 torn: ")


def test_ls_never_imports_torch(root):
    program = "import sys; from tandem.trainer.__main__ import main; code = main(sys.argv[1:]); "
    program += "print(code, sorted({'torch', 'numpy', 'safetensors', 'deepspeed'} & set(sys.modules)))"
    command = [sys.executable, "-c", program, "checkpoint", "ls", root / "one"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines()[-1] == "0 []", f"{done.stdout} {done.stderr} {time.monotonic() - began}"


def test_verify_finds_every_file_whole(root, capsys):
    code, said = asked(capsys, "verify", root / "one")
    assert code == 0
    assert [(each["step"], each["state"], each["damage"]) for each in said["checkpoints"]] == [
        (step, "whole", []) for step in STEPS
    ]
    assert all(each["files"] == 1 for each in said["checkpoints"])
    assert asked(capsys, "verify", root / "recut")[1]["checkpoints"][0]["files"] == 2


def test_verify_names_a_flipped_bit_a_short_file_and_a_changed_manifest(copy, capsys):
    flipped, short, changed = (saved(copy, step) for step in STEPS)
    data = bytearray(data_file(flipped).read_bytes())
    data[-1] ^= 1
    data_file(flipped).write_bytes(data)
    os.truncate(data_file(short), data_file(short).stat().st_size - 1)
    (changed / MANIFEST_FILE).write_text((changed / MANIFEST_FILE).read_text() + " ")
    code, said = asked(capsys, "verify", copy)
    assert code == 1
    file = data_file(flipped).name
    assert [each["damage"] for each in said["checkpoints"]] == [
        [f"{file} has changed since it was saved"],
        [f"{file} is missing or has another size"],
        ["manifest.json is not the one that was committed"],
    ]
    lines = words(capsys, "verify", copy).splitlines()
    assert lines[0] == f"{flipped}: damaged: {file} has changed since it was saved"


def test_verify_names_all_the_files_with_other_contents(root, tmp_path, capsys):
    folder = tmp_path / "recut"
    shutil.copytree(root / "recut", folder)
    [checkpoint] = folder.iterdir()
    for path in checkpoint.glob("rank-*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    assert len(asked(capsys, "verify", checkpoint)[1]["checkpoints"][0]["damage"]) == 2


def test_verify_passes_over_a_torn_checkpoint_and_takes_the_one_that_is_asked_for(copy, capsys):
    (saved(copy, 12) / COMMIT_MARKER).unlink()
    os.truncate(data_file(saved(copy, 4)), 100)
    assert [each["step"] for each in asked(capsys, "verify", copy)[1]["checkpoints"]] == [4, 8]
    code, said = asked(capsys, "verify", copy, "--step", 8)
    assert (code, [each["step"] for each in said["checkpoints"]]) == (0, [8])
    code, said = asked(capsys, "verify", saved(copy, 4))
    assert (code, [each["step"] for each in said["checkpoints"]]) == (1, [4])


def test_a_file_that_the_disk_does_not_give_is_damage(copy, capsys):
    folder = saved(copy, 8)
    file, manifest = folder / "rank-00009.safetensors", read_manifest(folder)
    file.symlink_to("/proc/self/mem")  # nothing is at its beginning: an error of input and output
    manifest["files"][file.name] = {"bytes": 0, "sha256": "0" * 64}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    (folder / COMMIT_MARKER).write_text(file_sha256(folder / MANIFEST_FILE))
    code, said = asked(capsys, "verify", folder)
    assert code == 1
    assert said["checkpoints"][0]["damage"] == [f"{file.name} cannot be read (Input/output error)"]


def test_what_the_run_removes_meanwhile_is_no_damage(copy):
    listed = checkpoints.find_checkpoints(copy)
    (listed[0] / COMMIT_MARKER).unlink()
    data_file(listed[0]).unlink()
    shutil.rmtree(listed[1])
    rows = [checkpoints.describe_checkpoint(folder) for folder in listed]
    assert [row and row["state"] for row in rows] == ["torn", None, "committed"]
    verdicts = [checkpoints.verify_checkpoint(folder, lambda num_bytes: None) for folder in listed]
    assert [verdict["state"] for verdict in verdicts] == ["removed", "removed", "whole"]
    assert [verdict["damage"] for verdict in verdicts] == [[], [], []]


def test_the_same_run_twice_saves_the_same(root, capsys):
    code, said = asked(capsys, "diff", root / "one", root / "again")
    assert code == 0
    assert said["same"]
    elements = sum(
        Checkpoint(saved(root / "one", 12)).read_weight(name).numel()
        for name in Checkpoint(saved(root / "one", 12)).parameter_names
    )
    assert [said["kinds"][kind]["elements"] for kind in STATE_KINDS] == [elements] * 3
    assert [said["kinds"][kind]["largest_difference"] for kind in STATE_KINDS] == [0] * 3
    assert words(capsys, "diff", root / "one", root / "again").splitlines()[-1] == "same facts and bits"


def test_ranks_do_not_show_in_what_they_save(root, capsys):
    code, said = asked(capsys, "diff", f"{root / 'one'}@8", root / "recut")
    assert code == 0
    assert [said[side]["tp_size"] for side in "ab"] == [1, 2]
    assert said["facts"] == []


def test_another_layout_differs_by_rounding_only_and_where_is_said(root, capsys):
    code, said = asked(capsys, "diff", root / "one", root / "halves")
    one, other = Checkpoint(saved(root / "one", 12)), Checkpoint(saved(root / "halves", 12))
    assert code == 1
    assert said["facts"] == []
    for kind in STATE_KINDS:
        apart = {
            name: one.read_tensor(kind, name).double() - other.read_tensor(kind, name).double()
            for name in one.parameter_names
        }
        largest = {name: float(each.abs().max()) for name, each in apart.items()}
        found = said["kinds"][kind]
        assert found["elements_differing"] == sum(int((each != 0).sum()) for each in apart.values())
        assert sorted(found["differing"]) == sorted(name for name in largest if largest[name])
        assert found["tensors_differing"] == len(found["differing"])
        assert found["largest_difference"] == max(largest.values()) == largest[found["largest_in"]]
    assert f"in {said['kinds']['master']['largest_in']}\n" in words(capsys, "diff", root / "one", root / "halves")


def test_a_changed_element_of_a_moment_is_found(root, copy, capsys):
    name = put(saved(copy, 8), "exp_avg_sq", {3: 0.5})
    code, said = asked(capsys, "diff", f"{copy}@8", f"{root / 'one'}@8")
    was = float(Checkpoint(saved(root / "one", 8)).read_tensor("exp_avg_sq", name).flatten()[3])
    assert code == 1
    assert said["facts"] == []
    assert [said["kinds"][kind]["tensors_differing"] for kind in STATE_KINDS] == [0, 0, 1]
    found = said["kinds"]["exp_avg_sq"]
    assert (found["elements_differing"], found["largest_in"], found["differing"]) == (1, name, [name])
    assert found["largest_difference"] == 0.5 - was


def test_what_counts_are_bits(copy, tmp_path, capsys):
    one, other = saved(copy, 8), tmp_path / "other" / "step-00000008"
    shutil.copytree(one, other)
    quiet, payload = struct.pack("<I", 0x7FC00000), struct.pack("<I", 0x7FC00001)
    largest = 3.4028234663852886e38
    put(one, "master", {0: quiet, 1: 0.0})
    put(other, "master", {0: quiet, 1: 0.0})
    assert asked(capsys, "diff", one, other.parent)[0] == 0, "the same NaN is no difference"
    put(other, "master", {1: -0.0})
    kind = asked(capsys, "diff", one, other)[1]["kinds"]["master"]
    assert (kind["elements_differing"], kind["largest_difference"]) == (1, 0), (
        "nor apart is the other zero, but it differs"
    )
    put(one, "master", {1: largest})
    put(other, "master", {1: -largest})
    assert asked(capsys, "diff", one, other)[1]["kinds"]["master"]["largest_difference"] == 2 * largest
    name = put(other, "master", {0: payload})
    kind = asked(capsys, "diff", one, other)[1]["kinds"]["master"]
    assert (kind["elements_differing"], kind["largest_difference"], kind["largest_in"]) == (2, None, name)
    assert f"2 of {kind['elements']:,}  not finite in {name}" in words(capsys, "diff", one, other)


def test_elements_are_compared_a_part_at_a_time_and_none_is_left_out(generator, monkeypatch):
    monkeypatch.setattr(compare, "COMPARE_CHUNK_ELEMENTS", 64)
    one = torch.randn((37, 10), generator=generator)
    assert compare.compare_elements(one, one.clone()) == (0, 0.0)
    for row in range(37):
        other = one.clone()
        other[row, row % 10] += 1 + row
        count, largest = compare.compare_elements(one, other)
        assert (count, largest) == (1, float((one.double() - other.double()).abs().max())), row
    wide = torch.randn((4, 200), generator=generator).T  # not as it lies in memory, as a share of a tensor may be
    assert compare.compare_elements(wide, wide + 1)[0] == wide.numel()
    assert compare.compare_elements(torch.zeros(3), torch.tensor([0, math.inf, 0])) == (1, math.inf)
    assert compare.compare_elements(torch.zeros(3), -torch.zeros(3)) == (3, 0.0)


def test_the_first_field_of_each_fact_that_differs_is_named(root, copy, capsys):
    folder = saved(copy, 8)
    manifest = read_manifest(folder)
    phases = [manifest["phases"][0], manifest["phases"][1] | {"global_batch_size": 4, "seq_len": 64}]
    changes = {"cursor": {"corpus": 7}, "model": manifest["model"] | {"num_layers": 3}, "mup": None, "phases": phases}
    recommit(folder, **changes, tp_size=1, num_ledger_lines=99)
    code, said = asked(capsys, "diff", f"{root / 'one'}@8", folder)
    assert code == 1
    was = read_manifest(saved(root / "one", 8))
    assert said["facts"] == [
        f"cursor.corpus: {was['cursor']['corpus']} | 7",
        "model.num_layers: 2 | 3",
        f"mup: {json.dumps(was['mup'])} | null",
        "phases[1].seq_len: 128 | 64",
    ]
    lines = words(capsys, "diff", f"{root / 'one'}@8", folder).splitlines()
    assert "model.num_layers: 2 | 3" in lines
    assert lines[-1] == "different"
    facts = asked(capsys, "diff", f"{root / 'one'}@4", folder)[1]["facts"]
    assert facts[:3] == ["step: 4 | 8", "num_updates: 4 | 8", "tokens: 1024 | 2048"]


def test_an_import_differs_by_what_only_a_run_has_and_not_in_its_weights(root, capsys):
    code, said = asked(capsys, "diff", root / "one", root / "imported")
    assert code == 1
    assert said["kinds"]["master"]["tensors_differing"] == 0
    assert said["kinds"]["exp_avg"] == said["kinds"]["exp_avg_sq"] == {"only_in": "a"}
    assert "cursor: only in A" in said["facts"]
    assert "cursor: only in B" in asked(capsys, "diff", root / "imported", root / "one")[1]["facts"]
    assert "only in A" in words(capsys, "diff", root / "one", root / "imported")


def test_other_shapes_and_names_are_a_difference_and_no_crash(root, tmp_path, corpus, capsys):
    """Save a model of another width and depth before its first step."""
    wider = two_phase_config(
        "btlm", corpus, tmp_path, steps=2, run={"name": "wider"}, model={"ffn_hidden_size": 180, "num_layers": 1}
    )
    (tmp_path / "wider.yaml").write_text(yaml.safe_dump(wider))
    assert wait_for_exit(fork_tandem(["train", tmp_path / "wider.yaml", "run.stop_step=1"])) == 0
    code, said = asked(capsys, "diff", root / "one", tmp_path / "wider")
    assert code == 1
    one, other = Checkpoint(saved(root / "one", 12)), Checkpoint(saved(tmp_path / "wider", 1))
    assert said["only_in_a"] == [name for name in one.parameter_names if name not in other.parameter_names] != []
    assert said["only_in_b"] == []
    shapes = {name: [list(each.read_weight(name).shape) for each in (one, other)] for name in other.parameter_names}
    assert (
        said["kinds"]["master"]["other_shape"]
        == {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
        != {}
    )
    masters = said["kinds"]["master"]
    assert masters["tensors_equal"] + masters["tensors_differing"] == len(other.parameter_names)
    text = words(capsys, "diff", tmp_path / "wider", root / "one")
    assert f"only in B: {said['only_in_a'][0]}\n" in text
    assert "other shape: " in text


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("ls {root}/none", ["{root}/none: no such folder"]),
        ("ls {root}/exported", ["{root}/exported: has no checkpoint", "folder of a run"]),
        ("verify {root}/exported", ["{root}/exported: has no checkpoint", "folder of a run"]),
        ("verify {torn}", ["{torn}: has no committed checkpoint", "import folder"]),
        (
            "verify {root}/one --step 5",
            ["--step: {root}/one has no checkpoint of step 5; name a step that has one: 4, 8, 12"],
        ),
        ("diff {root}/one {root}/none", ["{root}/none: no such folder"]),
        (
            "diff {root}/one@5 {root}/one",
            ["{root}/one@5: {root}/one has no checkpoint of step 5; name a step that has one: 4, 8, 12"],
        ),
        ("diff {root}/one@last {root}/one", ["{root}/one@last: no such folder"]),
        ("diff {root}/one {torn}", ["{torn}: has no committed checkpoint"]),
        ("diff {root}/one {flipped}", ["{flipped}: is damaged", "has changed", "name another checkpoint"]),
        ("diff {root}/one", ["checkpoint diff: ", "B", "--help"]),
        ("show {root}/one", ["checkpoint: ", "'show'", "verify", "--help"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(root, copy, capsys, command, says):
    torn, flipped = saved(copy, 12), saved(copy, 8)
    (torn / COMMIT_MARKER).unlink()
    shutil.move(torn, torn := copy / "torn" / torn.name)
    with data_file(flipped).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    places = {"root": root, "torn": torn, "flipped": flipped}
    assert main(["checkpoint", *command.format(**places).split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    assert [part for part in says if part.format(**places) not in line] == [], line
