"""What we use of megatron-core. Import it only from here, because here its import does not import torch's compiler."""

from tandem.trainer.distributed.lazy_compile import compile_at_first_call

with compile_at_first_call():
    from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

__all__ = ["ModelParallelConfig", "parallel_state", "tensor_parallel"]
