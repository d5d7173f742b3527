"""Cross-entropy by rows: in forward one program per token, in backward one per block of a token's columns.

A lane is one thread's load of neighbouring columns. Forward keeps a maximum and a sum for every lane and combines the lanes
only after the last block, so within the loop no thread waits for another, and an element costs 1 1/8 exponentials. Loads are
masked by the columns that exist, padding included. The number of columns without padding may be odd, and masking by it would
split the loads into single elements.
"""

import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.device.launch import launch, num_blocks
from tandem.kernels.device.shared import LOWEST

LANE_BYTES = 16
"""The widest load of one thread."""
MAX_LANES = 512
LANES_PER_WARP = 64
"""So each thread has two loads in flight, and a multiprocessor holds enough threads for 64 KiB of loads."""


@triton.jit
def _add(
    logits, targets, statistics,
    tokens, width, row_stride, first, columns, scale,
    LOWEST: tl.constexpr, LANES: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * row_stride
    target = tl.load(targets + row) - first
    offset = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    maximum = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, columns, LANES * LANE):
        column = start + offset
        z = tl.load(source + column, mask=column < width, other=0.0).to(tl.float32) * scale
        z = tl.where(column < columns, z, float("-inf"))
        largest = tl.maximum(maximum, tl.max(z, 1))
        total = total * tl.exp(maximum - largest) + tl.sum(tl.exp(z - largest[:, None]), 1)
        maximum = largest
    _merge(statistics + row, statistics + tokens + row, maximum, total)
    is_here = (target >= 0) & (target < columns)
    target_logit = tl.load(source + target, mask=is_here, other=0.0).to(tl.float32) * scale
    tl.store(statistics + 2 * tokens + row, target_logit, mask=is_here)


@triton.jit
def _merge(maximum_before, total_before, maximum, total):
    """Combine the lanes' maxima and sums with those of earlier blocks."""
    before = tl.load(maximum_before).to(tl.float32)
    largest = tl.maximum(before, tl.max(maximum, 0))
    merged = tl.sum(total * tl.exp(maximum - largest), 0)
    merged += tl.load(total_before).to(tl.float32) * tl.exp(before - largest)
    tl.store(maximum_before, largest)
    tl.store(total_before, merged)


@triton.jit
def _gradient(
    logits, targets, maximum, total_gradient, target_logit_gradient,
    width, row_stride, first, columns, scale,
    LANES: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * (LANES * LANE) + tl.arange(0, LANES * LANE)
    place = logits + row * row_stride + column
    z = tl.load(place, mask=column < width, other=0.0).to(tl.float32) * scale
    exponential = tl.exp(z - tl.load(maximum + row).to(tl.float32))
    is_target = column == tl.load(targets + row) - first
    gradient = tl.load(total_gradient + row).to(tl.float32) * exponential
    gradient += tl.where(is_target, tl.load(target_logit_gradient + row).to(tl.float32), 0.0)
    gradient = tl.where(column < columns, gradient * scale, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < width)


def add_block(logits: Tensor, targets: Tensor, statistics: Tensor, *, first: int, columns: int, scale: float) -> None:
    """Add a block of logits to the statistics of each token."""
    tokens, width = logits.shape
    lane_config = _lane_config(logits)
    launch(
        _add, (tokens,), logits, targets.contiguous(), statistics,
        tokens, width, logits.stride(0), first, columns, scale, LOWEST=LOWEST, **lane_config,
    )  # fmt: skip


def write_block_gradient(
    logits: Tensor, targets: Tensor, maximum: Tensor, total_gradient: Tensor, target_logit_gradient: Tensor,
    *, first: int, columns: int, scale: float,
) -> None:  # fmt: skip
    """Write the gradient of a block of logits over them."""
    tokens, width = logits.shape
    lane_config = _lane_config(logits)
    per_token = (x.contiguous() for x in (targets, maximum, total_gradient, target_logit_gradient))
    launch(
        _gradient, (tokens, num_blocks(width, lane_config["LANES"] * lane_config["LANE"])), logits, *per_token,
        width, logits.stride(0), first, columns, scale, **lane_config,
    )  # fmt: skip


def _lane_config(logits: Tensor) -> dict[str, int]:
    """Return the lanes of a block. A short row is one block, with no more threads than it has loads."""
    lane = LANE_BYTES // logits.element_size()
    lanes = min(MAX_LANES, triton.next_power_of_2(num_blocks(logits.shape[1], lane)))
    return {"LANES": lanes, "LANE": lane, "num_warps": max(1, lanes // LANES_PER_WARP)}
