"""Throughput in tokens per second and as a share of the devices' peak (MFU)."""

import time
from typing import Any, NamedTuple


class Throughput(NamedTuple):
    tokens_per_second: float
    mfu: float
    mfu_causal: float


def throughput(
    num_tokens: int, seconds: float, *, flops_per_token: float | int, causal_flops_per_token: float | int,
    num_devices: int, peak_flops: float,
) -> Throughput:  # fmt: skip
    """Throughput of all devices together; `peak_flops` is that of one device."""
    rate, peak = num_tokens / seconds, num_devices * peak_flops
    return Throughput(rate, rate * flops_per_token / peak, rate * causal_flops_per_token / peak)


def measure_peak_flops(device: Any) -> float:
    """Measure the FLOP/s of one large matrix product on this process's device, in bf16 on a GPU and fp32 on a CPU.

    MFU is relative to this if the config names no hardware.
    """
    import torch

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        start_time = time.perf_counter()
        result = matrix @ matrix
        float(result[0, 0])  # synchronizes with the device
        seconds.append(time.perf_counter() - start_time)
    return 2 * size**3 / min(seconds)
