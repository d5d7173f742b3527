"""Every kernel at every shape of the shipped configs, compiled for a Hopper GPU."""

import json
import os
import subprocess
import sys

import pytest

from kernels.bench.ops import OPERATIONS
from kernels.bench.resources import blocks_per_multiprocessor
from kernels.device.offline import Compiled

KERNELS = {
    "swiglu": {"_forward", "_backward"},
    "swiglu_linear": {"_forward", "_backward"},
    "qkv": {"_forward", "_backward"},
    "cross_entropy": {"_add", "_gradient"},
    "linear_cross_entropy": {"_add", "_gradient"},
    "attention": {"_forward", "_backward_queries", "_backward_keys"},
}

SPILLED_BYTES = {("attention", "stablelm-2-12b", "_backward_keys"): 32}
"""Under triton 3.9, outside of all loops; the sentence is beside the sizes of that kernel. Anything else is none."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[int, list[dict]]:
    """Exit code and rows, from a process that does not interpret and has compiled nothing before."""
    folder = tmp_path_factory.mktemp("resources")
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.bench", "--resources", "--json", folder / "rows.jsonl"]
    ended = subprocess.run(
        command, env=without | {"TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode in (0, 1), ended.stderr
    return ended.returncode, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_at_every_shape(table):
    expected = {
        (name, shape.name, kernel)
        for name, kernels in KERNELS.items()
        for shape in OPERATIONS[name].shapes + OPERATIONS[name].more_shapes
        for kernel in kernels
    }
    assert {(row["op"], row["shape"], row["kernel"]) for row in table[1]} == expected


@pytest.mark.slow
def test_no_kernel_spills_within_a_loop_and_each_fits_a_multiprocessor(table):
    code, rows = table
    spilled = {}
    for row in rows:
        assert row["blocks_per_multiprocessor"] >= 1
        name = (row["op"], row["shape"].split()[0], row["kernel"])
        spilled[name] = max(spilled.get(name, 0), row["spilled_bytes"])
    assert {name: size for name, size in spilled.items() if size > SPILLED_BYTES.get(name, 0)} == {}
    assert code == any(spilled.values())


def test_all_operations_with_kernels_are_compiled():
    assert {name for name, op in OPERATIONS.items() if op.launches is not None} == set(KERNELS)


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "blocks"),
    [(32, 0, 4, 16), (33, 0, 4, 12), (255, 0, 8, 1), (32, 100 * 1024, 4, 2), (16, 0, 1, 32)],
    ids=["threads", "registers in units of eight", "registers", "shared memory", "blocks"],
)
def test_blocks_at_once_are_limited_by_what_runs_out_first(registers, shared_bytes, num_warps, blocks):
    assert blocks_per_multiprocessor(Compiled("kernel", registers, 0, shared_bytes, num_warps)) == blocks
