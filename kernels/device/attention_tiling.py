"""How attention is divided into programs: the tiles of each kernel, the order of programs, the query heads of one program."""

import torch
from torch import Tensor

L2_CACHE_BYTES = 50 * 2**20
"""Of an H100 and an H200, in two halves that may hold the same data. Source: NVIDIA H100 whitepaper, table 3."""
MIN_PROGRAMS = 256
"""About two for each of the 132 multiprocessors of an H100. In a simulation with rows of documents and the longest programs
first, 14 % of the time is idle. With twice as many programs it is 7 %, which saves less than writing and reading their partial
sums costs."""
TILE_CONFIGS: dict[str, dict[int, dict[str, int]]] = {
    "forward": {
        64: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
        80: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3},
        160: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3},
        256: {"QUERIES": 128, "KEYS": 32, "num_warps": 8, "num_stages": 2},
    },
    "queries": {
        160: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3},
        256: {"QUERIES": 64, "KEYS": 32, "num_warps": 8, "num_stages": 2},
    },
    "keys": {
        80: {"KEYS": 64, "QUERIES": 64, "num_warps": 4, "num_stages": 3},
        160: {"KEYS": 128, "QUERIES": 32, "num_warps": 8, "num_stages": 3},
        256: {"KEYS": 32, "QUERIES": 32, "num_warps": 4, "num_stages": 2},
    },
}
"""By the widest head they serve, for bf16 on sm_90. A program has 128 queries: with 64 it would have to read keys and values
from the L2 cache at 6 TB/s for 400 TFLOP/s, more than the cache delivers. The other side is as wide as the registers for
scores, weights and sums allow. Two programs fit on a multiprocessor in forward up to 64 dims, and in the gradients of keys up
to 80. Nothing spills at the shipped shapes under triton 3.6 and 3.7.1.
"""
FP32_TILE_CONFIGS: dict[str, dict[int, dict[str, int]]] = {
    "forward": {
        16: {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1},
        32: {"QUERIES": 16, "KEYS": 16, "num_warps": 4, "num_stages": 1},
        64: {"QUERIES": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    },
    "queries": {
        16: {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1},
        32: {"QUERIES": 16, "KEYS": 16, "num_warps": 4, "num_stages": 1},
        64: {"QUERIES": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    },
    "keys": {
        32: {"KEYS": 32, "QUERIES": 16, "num_warps": 4, "num_stages": 1},
        64: {"KEYS": 32, "QUERIES": 32, "num_warps": 8, "num_stages": 1},
    },
}
"""Three tf32 products replace one fp32 product: exact enough for checks, and not tuned for speed. At 32 dims a single product
of 32 by 32 would fill all registers. Other head dims spill: 8, 24, 112 and 128 up to 40 bytes per thread, 48, 80, 96 and 160
hundreds to thousands. `tandem.kernels.attention` does not send them here."""


def select_tile_config(kernel: str, query: Tensor) -> dict[str, int]:
    """Return the tile of the kernel "forward", "queries" or "keys" for the head dim and dtype."""
    head_dim = query.shape[-1]
    table = (FP32_TILE_CONFIGS if query.dtype == torch.float32 else TILE_CONFIGS)[kernel]
    return next(sizes for max_head_dim, sizes in table.items() if head_dim <= max_head_dim)


def num_heads_in_l2(operand: Tensor, num_sharing_heads: int = 1) -> int:
    """Return how many heads have their programs interleaved, block by block: as many as fit in half of the L2 cache.

    The programs of a head read two tensors like `operand`, and `num_sharing_heads` heads read the same ones. With more heads
    the longest programs would start earlier, but they would read more than the cache holds.
    """
    _, seq, _, head_dim = operand.shape
    return max(1, num_sharing_heads * (L2_CACHE_BYTES // 2) // max(1, 2 * seq * head_dim * operand.element_size()))


def num_heads_per_program(num_programs: int, num_queries_per_kv: int) -> int:
    """Return how many query heads of a key head one program sums over: the most that leave at least MIN_PROGRAMS programs.

    Fewer heads per program mean more partial sums to write. `num_programs` is the number of programs if each sums over all
    `num_queries_per_kv` heads.
    """
    divisors = [count for count in range(num_queries_per_kv, 0, -1) if num_queries_per_kv % count == 0]
    return next((count for count in divisors if num_programs * (num_queries_per_kv // count) >= MIN_PROGRAMS), 1)
