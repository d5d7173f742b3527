"""Speed in tokens and as a share of the devices' peak (MFU)."""

import time
from typing import Any, NamedTuple


class Throughput(NamedTuple):
    tokens_per_second: float
    mfu: float
    mfu_causal: float


def throughput(
    num_tokens: int,
    seconds: float,
    *,
    flops_per_token: float | int,
    causal_flops_per_token: float | int,
    num_devices: int,
    peak_flops: float,
) -> Throughput:
    """Speed of all devices on `tokens`, and as a share of their peak; `peak_flops` is one device's."""
    tokens_per_second = num_tokens / seconds
    peak = num_devices * peak_flops
    return Throughput(
        tokens_per_second, tokens_per_second * flops_per_token / peak, tokens_per_second * causal_flops_per_token / peak
    )


def measure_peak_flops(device: Any) -> float:
    """Floating-point operations per second of one large matrix product on this process's share of the machine.

    The denominator of MFU where no hardware is configured: bf16 on a GPU, fp32 on a CPU.
    """
    import torch

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        start_time = time.perf_counter()
        result = matrix @ matrix
        float(result[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start_time)
    return 2 * size**3 / min(seconds)
