"""Open the weight files of a Hugging Face folder: safetensors or PyTorch's pickles, in one file or in shards with an index.

No value is read before `StoredTensor.read`, and no code of the folder runs: a pickle may contain only tensors.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, WEIGHTS_FILE, read_json
from tandem.trainer.config import UserError, parse_content
from tandem.trainer.config.outside import check_regular_file, open_regular_file

PICKLE_FILE, PICKLE_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that can be read, as safetensors names them."""
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx")
WRAPPERS = r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|base_model|model)\.)*"
"""Prefixes that wrappers give to the names of all tensors: DistributedDataParallel, torch.compile, FSDP, PEFT, Lightning."""


@dataclass(frozen=True)
class StoredTensor:
    name: str
    path: Path
    """The file that contains it."""
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    storage: int
    """Tensors with the same number share memory in the file."""
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Return the values.  Raises: UserError if one of them is NaN, infinite or too large for fp32."""
        tensor = self.load()
        if tensor.numel() and tensor.is_floating_point():
            largest = max(abs(float(bound)) for bound in tensor.aminmax())  # both are NaN if any value is
            if not largest <= torch.finfo(torch.float32).max:
                problem = f"{self.name} contains {largest}, but weights must be finite numbers in fp32"
                raise UserError(f"{self.path}: {problem}; copy the file again, or choose other weights")
        return tensor


@dataclass(frozen=True)
class Index:
    weight_map: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)


def open_tensor_files(folder: Path) -> dict[str, StoredTensor]:
    """Open the folder's weight files. Return each tensor by its name in the files.

    If the folder has the weights both as safetensors and as pickles, a tensor's `load` checks that they are equal.
    Raises: UserError if there are no weights, a file is missing or damaged, or files contradict one another.
    """
    found = [
        tensors
        for single, index in ((WEIGHTS_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX_FILE))
        if (tensors := _open_format(folder, single, index)) is not None
    ]
    if not found:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
        problem = (
            f"has neither {WEIGHTS_FILE} nor {PICKLE_FILE} nor an index (found: {', '.join(others) or 'no weights'})"
        )
        raise UserError(
            f"{folder}: {problem}; weights are read only from such files; add them, or save the model with transformers"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: adapter_config.json says that an adapter changes these weights; merge it (merge_and_unload in PEFT) "
            "and save the model again"
        )
    if len(found) == 1:
        return found[0]
    safe, pickled = found
    if differing := next(
        (name for name in safe.keys() & pickled.keys() if safe[name].shape != pickled[name].shape), None
    ):
        raise _differ(differing, safe[differing], pickled[differing])
    both = {name: _comparing(name, safe[name], pickled[name]) for name in safe.keys() & pickled.keys()}
    return pickled | safe | both


def without_wrapper(
    folder: Path, tensors: dict[str, StoredTensor], embedding: str, base_prefix: str
) -> dict[str, StoredTensor]:
    """Return the tensors by the names that the model's class gives them, without prefixes that wrappers added to all names.

    The names of a model without head also lack `base_prefix`, which is added.
    Raises: UserError if only some tensors have a wrapper's prefix.
    """
    for own_prefix in ("", base_prefix):
        short = embedding.removeprefix(own_prefix)
        pattern = re.compile(WRAPPERS + re.escape(short))
        prefixes = [name.removesuffix(short) for name in tensors if pattern.fullmatch(name)]
        if embedding in tensors or not prefixes:
            continue
        prefix = min(prefixes, key=len)
        if other := next((name for name in tensors if not name.startswith(prefix)), None):
            raise UserError(
                f"{folder}: {prefix + short} has the prefix {prefix!r}, but {other} lacks it; save the model without its "
                "wrapper, for example model.module.state_dict()"
            )
        names = {name: name.removeprefix(prefix) for name in tensors}
        heads = {"lm_head.weight"} if own_prefix else set()
        return {("" if short in heads else own_prefix) + short: tensors[name] for name, short in names.items()}
    return tensors


def _open_format(folder: Path, single: str, index: str) -> dict[str, StoredTensor] | None:
    """Open the weights of one format. Return None if there are none."""
    open_file = _open_safetensors if single == WEIGHTS_FILE else _open_pickle
    if not (folder / index).is_file():
        return open_file(folder / single) if (folder / single).exists() else None
    weight_map, metadata = _read_index(folder / index)
    files = sorted(set(weight_map.values()))
    stem, suffix = single.split(".")
    shards = {path.name for path in folder.glob(f"{stem}-*-of-*.{suffix}")} | {
        name for name in (single,) if (folder / name).exists()
    }
    if unlisted := next(iter(sorted(shards - set(files))), None):
        raise UserError(
            f"{folder}: contains {unlisted}, but {index} lists no tensor in it; remove the one that is not the model's"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        for tensor, stored in open_file(folder / name).items():
            if tensor in tensors:
                problem = f"{tensor} is in {tensors[tensor].path.name} and in {name}"
                raise UserError(
                    f"{folder}: {problem}; remove the file that is not the model's, or copy the folder again"
                )
            if weight_map.get(tensor) != name:
                listed = f"lists it in {weight_map[tensor]}" if tensor in weight_map else "does not list it"
                raise UserError(
                    f"{folder / name}: contains {tensor}, but {index} {listed}; copy the index and the files again"
                )
            tensors[tensor] = stored
    if missing := next((name for name in weight_map if name not in tensors), None):
        found = f"lists {missing} in {weight_map[missing]}, but that file does not contain it"
        raise UserError(f"{folder / index}: {found}; copy the index and the files again")
    _check_total_size(folder / index, metadata.get("total_size"), tensors)
    return tensors


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    problem = f"{path}: has no weight_map that names the file of every tensor; copy it again"
    tree = read_json(path)
    if not isinstance(tree.get("weight_map"), dict) or not tree["weight_map"]:
        raise UserError(problem)
    index = parse_content(Index, tree, path, "copy it again")
    for name in index.weight_map.values():
        if Path(name).name != name:
            raise UserError(
                f"{path}: {name!r} is not the name of a file in this folder; copy the index and the files again"
            )
    return index.weight_map, index.metadata


def _check_total_size(path: Path, total: Any, tensors: dict[str, StoredTensor]) -> None:
    """Raises: UserError if the index states another size than the files have. Tensors that share memory may count once."""
    every = sum(stored.num_bytes for stored in tensors.values())
    once = sum({(stored.path, stored.storage): stored.num_bytes for stored in tensors.values()}.values())
    if isinstance(total, int | float) and total not in (every, once):
        raise UserError(
            f"{path}: total_size is {total:,}, but the tensors in the files have {every:,} bytes; copy the files again, or "
            "correct total_size if they are complete"
        )


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        check_regular_file(path)
        file = safe_open(path, framework="pt")
        tensors = {}
        for number, name in enumerate(file.keys()):
            view = file.get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            bits = re.search(r"\d+", dtype)  # none in BOOL
            num_bytes = math.prod(shape) * int(bits[0] if bits else 8) // 8
            tensors[name] = StoredTensor(name, path, shape, dtype, num_bytes, number, partial(file.get_tensor, name))
        return tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file again") from None


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    """Map a file of `torch.save` into memory. `weights_only` builds tensors and containers, and calls nothing else."""
    try:
        with open_regular_file(path) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if not is_zip:
            raise UserError(
                f"{path}: is not an archive of torch.save as since PyTorch 1.6; if you trust it, load it with torch.load and "
                "save the weights again, as safetensors or with torch.save"
            )
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # the content decides what a pickle raises
        raise UserError(f"{path}: {_pickle_problem(error)}") from None
    if not isinstance(state, dict):
        raise UserError(
            f"{path}: contains a {type(state).__name__} instead of tensors by name; save model.state_dict()"
        )
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            problem = f"{str(name)[:60]!r} is a {type(value).__name__} instead of a tensor"
            raise UserError(f"{path}: {problem}; save only model.state_dict()")
        num_bytes = value.numel() * value.element_size()
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu" or value.is_complex():
            raise UserError(f"{path}: {name} is not a plain tensor in memory; save the model's plain weights")
        if num_bytes > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} has more values than the file stores for it; copy the file again")
        dtype = _DTYPE_NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        storage = value.untyped_storage().data_ptr()
        tensors[name] = StoredTensor(name, path, tuple(value.shape), dtype, num_bytes, storage, value.detach)
    return tensors


def _pickle_problem(error: Exception) -> str:
    """Describe in one line why `torch.load` refused a file."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"needs {found[1]}, but may contain only tensors, and no code from a file is run; choose a folder of safetensors"
    return f"cannot be read ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}); copy the file again"


def _comparing(name: str, first: StoredTensor, second: StoredTensor) -> StoredTensor:
    """Return the first tensor, whose `load` also checks that the second one is equal."""

    def load() -> Tensor:
        tensor = first.load()
        if not torch.equal(tensor.nan_to_num(), second.load().nan_to_num()):
            raise _differ(name, first, second)
        return tensor

    return replace(first, load=load)


def _differ(name: str, first: StoredTensor, second: StoredTensor) -> UserError:
    problem = f"{name} differs between {first.path.name} and {second.path.name}"
    return UserError(f"{first.path.parent}: {problem}; remove the file that is not the model's")
