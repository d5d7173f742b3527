"""Other sizes for the kernels of attention than those they have, measured against them by `attention_sweep`.

All compile for sm_90 under triton 3.6 and 3.7.1 with asynchronous products, and all but the one that says so without a spill:
`python -m tandem.kernels.bench.attention_sweep --resources`.
"""

from typing import Any

from tandem.kernels.bench.shapes import AttentionShape
from tandem.kernels.device.attention_tiling import TILE_CONFIGS, num_heads_per_program
from tandem.kernels.device.launch import num_blocks

ATTENTION_KERNELS = ("forward", "queries", "keys")
"""The result; the gradient of queries; the gradients of keys and values."""
ONE_HEAD_IN_L2 = {"heads_in_l2": 1}
"""Programs of one head after those of another."""
ALL_HEADS_IN_L2 = {"heads_in_l2": 1_000}


def _tile_config(queries: int, keys: int, num_warps: int, num_stages: int, **more: int) -> dict[str, int]:
    return {"QUERIES": queries, "KEYS": keys, "num_warps": num_warps, "num_stages": num_stages, **more}


CANDIDATE_CONFIGS: dict[str, dict[int, list[dict[str, int]]]] = {
    "forward": {
        80: [
            ONE_HEAD_IN_L2,
            ALL_HEADS_IN_L2,
            _tile_config(64, 64, 4, 3),
            _tile_config(128, 64, 4, 3),
            _tile_config(128, 32, 8, 3, maxnreg=128),
            _tile_config(128, 64, 8, 3, maxnreg=128),  # spills 8 bytes, for a second program
            _tile_config(64, 128, 4, 2),
            _tile_config(128, 128, 8, 2),
        ],
        160: [
            ONE_HEAD_IN_L2,
            _tile_config(64, 64, 4, 2),
            _tile_config(64, 32, 4, 3),
            _tile_config(64, 32, 4, 2),
            _tile_config(128, 64, 8, 2),
            _tile_config(128, 32, 8, 3),
        ],
    },
    "queries": {
        80: [
            ONE_HEAD_IN_L2,
            _tile_config(128, 64, 8, 2),
            _tile_config(128, 64, 8, 4),
            _tile_config(64, 64, 4, 3),
            _tile_config(128, 32, 8, 3),
            _tile_config(64, 32, 4, 3),
            _tile_config(128, 128, 8, 2),
        ],
        160: [
            ONE_HEAD_IN_L2,
            _tile_config(128, 64, 8, 2),
            _tile_config(64, 32, 4, 3),
            _tile_config(64, 64, 4, 2),
            _tile_config(128, 32, 8, 3),
        ],
    },
    "keys": {
        80: [
            ONE_HEAD_IN_L2,
            ALL_HEADS_IN_L2,
            _tile_config(64, 64, 4, 2),
            _tile_config(64, 64, 4, 4),
            _tile_config(32, 64, 4, 3),
            _tile_config(64, 128, 8, 2),
            _tile_config(32, 128, 8, 3),
        ],
        160: [
            ONE_HEAD_IN_L2,
            {"HEADS_PER_PROGRAM": 4} | ONE_HEAD_IN_L2,
            {"HEADS_PER_PROGRAM": 4},
            {"HEADS_PER_PROGRAM": 2},
            {"HEADS_PER_PROGRAM": 1},
            _tile_config(32, 128, 8, 2),
            _tile_config(16, 128, 8, 4),
        ],
    },
}
"""By kernel and head; what a candidate does not say is as in TILE_CONFIGS, or follows its rule."""


def candidate_configs(kernel: str, shape: AttentionShape) -> list[tuple[str, dict[str, int]]]:
    """Names and sizes at a shape, the kernel's own first; none twice."""
    current_config = next(sizes for widest, sizes in TILE_CONFIGS[kernel].items() if shape.head_dim <= widest)
    found: dict[str, dict[str, int]] = {}
    for change in [{}, *CANDIDATE_CONFIGS[kernel][shape.head_dim]]:
        # A tile of its own does not keep the limit of registers of the other.
        sizes = dict(change) if "QUERIES" in change else current_config | change
        group = shape.num_heads // shape.num_kv_heads
        if kernel == "keys" and group > 1 and "HEADS_PER_PROGRAM" not in sizes:
            sizes["HEADS_PER_PROGRAM"] = num_heads_per_program(
                num_blocks(shape.tokens, sizes["KEYS"]) * shape.batch_size * shape.num_kv_heads, group
            )
        if sizes not in found.values():
            found[describe_config(sizes)] = sizes
    return [*found.items()]


def describe_config(tile_config: dict[str, int]) -> str:
    """The sizes in words: queries by keys of a tile, warps, stages and what else there is."""
    more: dict[str, Any] = {
        "maxnreg": "{} registers", "HEADS_PER_PROGRAM": "{} heads a program", "heads_in_l2": "{} heads in L2",
    }  # fmt: skip
    words = [
        f"{tile_config['QUERIES']}x{tile_config['KEYS']}",
        f"{tile_config['num_warps']} warps",
        f"{tile_config['num_stages']} stages",
    ]
    return ", ".join(words + [form.format(tile_config[name]) for name, form in more.items() if name in tile_config])
