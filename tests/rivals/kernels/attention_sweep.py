"""The command `python -m tests.rivals.kernels.attention_sweep`: measure the attention kernels with other tile sizes.

At the heads of both published models, it measures forward, the gradient of queries and the gradients of keys and values
separately, with every candidate of `attention_candidates` in turn. Worker processes first compile all variants, for which they
need no GPU, into Triton's cache. A candidate whose result differs from that of the kernel's own sizes is not timed.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from tandem.kernels.bench.compare import check_agreement, device_name, environment, one_line_reason, seeded_example
from tandem.kernels.bench.measure import PassTimes, num_input_sets, time_calls, time_interleaved
from tandem.kernels.bench.ops import OPERATIONS, document_starts, slopes_of
from tandem.kernels.bench.shapes import Shape, attention_shapes
from tests.rivals.kernels.attention_candidates import ATTENTION_KERNELS, candidate_configs
from tests.rivals.kernels.resources import COMPILED_DEVICE, blocks_per_multiprocessor, compile_launched

ATTENTION = OPERATIONS["attention"]
SWEPT_KERNELS: dict[str, tuple[str, ...]] = {
    "btlm-3b-8k 2048 tp1": ATTENTION_KERNELS,
    "btlm-3b-8k 8192 tp1": ATTENTION_KERNELS,
    "stablelm-2-12b 4096 tp1": ATTENTION_KERNELS,
    "stablelm-2-12b 4096 tp2": ("keys",),
}
"""By shape. With two ranks there are fewer key heads, and so other groups of query heads."""
NUM_MATMULS = {"forward": 2, "queries": 3, "keys": 4}
"""Matrix products that each kernel computes for a pair of query and key. Backward as a whole counts as four."""
PROGRAM = "tests.rivals.kernels.attention_sweep"
NO_GPU = (
    "there is no GPU to measure; without one, --resources compiles the candidates for sm_90, and --device cpu --tokens N runs "
    "the sweep itself in the interpreter (TRITON_INTERPRET=1)"
)


@dataclass
class SweepCase:
    """A candidate at a shape, with its figures."""

    kernel: str
    shape: str
    candidate: str
    own: bool
    """Has the kernel's own sizes."""
    tile_config: dict[str, int]
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    programs_per_multiprocessor: int | None = None
    time_p20_us: float | None = None
    time_p50_us: float | None = None
    time_p80_us: float | None = None
    num_repetitions: int | None = None
    executed_tflops_per_second: float | None = None
    best: bool = False
    note: str = ""
    """Why it was not measured."""


