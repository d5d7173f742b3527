"""How attention is cut into programs: the tiles of each kernel, the order of programs, the query heads of one program."""

import torch
from torch import Tensor

L2_CACHE_BYTES = 50 * 2**20
"""Of an H100 and an H200, in two halves that may hold the same. Source: NVIDIA H100 whitepaper, table 3."""
MIN_PROGRAMS = 256
"""About two for each of the 132 multiprocessors of an H100. Simulated with rows of documents and the longest walks first, 14 %
of the time is idle; with twice as many programs 7 %, which saves less than their sums of parts take to write and read."""
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
"""By the widest head they serve, for bf16 on sm_90. 128 queries to a program: 64 would read keys
and values from the L2 cache at 6 TB/s for 400 TFLOP/s, more than it gives. The other side is as wide as registers allow for
scores, weights and sums. Registers let two programs live on a multiprocessor in forward to 64, in gradients of keys to 80.
Nothing spills at the shipped shapes under triton 3.6 and 3.7.1.
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
"""Three products of tf32 for one of fp32: exact enough to check by, not made to be fast. At 32 dims one product alone of 32
by 32 would fill all registers. Heads of other dims spill, of 8, 24, 112 and 128 up to 40 bytes a thread, of 48, 80, 96 and 160
some hundred to some thousand: `tandem.kernels.attention` keeps them from here."""


def select_tile_config(kernel: str, query: Tensor) -> dict[str, int]:
    """Of "forward", "queries" or "keys", for the head and dtype."""
    head_dim = query.shape[-1]
    table = (FP32_TILE_CONFIGS if query.dtype == torch.float32 else TILE_CONFIGS)[kernel]
    return next(sizes for max_head_dim, sizes in table.items() if head_dim <= max_head_dim)


def num_heads_in_l2(operand: Tensor, num_sharing_heads: int = 1) -> int:
    """Return of how many heads the programs are interleaved, block by block: as many as fit in half of the L2 cache.

    A head has two tensors like `operand`, which its programs read; `num_sharing_heads` heads read the same. With more
    heads the longest programs of all would start earlier, but they would read more than the cache holds.
    """
    _, seq, _, head_dim = operand.shape
    return max(1, num_sharing_heads * (L2_CACHE_BYTES // 2) // max(1, 2 * seq * head_dim * operand.element_size()))


def num_heads_per_program(num_programs: int, num_queries_per_kv: int) -> int:
    """Return over how many query heads of a key head one program sums: over all if that leaves enough programs.

    Else over as many as leave enough, because fewer heads a program mean more partial sums to write. `num_programs` is
    their number if each sums over all `num_queries_per_kv` heads.
    """
    divisors = [count for count in range(num_queries_per_kv, 0, -1) if num_queries_per_kv % count == 0]
    return next((count for count in divisors if num_programs * (num_queries_per_kv // count) >= MIN_PROGRAMS), 1)
