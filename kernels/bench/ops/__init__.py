"""One module for each operation: what it must do, an example of its inputs, ours and the rivals on them."""

from tandem.kernels.bench.operation import Operation
from tandem.kernels.bench.ops.attention import ATTENTION
from tandem.kernels.bench.ops.cross_entropy import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY
from tandem.kernels.bench.ops.qkv import QKV
from tandem.kernels.bench.ops.residual_norm import RESIDUAL_NORM
from tandem.kernels.bench.ops.swiglu import SWIGLU, SWIGLU_LINEAR

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (ATTENTION, LINEAR_CROSS_ENTROPY, SWIGLU, SWIGLU_LINEAR, QKV, CROSS_ENTROPY, RESIDUAL_NORM)
}
"""Measured in this order: should time be over, those that a step spends most of its own in are known."""
