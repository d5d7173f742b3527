"""The operations of `tandem.kernels.bench` with all their rivals, and one that has no kernel of ours."""

from tests.rivals.kernels.operation import ContestedOperation
from tests.rivals.kernels.ops.attention import ATTENTION
from tests.rivals.kernels.ops.cross_entropy import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY
from tests.rivals.kernels.ops.qkv import QKV
from tests.rivals.kernels.ops.residual_norm import RESIDUAL_NORM
from tests.rivals.kernels.ops.swiglu import SWIGLU, SWIGLU_LINEAR

OPERATIONS: dict[str, ContestedOperation] = {
    operation.name: operation
    for operation in (ATTENTION, LINEAR_CROSS_ENTROPY, SWIGLU, SWIGLU_LINEAR, QKV, CROSS_ENTROPY, RESIDUAL_NORM)
}
"""In the order of measurement."""
