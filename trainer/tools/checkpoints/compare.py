"""How two checkpoints differ: facts, names, and every bit of every tensor, one tensor of each in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tandem.trainer.checkpoint.layout import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.trainer.checkpoint.read import Snapshot

FACTS = (
    "step",
    "updates",
    "tokens",
    "cursor",
    "model",
    "mup",
    "fingerprints",
    "eos_token",
    "order",
    "skipped",
    "phases",
)
"""What a checkpoint says besides its tensors. Not compared: what only tells which ranks wrote it and how often it was begun."""
CHUNK_ELEMENTS = 1 << 22
"""Compared at a time: differences are taken in 64 bits, and would else be twice the tensors."""
NOWHERE = object()
"""Stands for a fact that is not there; null is one."""

Advance = Callable[[int], None]


def differences(one: Snapshot, other: Snapshot, advance: Advance = lambda num_bytes: None) -> dict[str, Any]:
    """How two checkpoints differ, by fact, name and kind of state; `same` is whether they do not.

    Memory: a tensor of each.
    """
    ours, theirs = one.manifest, other.manifest
    facts = [first_difference(fact, ours.get(fact, NOWHERE), theirs.get(fact, NOWHERE)) for fact in FACTS]
    only = {"only_in_a": _missing(one.names, other.names), "only_in_b": _missing(other.names, one.names)}
    shared = [name for name in one.names if name in set(other.names)]
    kinds: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        saved_by = [side for side, snapshot in (("a", one), ("b", other)) if snapshot.has(kind)]
        if len(saved_by) == 2:
            kinds[kind] = _of_kind(shared, partial(one.tensor, kind), partial(other.tensor, kind), advance)
        elif saved_by:
            kinds[kind] = {"only_in": saved_by[0]}
    different = [fact for fact in facts if fact]
    same = not different and not any(only.values()) and not any(map(_differs, kinds.values()))
    return {"same": same, "a": _named(one), "b": _named(other), "facts": different, **only, "kinds": kinds}


def first_difference(where: str, one: Any, other: Any) -> str | None:
    """The first field below `where` that differs, with both values, or None."""
    if one is NOWHERE or other is NOWHERE:
        return None if one is other else f"{where}: only in {'A' if other is NOWHERE else 'B'}"
    pairs: Iterator[str | None]
    if isinstance(one, dict) and isinstance(other, dict):
        both = {name: (one.get(name, NOWHERE), other.get(name, NOWHERE)) for name in one | other}
        pairs = (first_difference(f"{where}.{name}", *pair) for name, pair in both.items())
    elif isinstance(one, list) and isinstance(other, list):
        numbered = enumerate(zip_longest(one, other, fillvalue=NOWHERE))
        pairs = (first_difference(f"{where}[{index}]", *pair) for index, pair in numbered)
    else:
        return None if one == other else f"{where}: {json.dumps(one)} | {json.dumps(other)}"
    return next(filter(None, pairs), None)


def different_elements(one: Tensor, other: Tensor) -> tuple[int, float]:
    """How many elements of two fp32 tensors of one shape are not the same bits, and how far apart they are at most.

    Infinite where one of them is no number or infinite; zero where only the sign of a zero differs.
    """
    import torch

    bits = torch.int32
    if torch.equal(one.view(bits), other.view(bits)):
        return 0, 0.0
    count, largest = 0, 0.0
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(one.shape[1:])))
    for ours, theirs in zip(one.split(rows), other.split(rows), strict=True):
        differ = ours.view(bits) != theirs.view(bits)
        distances = (ours[differ].double() - theirs[differ].double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        count += distances.numel()
        largest = max(largest, float(distances.max()) if distances.numel() else 0.0)
    return count, largest


def _of_kind(
    names: Collection[str], ours: Callable[[str], Tensor], theirs: Callable[[str], Tensor], advance: Advance
) -> dict[str, Any]:
    different, shapes, largest_in = [], {}, None
    total, count, largest = 0, 0, 0.0
    for name in names:
        one, other = ours(name), theirs(name)
        advance(one.nbytes)
        if one.shape != other.shape:
            shapes[name] = [list(one.shape), list(other.shape)]
            continue
        total += one.numel()
        here, furthest = different_elements(one, other)
        count += here
        if here:
            different.append(name)
        if here and (largest_in is None or furthest > largest):
            largest, largest_in = furthest, name
        del one, other  # before the next are made
    return {
        "tensors_equal": len(names) - len(different) - len(shapes), "tensors_differing": len(different) + len(shapes),
        "elements": total, "elements_differing": count,
        # JSON has no infinity: null beside elements that differ says that there is no number.
        "largest_difference": largest if math.isfinite(largest) else None, "largest_in": largest_in,
        "differing": different, "other_shape": shapes,
    }  # fmt: skip


def _differs(kind: Mapping[str, Any]) -> bool:
    return "only_in" in kind or bool(kind["tensors_differing"])


def _missing(names: Collection[str], there: Collection[str]) -> list[str]:
    known = set(there)
    return [name for name in names if name not in known]


def _named(snapshot: Snapshot) -> dict[str, Any]:
    written_by = {name: snapshot.manifest[name] for name in ("tp_size", "dp_size")}
    return {"folder": str(snapshot.folder), "step": snapshot.step, **written_by}
