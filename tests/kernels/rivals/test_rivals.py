"""The rivals on the CPU: each computes the same as ours, or compiles with its arguments.

Only a GPU can run what is in `UNMEASURABLE`, and can check the values of what is in `ARGUMENTS_IN_PYTHON`.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import triton

from tandem.kernels.bench.compare import NotMeasured, check_agreement, seeded_example
from tandem.kernels.bench.ops import document_ids
from tests.kernels.bench.smallest import TOKENS, smallest
from tests.kernels.bench.square import CEILINGS, CPU
from tests.rivals.kernels import single_rank
from tests.rivals.kernels.compare import measure_rivals, rival_function, run_forward_backward
from tests.rivals.kernels.ops import OPERATIONS
from tests.rivals.kernels.ops import attention as attention_rivals

EVERY_OPERATION = pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS)
UNMEASURABLE = {
    "flash-attn", "flex, flash-attn 4", "liger CuTe", "megatron rope", "sdpa cudnn", "flex", "our kernel", "varlen_attn",
}  # fmt: skip
"""Not installed, or nothing without a GPU or at the shape. flex has a forward pass on a CPU, which another test compares, and
varlen_attn runs on the meta device."""
ARGUMENTS_IN_PYTHON = {"liger", "liger, halves apart", "torch, liger norm", "liger fused buffer"}
"""Their kernels take a number for a tensor, or compute in bf16. The interpreter can do neither, so they are only compiled."""


@pytest.fixture
def eager():
    """Run compiled functions eagerly, and remove the process group that some rivals create."""
    with torch.compiler.set_stance("force_eager"):
        yield
    single_rank.destroy_group()


@EVERY_OPERATION
def test_every_rival_computes_the_same_as_ours(op, eager):
    """Runs in Triton's interpreter, so that no wrong argument loses a figure on a GPU. The names above are left out."""
    shape, reference = smallest(op), None
    example = seeded_example(op.make_example, shape, CPU)
    for rival in op.rivals:
        if rival.name in UNMEASURABLE or (rival.name in ARGUMENTS_IN_PYTHON and "cross_entropy" not in op.name):
            continue
        if rival.needs_gpu and not triton.knobs.runtime.interpret:
            continue  # with a GPU kernels are compiled and take no CPU tensors
        if "liger" in rival.name and find_spec("liger_kernel") is None:
            continue
        if rival.substitute_shape(shape) == shape:
            found, _, _ = run_forward_backward(rival_function(rival, shape, CPU), example)
            check_agreement(reference, found)
            reference = reference or (rival.name, found)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documented", [False, True], ids=["biases", "documents and groups"])
def test_flex_is_given_the_biases_and_documents_that_ours_is(documented, eager):
    op = OPERATIONS["attention"]
    name = "demo-stablelm 128 tp1" if documented else "demo-btlm 128 tp1"
    shape = replace(next(shape for shape in op.extra_shapes if shape.name == name), tokens=1_500, batch_size=2)
    inputs = [x.detach() for x in seeded_example(op.make_example, shape, CPU).inputs]
    apart = document_ids(shape, CPU)
    assert (apart is not None and bool(apart.any())) == documented
    found = {rival.name: rival.make_function(shape)(*inputs) for rival in op.rivals if rival.name in ("ours", "flex")}
    check_agreement(("ours", [found["ours"]]), [found["flex"]])


@pytest.mark.parametrize("model", ["stablelm-2-12b", "stablelm-2-1_6b"])
def test_varlen_takes_documents_of_grouped_and_other_heads(model):
    """Checks arguments and the shapes of results and gradients on the meta device."""
    op = OPERATIONS["attention"]
    shape = next(shape for shape in op.shapes if shape.name == f"{model} 4096 tp1")
    rival = next(rival for rival in op.rivals if rival.name == "varlen_attn")
    query, key, value = inputs = [
        torch.empty(
            shape.batch_size, shape.tokens, count, shape.head_dim, dtype=shape.dtype, device="meta", requires_grad=True
        )
        for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    ]
    out = rival.make_function(shape)(*inputs)
    gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert [x.shape for x in (out, *gradients)] == [x.shape for x in (query, query, key, value)]


def test_documents_lie_behind_one_another_as_the_rows_have_them():
    shape = replace(
        next(shape for shape in OPERATIONS["attention"].shapes if shape.document_masking), tokens=3_000, batch_size=2
    )
    longest, ends = attention_rivals.max_and_cu_seqlens(shape)
    bounds = ends(CPU)
    apart = (document_ids(shape, CPU) + torch.tensor([[0], [10_000]])).flatten()
    changes = (apart[1:] != apart[:-1]).nonzero().flatten() + 1
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, *changes.tolist(), 6_000]
    assert longest == int(bounds.diff().max())


def test_varlen_is_for_documents_alone():
    op = OPERATIONS["attention"]
    for name, reason in (("btlm-3b-8k 2048 tp1", "has no biases"), ("flash 2048 hd64", "is the kernel of sdpa flash")):
        shape = next(shape for shape in op.shapes if shape.name == name)
        with pytest.raises(NotMeasured, match=reason):
            next(rival for rival in op.rivals if rival.name == "varlen_attn").make_function(shape)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="Liger is not installed")
def test_what_cannot_be_interpreted_takes_its_arguments_and_compiles():
    """Checks shapes of results and gradients on the meta device, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = "from tests.kernels.rivals.meta_device import print_rival_shapes; print_rival_shapes()"
    command = [sys.executable, "-W", "ignore", "-c", program, str(TOKENS), *sorted(ARGUMENTS_IN_PYTHON)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert {line["rival"] for line in lines} == ARGUMENTS_IN_PYTHON
    assert {line["op"] for line in lines} == {"swiglu", "swiglu_linear", "residual_norm"}
    for line in lines:
        assert line["found"] == line["expected"], line
    assert sum(line["kernels"] for line in lines) >= 2 * 3  # both directions of both swiglus and of the norm


def test_a_kernel_of_ours_is_not_named_where_none_runs():
    op = OPERATIONS["attention"]
    for name, reason in (("demo-btlm 128 tp1", "ours is this kernel already"), ("flash 2048 hd64", "needs a GPU")):
        shape = next(shape for shape in op.shapes + op.extra_shapes if shape.name == name).with_tokens(TOKENS)
        found = list(measure_rivals(op, shape, CPU, CEILINGS, lambda name: name == "our kernel"))
        assert [row["time_p50_us"] for row in found] == [None]
        assert found[0]["note"].startswith("not measured: ")
        assert found[0]["note"].endswith(reason)
