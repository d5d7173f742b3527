"""Other sizes for the kernels of attention than those they have, measured against them by `attention_sweep`.

All compile for sm_90 under triton 3.6 and 3.7.1 with asynchronous products, and all but the one that says so without a spill:
`python -m tandem.kernels.bench.attention_sweep --resources`.
"""

from typing import Any

from tandem.kernels.bench.shapes import Heads
from tandem.kernels.device.attention_tiling import SIZES, heads_per_program
from tandem.kernels.device.launch import blocks

KERNELS = ("forward", "queries", "keys")
"""The result; the gradient of queries; the gradients of keys and values."""
ONE_HEAD_IN_L2 = {"heads_in_l2": 1}
"""Programs of one head after those of another."""
ALL_HEADS_IN_L2 = {"heads_in_l2": 1_000}


def _tile(queries: int, keys: int, num_warps: int, num_stages: int, **more: int) -> dict[str, int]:
    return {"QUERIES": queries, "KEYS": keys, "num_warps": num_warps, "num_stages": num_stages, **more}


CANDIDATES: dict[str, dict[int, list[dict[str, int]]]] = {
    "forward": {
        80: [
            ONE_HEAD_IN_L2, ALL_HEADS_IN_L2, _tile(64, 64, 4, 3), _tile(128, 64, 4, 3), _tile(128, 32, 8, 3, maxnreg=128),
            _tile(128, 64, 8, 3, maxnreg=128),  # spills 8 bytes, for a second program
            _tile(64, 128, 4, 2), _tile(128, 128, 8, 2),
        ],
        160: [
            ONE_HEAD_IN_L2, _tile(64, 64, 4, 2), _tile(64, 32, 4, 3), _tile(64, 32, 4, 2), _tile(128, 64, 8, 2),
            _tile(128, 32, 8, 3),
        ],
    },
    "queries": {
        80: [
            ONE_HEAD_IN_L2, _tile(128, 64, 8, 2), _tile(128, 64, 8, 4), _tile(64, 64, 4, 3), _tile(128, 32, 8, 3),
            _tile(64, 32, 4, 3), _tile(128, 128, 8, 2),
        ],
        160: [
            ONE_HEAD_IN_L2, _tile(128, 64, 8, 2), _tile(64, 32, 4, 3), _tile(64, 64, 4, 2), _tile(128, 32, 8, 3),
        ],
    },
    "keys": {
        80: [
            ONE_HEAD_IN_L2, ALL_HEADS_IN_L2, _tile(64, 64, 4, 2), _tile(64, 64, 4, 4), _tile(32, 64, 4, 3),
            _tile(64, 128, 8, 2), _tile(32, 128, 8, 3),
        ],
        160: [
            ONE_HEAD_IN_L2, {"HEADS_PER_PROGRAM": 4} | ONE_HEAD_IN_L2,
            {"HEADS_PER_PROGRAM": 4}, {"HEADS_PER_PROGRAM": 2}, {"HEADS_PER_PROGRAM": 1},
            _tile(32, 128, 8, 2), _tile(16, 128, 8, 4),
        ],
    },
}  # fmt: skip
"""By kernel and head; what a candidate does not say is as in SIZES, or follows its rule."""


def candidates(kernel: str, shape: Heads) -> list[tuple[str, dict[str, int]]]:
    """Names and sizes at a shape, the kernel's own first; none twice."""
    own = next(sizes for widest, sizes in SIZES[kernel].items() if shape.head_dim <= widest)
    found: dict[str, dict[str, int]] = {}
    for change in [{}, *CANDIDATES[kernel][shape.head_dim]]:
        # A tile of its own does not keep the limit of registers of the other.
        sizes = dict(change) if "QUERIES" in change else own | change
        group = shape.heads // shape.kv_heads
        if kernel == "keys" and group > 1 and "HEADS_PER_PROGRAM" not in sizes:
            sizes["HEADS_PER_PROGRAM"] = heads_per_program(
                blocks(shape.tokens, sizes["KEYS"]) * shape.rows * shape.kv_heads, group
            )
        if sizes not in found.values():
            found[named(sizes)] = sizes
    return [*found.items()]


def named(sizes: dict[str, int]) -> str:
    """The sizes in words: queries by keys of a tile, warps, stages and what else there is."""
    more: dict[str, Any] = {
        "maxnreg": "{} registers", "HEADS_PER_PROGRAM": "{} heads a program", "heads_in_l2": "{} heads in L2",
    }  # fmt: skip
    said = [f"{sizes['QUERIES']}x{sizes['KEYS']}", f"{sizes['num_warps']} warps", f"{sizes['num_stages']} stages"]
    return ", ".join(said + [form.format(sizes[name]) for name, form in more.items() if name in sizes])
