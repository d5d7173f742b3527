"""One module per operation: its inputs, the work it must do, our implementation and plain torch's."""

from tandem.kernels.bench.operation import Operation
from tandem.kernels.bench.ops.attention import ATTENTION
from tandem.kernels.bench.ops.cross_entropy import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY
from tandem.kernels.bench.ops.qkv import QKV
from tandem.kernels.bench.ops.swiglu import SWIGLU, SWIGLU_LINEAR

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (ATTENTION, LINEAR_CROSS_ENTROPY, SWIGLU, SWIGLU_LINEAR, QKV, CROSS_ENTROPY)
}
"""In the order of measurement: those that take most of a step's time come first, in case time runs out."""
