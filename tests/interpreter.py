"""Triton's interpreter, which runs kernels where there is no GPU, rounds as a GPU does once this is imported."""

import numpy as np
import torch

if not torch.cuda.is_available():
    import triton.language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _rounded_to_nearest(source, source_type, target_type, rounding_mode):
        """triton 3.6 to 3.9 interprets a conversion from fp32 to bf16 by cutting bits off; a GPU rounds to nearest, even."""
        if (source_type, target_type) != (tl.float32, tl.bfloat16):
            return _convert(source, source_type, target_type, rounding_mode)
        bits = np.ascontiguousarray(source).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(source), np.uint16(0x7FC0), rounded)

    interpreter._convert_float = _rounded_to_nearest
