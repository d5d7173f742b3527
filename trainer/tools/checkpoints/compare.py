"""How two checkpoints differ: facts, names, and every bit of every tensor, one tensor of each in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tandem.trainer.checkpoint.layout import STATE_KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.trainer.checkpoint.read import Checkpoint

COMPARED_KEYS = (
    "step",
    "num_updates",
    "tokens",
    "cursor",
    "model",
    "mup",
    "fingerprints",
    "eos_token",
    "shuffle_settings",
    "skipped_shards",
    "phases",
)
"""What a checkpoint says besides its tensors. Not compared: what only tells which ranks wrote it and how often it was begun."""
COMPARE_CHUNK_ELEMENTS = 1 << 22
"""Compared at a time: differences are taken in 64 bits, and would else be twice the tensors."""
ABSENT = object()
"""Stands for a fact that is not there; null is one."""

ProgressCallback = Callable[[int], None]


def compare_checkpoints(
    one: Checkpoint, other: Checkpoint, advance: ProgressCallback = lambda num_bytes: None
) -> dict[str, Any]:
    """How two checkpoints differ, by fact, name and kind of state; `same` is whether they do not.

    Memory: a tensor of each.
    """
    first_manifest, second_manifest = one.manifest, other.manifest
    facts = [
        first_difference(fact, first_manifest.get(fact, ABSENT), second_manifest.get(fact, ABSENT))
        for fact in COMPARED_KEYS
    ]
    one_sided_names = {
        "only_in_a": _missing_names(one.parameter_names, other.parameter_names),
        "only_in_b": _missing_names(other.parameter_names, one.parameter_names),
    }
    shared = [name for name in one.parameter_names if name in set(other.parameter_names)]
    kinds: dict[str, dict[str, Any]] = {}
    for kind in STATE_KINDS:
        saved_by = [side for side, checkpoint in (("a", one), ("b", other)) if checkpoint.has_state(kind)]
        if len(saved_by) == 2:
            kinds[kind] = _compare_kind(
                shared, partial(one.read_tensor, kind), partial(other.read_tensor, kind), advance
            )
        elif saved_by:
            kinds[kind] = {"only_in": saved_by[0]}
    different = [fact for fact in facts if fact]
    same = not different and not any(one_sided_names.values()) and not any(map(_has_difference, kinds.values()))
    return {
        "same": same,
        "a": _checkpoint_identity(one),
        "b": _checkpoint_identity(other),
        "facts": different,
        **one_sided_names,
        "kinds": kinds,
    }


def first_difference(key_path: str, one: Any, other: Any) -> str | None:
    """The first field below `key_path` that differs, with both values, or None."""
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
    """How many elements of two fp32 tensors of one shape are not the same bits, and how far apart they are at most.

    Infinite where one of them is no number or infinite; zero where only the sign of a zero differs.
    """
    import torch

    bits = torch.int32
    if torch.equal(one.view(bits), other.view(bits)):
        return 0, 0.0
    count, largest = 0, 0.0
    rows = max(1, COMPARE_CHUNK_ELEMENTS // max(1, math.prod(one.shape[1:])))
    for one_chunk, other_chunk in zip(one.split(rows), other.split(rows), strict=True):
        differ = one_chunk.view(bits) != other_chunk.view(bits)
        distances = (
            (one_chunk[differ].double() - other_chunk[differ].double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        )
        count += distances.numel()
        largest = max(largest, float(distances.max()) if distances.numel() else 0.0)
    return count, largest


def _compare_kind(
    names: Collection[str],
    read_one: Callable[[str], Tensor],
    read_other: Callable[[str], Tensor],
    advance: ProgressCallback,
) -> dict[str, Any]:
    different, shapes, largest_in = [], {}, None
    num_elements, num_differing_elements, largest_difference = 0, 0, 0.0
    for name in names:
        one, other = read_one(name), read_other(name)
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
        del one, other  # before the next are made
    return {
        "tensors_equal": len(names) - len(different) - len(shapes), "tensors_differing": len(different) + len(shapes),
        "elements": num_elements, "elements_differing": num_differing_elements,
        # JSON has no infinity: null beside elements that differ says that there is no number.
        "largest_difference": largest_difference if math.isfinite(largest_difference) else None, "largest_in": largest_in,
        "differing": different, "other_shape": shapes,
    }  # fmt: skip


def _has_difference(kind: Mapping[str, Any]) -> bool:
    return "only_in" in kind or bool(kind["tensors_differing"])


def _missing_names(names: Collection[str], other_names: Collection[str]) -> list[str]:
    known = set(other_names)
    return [name for name in names if name not in known]


def _checkpoint_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    written_by = {name: checkpoint.manifest[name] for name in ("tp_size", "dp_size")}
    return {"folder": str(checkpoint.folder), "step": checkpoint.step, **written_by}
