"""Speed in tokens and as a share of the devices' peak (MFU)."""

import time
from typing import Any, NamedTuple


class Throughput(NamedTuple):
    tokens_per_second: float
    mfu: float
    mfu_causal: float


def throughput(
    tokens: int,
    seconds: float,
    *,
    flops_per_token: float | int,
    causal_flops_per_token: float | int,
    devices: int,
    peak_flops: float,
) -> Throughput:
    """Speed of all devices on `tokens`, and as a share of their peak; `peak_flops` is one device's."""
    rate = tokens / seconds
    peak = devices * peak_flops
    return Throughput(rate, rate * flops_per_token / peak, rate * causal_flops_per_token / peak)


def measured_peak_flops(device: Any) -> float:
    """Floating-point operations per second of one large matrix product on this process's share of the machine.

    The denominator of MFU where no hardware is configured: bf16 on a GPU, fp32 on a CPU.
    """
    import torch

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        result = matrix @ matrix
        float(result[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
