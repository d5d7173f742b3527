"""Tile sizes for the attention kernels other than their own, which `attention_sweep` compares.

All compile for sm_90 under triton 3.6 and 3.7.1 with asynchronous products, and without spilling except the one that is marked:
`python -m tests.rivals.kernels.attention_sweep --resources`.
"""

from typing import Any

from tandem.kernels.bench.shapes import Shape
from tandem.kernels.device.attention_tiling import TILE_CONFIGS, num_heads_per_program
from tandem.kernels.device.launch import num_blocks

ATTENTION_KERNELS = ("forward", "queries", "keys")
"""They compute the result, the gradient of queries, and the gradients of keys and values."""
ONE_HEAD_IN_L2 = {"heads_in_l2": 1}
"""All programs of one head run before those of the next."""
ALL_HEADS_IN_L2 = {"heads_in_l2": 1_000}


def _tiles(*sizes: tuple[int, ...]) -> list[dict[str, int]]:
    """From queries, keys, warps, stages and, if there is a limit, registers."""
    names = "QUERIES", "KEYS", "num_warps", "num_stages", "maxnreg"
    return [dict(zip(names, of_one, strict=False)) for of_one in sizes]


CANDIDATE_CONFIGS: dict[str, dict[int, list[dict[str, int]]]] = {
    "forward": {
        80: [
            ONE_HEAD_IN_L2,
            ALL_HEADS_IN_L2,
            *_tiles((64, 64, 4, 3), (128, 64, 4, 3), (128, 32, 8, 3, 128)),
            *_tiles((128, 64, 8, 3, 128)),  # spills 8 bytes, for a second program
            *_tiles((64, 128, 4, 2), (128, 128, 8, 2)),
        ],
        160: [
            ONE_HEAD_IN_L2,
            *_tiles((64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 3)),
        ],
    },
    "queries": {
        80: [
            ONE_HEAD_IN_L2,
            *_tiles(
                (128, 64, 8, 2), (128, 64, 8, 4), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3), (128, 128, 8, 2)
            ),
        ],
        160: [ONE_HEAD_IN_L2, *_tiles((128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3))],
    },
    "keys": {
        80: [
            ONE_HEAD_IN_L2,
            ALL_HEADS_IN_L2,
            *_tiles((64, 64, 4, 2), (64, 64, 4, 4), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 3)),
        ],
        160: [
            ONE_HEAD_IN_L2,
            {"HEADS_PER_PROGRAM": 4} | ONE_HEAD_IN_L2,
            *({"HEADS_PER_PROGRAM": count} for count in (4, 2, 1)),
            *_tiles((32, 128, 8, 2), (16, 128, 8, 4)),
        ],
    },
}
"""By kernel and head dim. A candidate overrides the kernel's own configuration in TILE_CONFIGS."""


def candidate_configs(kernel: str, shape: Shape) -> list[tuple[str, dict[str, int]]]:
    """Return the distinct names and configurations for a shape, the kernel's own first."""
    current_config = next(sizes for widest, sizes in TILE_CONFIGS[kernel].items() if shape.head_dim <= widest)
    found: dict[str, dict[str, int]] = {}
    for change in [{}, *CANDIDATE_CONFIGS[kernel][shape.head_dim]]:
        # A candidate with a tile of its own does not inherit the register limit of the other tile.
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
    """Describe a configuration: queries x keys of a tile, warps, stages and the rest."""
    more: dict[str, Any] = {
        "maxnreg": "{} registers", "HEADS_PER_PROGRAM": "{} heads a program", "heads_in_l2": "{} heads in L2",
    }  # fmt: skip
    words = [
        f"{tile_config['QUERIES']}x{tile_config['KEYS']}",
        f"{tile_config['num_warps']} warps",
        f"{tile_config['num_stages']} stages",
    ]
    return ", ".join(words + [form.format(tile_config[name]) for name, form in more.items() if name in tile_config])
