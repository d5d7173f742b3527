"""A Hugging Face folder as files: JSON, safetensors in shards with their index, and its coming into being, whole or not at
all. Nothing here knows what a tensor means.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, dtype

from tandem.trainer.checkpoint import safetensors_writer
from tandem.trainer.checkpoint.hf.tensor_mapping import Read, Row, cut
from tandem.trainer.checkpoint.safetensors_writer import Spec
from tandem.trainer.config import UserError
from tandem.trainer.disk import sync_folder

SHARD_BYTES = 4_000_000_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = r"model-\d{5}-of-\d{5}\.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises: UserError where there is none.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; it must be a JSON file; add or correct it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}; must be a JSON object; correct it")
    return tree


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or is gone after an error, `out` being as it was.

    Raises: UserError where `out` cannot be replaced, before anything is written.
    """
    out = out.resolve()
    if os.path.ismount(out) or out == Path.cwd():
        what = "a mount point" if os.path.ismount(out) else "the current folder"
        raise UserError(f"{out}: is {what}; the output takes its place when it is complete; name a new folder")
    folder, old = (out.with_name(f".{out.name}.{os.getpid()}.{state}") for state in ("partial", "old"))
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rename(old)
        folder.rename(out)
        sync_folder(out.parent)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for rest in (folder, old):
            shutil.rmtree(rest, ignore_errors=True)


def write_weights(folder: Path, read: Read, rows: list[Row], dtypes: dict[str, dtype], shard_bytes: int) -> None:
    """The rows' tensors, read one at a time by our names and stored in the dtype of that name, lie in shards of at most
    `shard_bytes` with an index; one shard has none.
    """

    def specs(row: Row) -> dict[str, Spec]:
        return {piece.theirs: Spec(dtypes[row.ours], piece.shape) for piece in row.pieces}

    def num_bytes(row: Row) -> int:
        return sum(spec.num_bytes for spec in specs(row).values())

    def tensors(shard: list[Row]) -> Iterator[Tensor]:
        for row in shard:
            yield from _pieces(row, read(row.ours), dtypes[row.ours])

    shards = safetensors_writer.runs(rows, num_bytes, shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        held = {name: spec for row in shard for name, spec in specs(row).items()}
        safetensors_writer.write(folder / file, held, tensors(shard))
        places |= dict.fromkeys(held, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(map(num_bytes, rows))}, "weight_map": places})


def open_weights(folder: Path) -> dict[str, Any]:
    """Every tensor's name in the folder, with the open file that holds it.

    Raises: UserError where a file is missing or damaged, or does not hold what the index says.
    """
    if (folder / INDEX).is_file():
        wanted = read_json(folder / INDEX).get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values() or [None]):
            raise UserError(f"{folder / INDEX}: has no weight_map; it names the file of every tensor; copy it again")
    elif (folder / WEIGHTS).is_file():
        wanted = {}
    else:
        raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; weights are read from safetensors; add them")
    held: dict[str, Any] = {}
    for name in sorted(set(wanted.values())) if wanted else [WEIGHTS]:
        try:
            file = safe_open(folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: cannot be read: {error}; copy the file again") from None
        held |= dict.fromkeys(file.keys(), file)
    lost = [name for name in wanted if name not in held]
    if lost:
        raise UserError(
            f"{folder / INDEX}: {lost[0]} is not in {wanted[lost[0]]}; index and files differ; copy them again"
        )
    return held


def _remove_stale(out: Path) -> None:
    """What killed processes left beside `out` is gone; one with our own id is another's too: containers give ids again."""
    # Without its successor in place, an old folder is all that is left of an earlier output.
    states = "partial|old" if out.exists() else "partial"
    for path in out.parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(out.name)}\.(\d+)\.({states})", path.name)
        if found and (int(found[1]) == os.getpid() or not _runs(int(found[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it does, for somebody else
    return True


def _pieces(row: Row, ours: Tensor, dtype: dtype) -> Iterator[Tensor]:
    assert tuple(ours.shape) == row.shape, f"{row.ours}: {tuple(ours.shape)} is not {row.shape}"
    for piece in row.pieces:
        yield cut(row, piece, ours).to(dtype)
