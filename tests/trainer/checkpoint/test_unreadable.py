"""What exists but may not be read is never taken for absent: each path is named in one line."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem.trainer.__main__ import check_start
from tandem.trainer.checkpoint import layout
from tandem.trainer.checkpoint.layout import model_metadata, step_folder_name
from tandem.trainer.checkpoint.write import commit
from tandem.trainer.config import TrainConfig, UserError
from tests import tiny_configs
from tests.data_prep.corpus_writer import write_corpus

CAPABILITY_VERSION, DAC_OVERRIDE, DAC_READ_SEARCH = 0x20080522, 1, 2
"""Source: capabilities(7) and linux/capability.h."""


@contextmanager
def without_roots_rights() -> Iterator[None]:
    """In the block, permissions of files bind root as they bind every other user."""
    libc, header, sets = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0),
        (ctypes.c_uint32 * 6)(),
    )
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """In the block, nobody may read or enter the path."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with without_roots_rights():
            yield
    finally:
        path.chmod(mode)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints."""
    given = tiny_configs.make_config("btlm")
    for step in (2, 4):
        folder = tmp_path / "runs" / given.run.name / "checkpoints" / step_folder_name(step)
        folder.mkdir(parents=True)
        commit(folder, [], {"step": step, "tp_size": 1, "dp_size": 1, **model_metadata(given.model, given.mup)})
    return tmp_path / "runs" / given.run.name


def test_checkpoints_that_cannot_be_read_are_not_absent(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert len(layout.list_committed(checkpoints)) == 2
    for path, named in (
        (run, checkpoints),
        (checkpoints, checkpoints),
        (newest := checkpoints / "step-00000004", newest),
    ):
        with (
            locked(path),
            pytest.raises(UserError, match=rf"^{named}: cannot be read \(Permission denied\); correct its"),
        ):
            layout.list_committed(checkpoints)
    assert layout.list_committed(checkpoints / "none") == []


@pytest.mark.parametrize("file", [layout.MANIFEST_FILE, layout.COMMIT_MARKER, "rank-00000.safetensors"])
def test_a_checkpoint_that_may_not_be_read_is_not_a_damaged_one(run: Path, file: str) -> None:
    """A run would continue from the checkpoint before it, and reject the newest."""
    newest = run / "checkpoints/step-00000006"
    newest.mkdir()
    (newest / "rank-00000.safetensors").write_bytes(b"weights")
    given = tiny_configs.make_config("btlm")
    metadata = {"step": 6, "tp_size": 1, "dp_size": 1, **model_metadata(given.model, given.mup)}
    file_info = {"bytes": 7, "sha256": layout.file_sha256(newest / "rank-00000.safetensors")}
    commit(newest, [{"file": "rank-00000.safetensors", "file_info": file_info, "entries": []}], metadata)
    assert layout.find_newest(newest.parent) == newest
    with (
        locked(newest / file),
        pytest.raises(
            UserError, match=rf"^{newest / file}: cannot be read \(Permission denied\); correct its permissions"
        ),
    ):
        layout.find_damage(newest)
    assert layout.find_damage(newest) is None


@pytest.mark.parametrize(
    ("field", "choose"),
    [
        ("root", lambda root, run: root / "runs"),
        ("root", lambda root, run: run),
        ("root", lambda root, run: run / "checkpoints"),
        ("init_from", lambda root, run: root / "runs"),
        ("init_from", lambda root, run: run),
        ("init_from", lambda root, run: run / "checkpoints"),
        ("init_from", lambda root, run: run / "checkpoints" / "step-00000004"),
        ("sources", lambda root, run: root / "corpus"),
        ("sources", lambda root, run: root / "corpus" / "manifest.json"),
        ("sources", lambda root, run: root / "shards"),
    ],
)
def test_a_start_names_what_it_may_not_read(
    tmp_path: Path, run: Path, field: str, choose: Callable[[Path, Path], Path]
) -> None:
    corpus = tmp_path / "corpus"
    made = write_corpus(corpus, ["a text of some words"] * 40)
    (tmp_path / "shards").mkdir()
    for shard in made.shards:  # links, as in a folder that collects the shards of others
        os.rename(corpus / shard.file, tmp_path / "shards" / shard.file)
        (corpus / shard.file).symlink_to(tmp_path / "shards" / shard.file)
    init_from = {"init_from": str(run)} if field == "init_from" else {}
    root = str(run.parent if field == "root" else tmp_path / "other")
    config: TrainConfig = tiny_configs.make_config(
        "btlm", run={"root": root} | init_from, data={"sources": {"corpus": str(corpus)}}
    )
    path = choose(tmp_path, run)
    with locked(path), pytest.raises(UserError) as caught:
        check_start(config)
    assert "Permission denied" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
