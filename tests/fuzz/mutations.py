"""Seeded damage of files: of their values, before they are written, and of their bytes."""

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

AWKWARD = (
    None, True, False, 0, -1, 1, 7, 1 << 31, (1 << 53) + 1, 1 << 62, 1 << 63, -(1 << 63), 10**40, 0.5, 1.0, -0.0, 1e-320, 1e308,
    math.inf, -math.inf, math.nan, "", "0", "1e5", "nan", "null", "../x", "/etc/passwd", "a\0b", "\ud800", "é", "x" * 3000,
    "a\nb", "\x1b[2J", [], {}, [[]], [None], {"a": 1}, {"a": {"a": {}}},
)  # fmt: skip


def find_places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in the tree with each of its keys or indices."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from find_places(value)


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """Return a copy of the tree with one to three changes."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (places := list(find_places(changed))):
            return rng.choice(AWKWARD)
        container, key = rng.choice(places)
        value = container[key]
        match rng.randrange(9):
            case 0 | 1 | 2:
                container[key] = copy.deepcopy(rng.choice(AWKWARD))
            case 3:
                del container[key]
            case 4:
                container[key] = rng.choice(([value], {"x": value}, str(value)))
            case 5:
                container[key] = _near(value, rng)
            case 6:
                other, place = rng.choice(places)
                container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(value)
            case 7 if isinstance(container, list):
                container.append(copy.deepcopy(value))
            case _ if isinstance(container, dict):
                container[rng.choice((f"{key}x", str(key)[:-1], str(key).upper(), "", "a.b", "a\nb"))] = container.pop(
                    key
                )
    return changed


def _near(value: Any, rng: random.Random) -> Any:
    """Return a value of the same type that is nearly the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, -value, 2 * value, value // 2, value ^ 1 << rng.randrange(16), float(value))
        )
    if isinstance(value, float):
        return rng.choice((-value, 2 * value, value + 1, value * 1e9, int(value)))
    if isinstance(value, str):
        return rng.choice(
            (value[:-1], value + "0", value + " ", value.upper(), value[::-1], value.replace("0", "1", 1))
        )
    return value


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one wrong bit, a cut, inserted or repeated bytes, or in another encoding."""
    place, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(8):
        case 0 | 1 | 2:
            changed = bytearray(content)
            changed[place % len(content)] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 3:
            return content[:place]
        case 4:
            return content[:place] + content[end:]
        case 5:
            return content[:end] + content[place:]
        case 6:
            inserted = (
                b"\0",
                b"\n",
                b"\r",
                b'"',
                b"{",
                b"}",
                b",",
                b"0",
                b"\xff",
                b"\xef\xbb\xbf",
                b"[" * 3000,
                b"\t",
                b"#",
                b": ",
            )
            return content[:place] + rng.choice(inserted) + content[place:]
        case _:
            text = content.decode()
            return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
