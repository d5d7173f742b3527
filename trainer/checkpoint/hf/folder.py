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
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorMapping, TensorReader, to_hf_tensor
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec
from tandem.trainer.config import UserError
from tandem.trainer.disk import sync_folder

DEFAULT_SHARD_BYTES = 4_000_000_000
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_FILE_PATTERN = r"model-\d{5}-of-\d{5}\.safetensors"


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
def atomic_folder(target_folder: Path) -> Iterator[Path]:
    """A folder beside `target_folder` that takes its place at the end, or is gone after an error, `target_folder` being as
    it was.

    Raises: UserError where `target_folder` cannot be replaced, before anything is written.
    """
    target_folder = target_folder.resolve()
    if os.path.ismount(target_folder) or target_folder == Path.cwd():
        what = "a mount point" if os.path.ismount(target_folder) else "the current folder"
        raise UserError(
            f"{target_folder}: is {what}; the output takes its place when it is complete; name a new folder"
        )
    folder, old = (
        target_folder.with_name(f".{target_folder.name}.{os.getpid()}.{state}") for state in ("partial", "old")
    )
    target_folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target_folder)
    folder.mkdir()
    try:
        yield folder
        if target_folder.exists():
            target_folder.rename(old)
        folder.rename(target_folder)
        sync_folder(target_folder.parent)
    finally:
        if old.exists() and not target_folder.exists():
            old.rename(target_folder)
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_weights(
    folder: Path, read_tensor: TensorReader, mappings: list[TensorMapping], dtypes: dict[str, dtype], shard_bytes: int
) -> None:
    """The rows' tensors, read one at a time by our names and stored in the dtype of that name, lie in shards of at most
    `shard_bytes` with an index; one shard has none.
    """

    def specs(row: TensorMapping) -> dict[str, TensorSpec]:
        return {piece.hf_name: TensorSpec(dtypes[row.name], piece.shape) for piece in row.hf_tensors}

    def num_bytes(row: TensorMapping) -> int:
        return sum(spec.num_bytes for spec in specs(row).values())

    def tensors(shard: list[TensorMapping]) -> Iterator[Tensor]:
        for row in shard:
            yield from _to_hf_tensors(row, read_tensor(row.name), dtypes[row.name])

    shards = safetensors_writer.group_by_bytes(mappings, num_bytes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS_FILE
        file_specs = {name: spec for row in shard for name, spec in specs(row).items()}
        safetensors_writer.write_safetensors(folder / file, file_specs, tensors(shard))
        weight_map |= dict.fromkeys(file_specs, file)
    if len(shards) > 1:
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": sum(map(num_bytes, mappings))}, "weight_map": weight_map}
        )


def open_tensor_files(folder: Path) -> dict[str, Any]:
    """Every tensor's name in the folder, with the open file that holds it.

    Raises: UserError where a file is missing or damaged, or does not hold what the index says.
    """
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values() or [None]):
            raise UserError(
                f"{folder / INDEX_FILE}: has no weight_map; it names the file of every tensor; copy it again"
            )
    elif (folder / WEIGHTS_FILE).is_file():
        weight_map = {}
    else:
        raise UserError(
            f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}; weights are read from safetensors; add them"
        )
    files_by_tensor: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())) if weight_map else [WEIGHTS_FILE]:
        try:
            file = safe_open(folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: cannot be read: {error}; copy the file again") from None
        files_by_tensor |= dict.fromkeys(file.keys(), file)
    missing_names = [name for name in weight_map if name not in files_by_tensor]
    if missing_names:
        raise UserError(
            f"{folder / INDEX_FILE}: {missing_names[0]} is not in {weight_map[missing_names[0]]}; index and "
            f"files differ; copy them again"
        )
    return files_by_tensor


def _remove_stale(target_folder: Path) -> None:
    """What killed processes left beside `target_folder` is gone; one with our own id is another's too: containers give ids
    again.
    """
    # Without its successor in place, an old folder is all that is left of an earlier output.
    states = "partial|old" if target_folder.exists() else "partial"
    for path in target_folder.parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(target_folder.name)}\.(\d+)\.({states})", path.name)
        if found and (int(found[1]) == os.getpid() or not _is_running(int(found[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it does, for somebody else
    return True


def _to_hf_tensors(mapping: TensorMapping, tensor: Tensor, dtype: dtype) -> Iterator[Tensor]:
    assert tuple(tensor.shape) == mapping.shape, f"{mapping.name}: {tuple(tensor.shape)} is not {mapping.shape}"
    for piece in mapping.hf_tensors:
        yield to_hf_tensor(mapping, piece, tensor).to(dtype)
