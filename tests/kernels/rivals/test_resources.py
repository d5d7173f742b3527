"""Every kernel compiles for a Hopper GPU at every shape of the shipped configs, without spilling."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton

from tandem.kernels.bench.ops import OPERATIONS as OURS
from tandem.kernels.bench.shapes import attention_shapes
from tests.rivals.kernels.attention_candidates import ATTENTION_KERNELS, CANDIDATE_CONFIGS, candidate_configs
from tests.rivals.kernels.attention_sweep import SWEPT_KERNELS
from tests.rivals.kernels.launches import LAUNCHES
from tests.rivals.kernels.offline_compile import CompiledKernel
from tests.rivals.kernels.ops import OPERATIONS
from tests.rivals.kernels.resources import (
    COMPILED_DEVICE,
    KNOWN_SPILLS,
    KernelResources,
    blocks_per_multiprocessor,
    describe_spills,
)

pytestmark = pytest.mark.timeout(1_800)  # compiles about a hundred kernels, in minutes of a busy machine
KERNELS = {
    "swiglu": {"_forward", "_backward"},
    "swiglu_linear": {"_forward", "_backward"},
    "qkv": {"_forward", "_backward"},
    "cross_entropy": {"_add", "_gradient"},
    "linear_cross_entropy": {"_add", "_gradient"},
    "attention": {"_forward", "_backward_queries", "_backward_keys"},
}
SMALL_GROUPS = [f"demo-stablelm {seq} tp{tp_size}" for seq in (128, 512) for tp_size in (1, 2)]


class Table(NamedTuple):
    code: int
    said: str
    rows: list[dict]
    assembler: str
    """The output of ptxas for all kernels."""
    ptx: dict[str, list[str]]
    """The input of ptxas, by kernel."""
    cache: Path
    """Triton's cache with these kernels."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    """The table, compiled with an empty cache."""
    folder = tmp_path_factory.mktemp("resources")
    ended, rows = compiled_rows("tests.rivals.kernels", folder, TRITON_DUMP_PTXAS_LOG="1")
    assert ended.returncode in (0, 1), ended.stderr
    ptx: dict[str, list[str]] = {}
    for file in folder.glob("*/*.ptx"):
        ptx.setdefault(file.stem, []).append(file.read_text())
    return Table(ended.returncode, ended.stderr, rows, ended.stdout, ptx, folder)


def compiled_rows(module: str, cache: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Run `module --resources` in a process that does not interpret; with its rows."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings
    command = [sys.executable, "-m", module, "--resources", "--json", cache / f"{module}.jsonl"]
    ended = subprocess.run(command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    return ended, [json.loads(line) for line in (cache / f"{module}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_at_every_shape(table):
    expected = {
        (name, shape.name, kernel)
        for name, kernels in KERNELS.items()
        for shape in OPERATIONS[name].shapes + OPERATIONS[name].extra_shapes
        for kernel in kernels
    }
    # With one program per block and key head there would be too few, so partial sums are added.
    for shape in ("stablelm-2-12b 4096 tp2", "stablelm-2-12b 4096 tp4", *SMALL_GROUPS):
        expected.add(("attention", shape, "_sum_parts"))
    assert {(row["op"], row["shape"], row["kernel"]) for row in table.rows} == expected


@pytest.mark.slow
def test_no_kernel_spills_beyond_the_known_and_each_fits_a_multiprocessor(table):
    code, said, rows, *_ = table
    spilled = {}
    for row in rows:
        assert row["blocks_per_multiprocessor"] >= 1
        name = (row["op"], row["shape"].split()[0], row["kernel"])
        spilled[name] = max(spilled.get(name, 0), row["spilled_bytes"])
    assert {name: size for name, size in spilled.items() if size > KNOWN_SPILLS.get(name, 0)} == {}
    assert code == 0
    assert said.count(": known\n") == len(said.splitlines())


@pytest.mark.slow
def test_every_row_says_what_it_was_compiled_by(table):
    for row in table.rows:
        assert (row["device"], row["torch"], row["triton"]) == (COMPILED_DEVICE, torch.__version__, triton.__version__)
        assert row["commit"]


@pytest.mark.slow
def test_products_of_bf16_tiles_are_asynchronous_and_none_waits_for_the_one_before(table):
    """Products use Hopper's wgmma. If ptxas serializes them, it writes one of its notes C7510 to C7515."""
    assert table.assembler.count("Compiling entry function") == sum(map(len, table.ptx.values())), "ptxas was verbose"
    assert "wgmma.mma_async instructions are serialized" not in table.assembler
    assert "(C75" not in table.assembler
    products = [text for kernels in table.ptx.values() for text in kernels if "mma" in text and ".bf16" in text]
    assert len(products) >= len(table.ptx["_backward_keys"])
    assert [text[:200] for text in products if "wgmma.mma_async" not in text or "mma.sync" in text] == []


@pytest.mark.slow
def test_every_candidate_of_attention_compiles_and_none_but_one_spills(table):
    """After the table, whose kernels are among the candidates."""
    ended, rows = compiled_rows("tests.rivals.kernels.attention_sweep", table.cache)
    assert ended.returncode == 0, ended.stderr
    shapes = {shape.name: shape for shape in attention_shapes(tp_sizes=(1, 2))}
    expected = {
        (kernel, shape, candidate)
        for shape, kernels in SWEPT_KERNELS.items()
        for kernel in kernels
        for candidate, _ in candidate_configs(kernel, shapes[shape])
    }
    assert {(row["kernel"], row["shape"], row["candidate"]) for row in rows} == expected
    assert {row["note"] for row in rows} == {""}
    spills = {(row["kernel"], row["candidate"]) for row in rows if row["spilled_bytes"]}
    assert spills == {("forward", "128x64, 8 warps, 3 stages, 128 registers")}
    assert all(row["programs_per_multiprocessor"] >= 1 for row in rows)
    assert CANDIDATE_CONFIGS.keys() == set(ATTENTION_KERNELS)


def spilling(shape: str, size: int) -> KernelResources:
    return KernelResources("attention", shape, "_backward_keys", 255, size, 0, 8, 1)


def test_spills_are_told_by_kernel_and_those_of_the_list_are_known(monkeypatch):
    monkeypatch.setitem(KNOWN_SPILLS, ("attention", "stablelm-2-12b", "_backward_keys"), 32)
    known, other = "stablelm-2-12b 4096 tp1", "demo-btlm 128 tp2"
    assert describe_spills([spilling(known, 0), spilling(other, 0)]) == []
    assert describe_spills([spilling(known, 32), spilling("stablelm-2-12b 4096 tp2", 32)]) == [
        ("attention _backward_keys spills 32 bytes at stablelm-2-12b 4096 tp1, stablelm-2-12b 4096 tp2: known", True)
    ]
    assert [is_known for _, is_known in describe_spills([spilling(known, 40), spilling(other, 8)])] == [False, False]


def test_all_operations_with_kernels_are_compiled():
    """OURS is what `tandem.kernels.bench` measures: every operation that has a kernel of ours."""
    assert set(LAUNCHES) == set(KERNELS) == set(OURS)


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "blocks"),
    [(32, 0, 4, 16), (33, 0, 4, 12), (255, 0, 8, 1), (32, 100 * 1024, 4, 2), (16, 0, 1, 32)],
    ids=["threads", "registers in units of eight", "registers", "shared memory", "blocks"],
)
def test_blocks_at_once_are_limited_by_what_runs_out_first(registers, shared_bytes, num_warps, blocks):
    assert blocks_per_multiprocessor(CompiledKernel("kernel", registers, 0, shared_bytes, num_warps)) == blocks
