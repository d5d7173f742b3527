"""Compare two checkpoints: facts, names, and every bit of every tensor. Only one tensor of each is in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tandem.trainer.checkpoint.layout import STATE_KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.trainer.checkpoint.read import Checkpoint

COMPARED_KEYS = (
    "step", "num_updates", "tokens", "cursor", "model", "mup", "fingerprints", "eos_token", "shuffle_settings",
    "skipped_shards", "phases",
)  # fmt: skip
"""Facts in the manifest that are compared. The layout of the ranks that wrote it, and the number of starts, are not."""
COMPARE_CHUNK_ELEMENTS = 1 << 22
"""Elements compared at a time. Differences in fp64 of whole tensors would need twice the memory of the tensors."""
ABSENT = object()
"""Placeholder for a fact that is not in the manifest, because null is a fact."""

ProgressCallback = Callable[[int], None]


def compare_checkpoints(one: Checkpoint, other: Checkpoint, advance: ProgressCallback) -> dict[str, Any]:
    """Return the differences of two checkpoints by fact, name and kind of state. `same` is True if there are none."""
    values = {fact: [side.manifest.get(fact, ABSENT) for side in (one, other)] for fact in COMPARED_KEYS}
    different = list(filter(None, (first_difference(fact, *pair) for fact, pair in values.items())))
    names, other_names = dict.fromkeys(one.parameter_names), dict.fromkeys(other.parameter_names)
    one_sided_names = {
        "only_in_a": [name for name in names if name not in other_names],
        "only_in_b": [name for name in other_names if name not in names],
    }
    shared = [name for name in names if name in other_names]
    kinds: dict[str, dict[str, Any]] = {}
    for kind in STATE_KINDS:
        saved_by = [side for side, checkpoint in (("a", one), ("b", other)) if checkpoint.has_state(kind)]
        if len(saved_by) == 2:
            kinds[kind] = _compare_kind(kind, shared, one, other, advance)
        elif saved_by:
            kinds[kind] = {"only_in": saved_by[0]}
    kinds_differ = any("only_in" in kind or kind["tensors_differing"] for kind in kinds.values())
    same = not different and not any(one_sided_names.values()) and not kinds_differ
    a, b = (
        {"folder": str(each.folder), "step": each.step} | {name: each.manifest[name] for name in ("tp_size", "dp_size")}
        for each in (one, other)
    )
    return {"same": same, "a": a, "b": b, "facts": different, **one_sided_names, "kinds": kinds}


def first_difference(key_path: str, one: Any, other: Any) -> str | None:
    """Describe the first field below `key_path` that differs, with both values, or return None."""
    if one is ABSENT or other is ABSENT:
        return None if one is other else f"{key_path}: only in {'A' if other is ABSENT else 'B'}"
    pairs: Iterator[str | None]
    if isinstance(one, dict) and isinstance(other, dict):
        both = {name: (one.get(name, ABSENT), other.get(name, ABSENT)) for name in one | other}
        pairs = (first_difference(f"{key_path}.{name}", *pair) for name, pair in both.items())
    elif isinstance(one, list) and isinstance(other, list):
        numbered = enumerate(zip_longest(one, other, fillvalue=ABSENT))
        pairs = (first_difference(f"{key_path}[{index}]", *pair) for index, pair in numbered)
    else:
        return None if one == other else f"{key_path}: {json.dumps(one)} | {json.dumps(other)}"
    return next(filter(None, pairs), None)


def compare_elements(one: Tensor, other: Tensor) -> tuple[int, float]:
    """Return how many elements of two fp32 tensors differ in any bit, and the largest difference.

    The difference is infinite if an element is NaN or infinite, and zero if only the sign of a zero differs.
    """
    import torch

    bits = torch.int32
    if torch.equal(one.view(bits), other.view(bits)):
        return 0, 0.0
    count, largest = 0, 0.0
    rows = max(1, COMPARE_CHUNK_ELEMENTS // max(1, math.prod(one.shape[1:])))
    for one_chunk, other_chunk in zip(one.split(rows), other.split(rows), strict=True):
        differ = one_chunk.view(bits) != other_chunk.view(bits)
        distances = (one_chunk[differ].double() - other_chunk[differ].double()).abs()
        distances = distances.nan_to_num(nan=math.inf, posinf=math.inf)
        count += distances.numel()
        largest = max(largest, float(distances.max()) if distances.numel() else 0.0)
    return count, largest


def _compare_kind(
    kind: str, names: list[str], checkpoint: Checkpoint, other_checkpoint: Checkpoint, advance: ProgressCallback
) -> dict[str, Any]:
    different, shapes, largest_in = [], {}, None
    num_elements, num_differing_elements, largest_difference = 0, 0, 0.0
    for name in names:
        one, other = checkpoint.read_tensor(kind, name), other_checkpoint.read_tensor(kind, name)
        advance(one.nbytes)
        if one.shape != other.shape:
            shapes[name] = [list(one.shape), list(other.shape)]
            continue
        num_elements += one.numel()
        num_differing, max_difference = compare_elements(one, other)
        num_differing_elements += num_differing
        if num_differing:
            different.append(name)
        if num_differing and (largest_in is None or max_difference > largest_difference):
            largest_difference, largest_in = max_difference, name
        del one, other  # free them before the next two are read
    return {
        "tensors_equal": len(names) - len(different) - len(shapes), "tensors_differing": len(different) + len(shapes),
        "elements": num_elements, "elements_differing": num_differing_elements,
        # null if the difference is infinite, because JSON has no infinity
        "largest_difference": largest_difference if math.isfinite(largest_difference) else None, "largest_in": largest_in,
        "differing": different, "other_shape": shapes,
    }  # fmt: skip