@dataclass(frozen=True)
class KernelInputs:
    """The arguments of the kernels at one shape."""

    out_gradient: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    settings: tuple[float, Tensor | None, Tensor | None]
    """Scale, slopes, starts."""
    out: Tensor
    lse: Tensor
    delta: Tensor


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2, with one line on standard error, for bad usage or without a GPU."""
    begun = time.monotonic()
    options = _parse_arguments(arguments)
    if refusal := _usage_error(options):
        print(f"{PROGRAM}: {refusal}", file=sys.stderr)
        return 2
    deadline = begun + options.seconds
    shapes = {shape.name: shape for shape in attention_shapes(tp_sizes=(1, 2)) if shape.name in SWEPT_KERNELS}
    if options.tokens is not None:
        shapes = {name: _shrink_shape(shape, options.tokens) for name, shape in shapes.items()}
    cases = _sweep_cases(shapes)
    if options.device == "cuda" or options.resources:
        compile_all(cases, shapes, deadline)
    if options.resources:
        _report_cases(cases, options.json, COMPILED_DEVICE)
        return 0
    device = torch.device(options.device)
    print(*(f"{name} {value}" for name, value in environment(device_name(device)).items()), sep="; ")
    for name, shape in shapes.items():
        _measure_shape([case for case in cases if case.shape == name], shape, device, deadline, options.json)
    _report_best(cases, shapes)
    return 0


def compile_all(cases: list[SweepCase], shapes: dict[str, Shape], deadline: float = math.inf) -> None:
    """Compile every variant once, in one process per processor, and write the resources it needs into its cases."""
    variants: dict[Any, list[SweepCase]] = {}
    for case in cases:
        constants = tuple((name, value) for name, value in case.tile_config.items() if name != "heads_in_l2")
        variants.setdefault((case.kernel, shapes[case.shape].head_dim, constants), []).append(case)
    workers = min(len(os.sched_getaffinity(0)), len(variants), 16)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    submitted = [
        (same, pool.submit(compile_case, same[0].kernel, shapes[same[0].shape], same[0].tile_config))
        for same in variants.values()
    ]
    for same, future in submitted:
        found, reason = _compile_result(future, deadline)
        for case in same:
            for name, value in found.items():
                setattr(case, name, value)
            case.note = reason
    pool.shutdown(wait=False, cancel_futures=True)


def compile_case(kernel: str, shape: Shape, tile_config: dict[str, int]) -> dict[str, int]:
    """Return the resources that the kernel needs. Triton's cache keeps the binary for later launches.

    Raises: RuntimeError if Triton interprets; any exception of the compiler.
    """
    one, *_ = compile_launched(lambda: run_kernel(kernel, _kernel_inputs(shape, torch.device("meta")), tile_config))
    return {
        "registers": one.registers, "spilled_bytes": one.spilled_bytes, "shared_bytes": one.shared_bytes,
        "programs_per_multiprocessor": blocks_per_multiprocessor(one),
    }  # fmt: skip


def run_kernel(kernel: str, values: KernelInputs, tile_config: dict[str, int]) -> tuple[Tensor, ...]:
    """Return the results of one kernel."""
    from tandem.kernels.device import attention as device

    inputs, settings = (values.query, values.key, values.value), values.settings
    if kernel == "forward":
        return device.forward(*inputs, *settings, tile_config=tile_config)
    if kernel == "queries":
        return device.backward_query(
            values.out_gradient, *inputs, values.out, values.lse, *settings, tile_config=tile_config
        )  # fmt: skip
    return device.backward_key_value(
        values.out_gradient, *inputs, values.lse, values.delta, *settings, tile_config=tile_config
    )


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(PROGRAM, description="Measure the attention kernels with other tile sizes.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line per candidate to this file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no candidate after this time")
    parser.add_argument(
        "--resources", action="store_true", help="only compile for sm_90 and print each candidate's resources"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--tokens", type=int, help="measure one row of so many tokens, with one key head and its query heads"
    )
    return parser.parse_args(arguments)


def _usage_error(options: argparse.Namespace) -> str:
    """Why the options cannot be honoured; empty if they can."""
    if options.tokens is not None and options.tokens < 1:
        return f"--tokens {options.tokens}: must be at least 1"
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        return f"--json {options.json}: must be a file in a folder that exists"
    if options.resources:
        interpreting = "--resources: TRITON_INTERPRET is set, so nothing would be compiled; unset it"
        return interpreting if triton.knobs.runtime.interpret else ""
    if options.device == "cuda":
        return "" if torch.cuda.is_available() else NO_GPU
    is_interpreting = triton.knobs.runtime.interpret
    return (
        "" if is_interpreting else "--device cpu: set TRITON_INTERPRET=1; kernels run on a CPU only in the interpreter"
    )


def _shrink_shape(shape: Shape, tokens: int) -> Shape:
    """Shrink a shape for the interpreter, which is a million times slower than a GPU and cannot multiply bf16."""
    heads = shape.num_heads // shape.num_kv_heads
    return replace(shape, tokens=tokens, batch_size=1, num_heads=heads, num_kv_heads=1, dtype=torch.float32)


def _sweep_cases(shapes: dict[str, Shape]) -> list[SweepCase]:
    return [
        SweepCase(kernel, name, candidate, index == 0, sizes)
        for name, shape in shapes.items()
        for kernel in SWEPT_KERNELS[name]
        for index, (candidate, sizes) in enumerate(candidate_configs(kernel, shape))
    ]


def _compile_result(future: "Future[dict[str, int]]", deadline: float) -> tuple[dict[str, int], str]:
    """Return the resources, or the reason why there are none."""
    try:
        return future.result(None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())), ""
    except TimeoutError:
        return {}, "not compiled: out of time"
    except BrokenProcessPool:
        # Another variant may have killed the process. The launch of this one compiles it again and reports why it fails.
        return {}, ""
    # The compiler may raise anything; a variant that fails is one line.
    except Exception as reason:
        return {}, f"not compiled: {one_line_reason(reason)}"


def _kernel_inputs(shape: Shape, device: torch.device) -> KernelInputs:
    """The inputs of the benchmark, and the results of the kernels' own sizes on them."""
    if device.type == "meta":

        def empty(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        query, key = (
            empty(shape.batch_size, shape.tokens, count, shape.head_dim)
            for count in (shape.num_heads, shape.num_kv_heads)
        )
        slopes = empty(shape.num_heads, dtype=torch.float32) if shape.has_alibi else None
        begin = empty(shape.batch_size, shape.tokens, dtype=torch.int32) if shape.document_masking else None
        lse = empty(shape.batch_size, shape.num_heads, shape.tokens, dtype=torch.float32)
        out = empty(shape.tokens, shape.batch_size, shape.num_heads, shape.head_dim).transpose(0, 1)
        return KernelInputs(query, query, key, key, (shape.attention_scale, slopes, begin), out, lse, lse)
    example = seeded_example(ATTENTION.make_example, shape, device)
    query, key, value = (tensor.detach() for tensor in example.inputs)
    settings = shape.attention_scale, slopes_of(shape, device), document_starts(shape, device)
    values = KernelInputs(example.out_gradients[0], query, key, value, settings, *[query] * 3)
    out, lse = run_kernel("forward", values, candidate_configs("forward", shape)[0][1])
    values = replace(values, out=out, lse=lse)
    return replace(values, delta=run_kernel("queries", values, candidate_configs("queries", shape)[0][1])[1])


def _input_sets(values: KernelInputs) -> list[KernelInputs]:
    """Copies of the values that together exceed the L2 cache."""
    tensors = {name: tensor for name, tensor in vars(values).items() if isinstance(tensor, Tensor)}
    copies = num_input_sets(tensors.values()) - 1
    # clone() keeps strides: tokens are outermost in `out`.
    return [values] + [
        KernelInputs(settings=values.settings, **{name: x.clone() for name, x in tensors.items()})
        for _ in range(copies)
    ]


def _measure_shape(
    cases: list[SweepCase], shape: Shape, device: torch.device, deadline: float, file: Path | None
) -> None:  # fmt: skip
    try:
        sets = _input_sets(_kernel_inputs(shape, device)) if time.monotonic() < deadline else []
        reason = "not measured: out of time"
    except Exception as failure:
        sets, reason = [], f"not measured: the kernels' own sizes fail here: {one_line_reason(failure)}"
    for kernel in dict.fromkeys(case.kernel for case in cases):
        kernel_cases = [case for case in cases if case.kernel == kernel]
        if sets:
            _measure_kernel(kernel_cases, shape, sets, device, deadline)
        else:
            for case in kernel_cases:
                case.note = case.note or reason
        _report_cases(kernel_cases, file, device_name(device))


def _measure_kernel(
    cases: list[SweepCase], shape: Shape, sets: list[KernelInputs], device: torch.device, deadline: float
) -> None:  # fmt: skip
    expected: tuple[str, list[Tensor]] | None = None
    running = []
    for case in cases:
        if time.monotonic() >= deadline:
            case.note = case.note or "not measured: out of time"
        if case.note:
            continue
        try:
            found = [*run_kernel(case.kernel, sets[0], case.tile_config)]
            check_agreement(expected, found)
        # A variant may raise anything; one that fails is one line.
        except Exception as reason:
            case.note = f"not measured: {one_line_reason(reason)}"
            continue
        if case.own:
            expected = "its own sizes", found
        running.append(case)
    if expected is None:
        for case in running:
            case.note = "not measured: nothing to compare its results with"
        return
    flops = ATTENTION.work(shape)[0].flops * NUM_MATMULS[cases[0].kernel] / 2
    found_times = time_interleaved([_timed_turn(case, sets, device) for case in running], device)
    for case, times in zip(running, found_times, strict=True):
        if not times:
            continue
        timing = times[""]
        for name, value in timing._asdict().items():
            setattr(case, name, value)
        case.executed_tflops_per_second = flops / timing.time_p50_us / 1e6
    measured = [case for case in running if case.time_p50_us is not None]
    if measured:
        min(measured, key=_median_us).best = True


def _timed_turn(case: SweepCase, sets: list[KernelInputs], device: torch.device) -> Callable[[], PassTimes]:
    def turn() -> PassTimes:
        try:
            return {"": time_calls(lambda values: run_kernel(case.kernel, values, case.tile_config), sets, device)}
        except Exception as reason:
            case.note = f"not measured: {one_line_reason(reason)}"
            return {}

    return turn


def _median_us(case: SweepCase) -> float:
    return math.inf if case.time_p50_us is None else case.time_p50_us


def _report_cases(cases: list[SweepCase], file: Path | None, device: str) -> None:
    """Print a line for each case, with a star for the best and "own" for the kernel's own sizes."""
    for case in cases:
        resource_numbers = case.registers, case.spilled_bytes, case.shared_bytes, case.programs_per_multiprocessor
        timing_numbers = case.time_p20_us, case.time_p50_us, case.time_p80_us, case.executed_tflops_per_second
        numbers = [
            *("-" if x is None else str(x) for x in resource_numbers),
            *("-" if x is None else f"{x:.1f}" for x in timing_numbers),
        ]
        marks = "*" * case.best + " own" * case.own
        columns = [case.kernel.ljust(8), case.shape.ljust(24), case.candidate.ljust(46), *(x.rjust(8) for x in numbers)]
        print(" ".join([*columns, marks, case.note]).rstrip(), flush=True)
    if file is not None:
        with file.open("a") as out:
            out.writelines(
                json.dumps({"op": "attention sweep", **asdict(case), **environment(device)}) + "\n" for case in cases
            )


def _report_best(cases: list[SweepCase], shapes: dict[str, Shape]) -> None:
    """Print the best candidate of every kernel and shape next to its own sizes, and the rates of both directions."""
    print("best of each")
    for name, shape in shapes.items():
        of_shape = [case for case in cases if case.shape == name]
        for case in of_shape:
            if case.best:
                own = next(_median_us(other) for other in of_shape if other.kernel == case.kernel and other.own)
                print(
                    f"{case.kernel:8} {name:24} {case.candidate:46} {_median_us(case):9.1f} us, own sizes {own:9.1f} us"
                )
        best = {case.kernel: _median_us(case) for case in of_shape if case.best}
        own_times = {case.kernel: _median_us(case) for case in of_shape if case.own}
        forward_work, backward_work = ATTENTION.work(shape)
        for direction, kernels, work in (
            ("forward", ("forward",), forward_work),
            ("backward", ("queries", "keys"), backward_work),
        ):
            if all(kernel in best for kernel in kernels):
                rates = [work.flops / sum(times[kernel] for kernel in kernels) / 1e6 for times in (best, own_times)]
                print(
                    f"{direction:8} {name:24} counted TFLOP/s: {rates[0]:.1f} at best, {rates[1]:.1f} with its own sizes"
                )


if __name__ == "__main__":
    sys.exit(main())
