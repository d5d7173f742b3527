"""Plans, synthetic rows and profile tables of `tandem bench`. tests/promises/test_bench.py runs its steps."""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from tandem.trainer import models
from tandem.trainer.__main__ import main
from tandem.trainer.config import TrainConfig, flops, load_config
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.tools import bench
from tandem.trainer.tools.bench import step_profile
from tandem.trainer.tools.bench.plan import PhasePlan, build_plans
from tandem.trainer.tools.bench.synthetic_batch import (
    DOCUMENT_LENGTH_SIGMA,
    MEDIAN_DOCUMENT_TOKENS,
    draw_batch,
    draw_document_indices,
)
from tests import tiny_configs

ROOT = Path(__file__).parents[4]
CONFIGS = ROOT / "configs"


def plans(command: str, world_size: int = 1) -> tuple[TrainConfig, TrainConfig, list[PhasePlan]]:
    """Return the config that the command names, the config that is trained, and the plans."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = parser.parse_args(command.split())
    given = load_config(CONFIGS / arguments.config, arguments.overrides)
    return given, *build_plans(given, arguments, world_size)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


@pytest.mark.parametrize(
    ("command", "rows", "seq_len", "micro_batch_size", "parameters"),
    [
        ("btlm-3b-8k.yaml parallel.tp_size=1 --phase 2k", 16, 2_048, 4, 2_646_255_744),
        ("btlm-3b-8k.yaml parallel.tp_size=1 --phase 8k", 4, 8_192, 1, 2_646_255_744),
        (
            "btlm-3b-8k.yaml parallel.tp_size=1 --phase 2k --micro-batch-size 2 --global-batch-size 8",
            8,
            2_048,
            2,
            2_646_255_744,
        ),
        (
            "stablelm-2-12b.yaml parallel.tp_size=1 --num-layers 6",
            4,
            4_096,
            1,
            2 * 513_802_240 + 6 * (277_872_640 + 6_400) + 7 * 5_120,
        ),
    ],
)
def test_the_full_size_commands_plan_models_of_real_width(command, rows, seq_len, micro_batch_size, parameters, mesh):
    given, config, [plan] = plans(command)
    phase = plan.span.phase
    assert (phase.global_batch_size, phase.seq_len, phase.micro_batch_size) == (rows, seq_len, micro_batch_size)
    assert plan.recipe_num_layers == given.model.num_layers
    assert plan.recipe_global_batch_size == {2_048: 1_920, 8_192: 480, 4_096: 1_536}[seq_len]
    meta = torch.device("meta")
    with meta:
        placed = Mesh(**vars(mesh) | {"device": meta})
        model = models.build_model(config.model, config.mup, placed, dtype=torch.bfloat16)
    assert len(model.layers) == config.model.num_layers
    assert sum(math.prod(sharding_of(parameter).global_shape) for parameter in model.parameters()) == parameters
    assert flops.num_parameters(config.model) == parameters


def test_other_rows_change_no_learning_rate_and_no_step():
    given, config, found = plans("btlm-3b-8k.yaml parallel.tp_size=1 --phase all --global-batch-size 8")
    theirs, ours = Timeline(given.schedule), Timeline(config.schedule)
    assert [plan.span.first_step for plan in found] == [0, 119_727]
    assert ours.total_steps == theirs.total_steps
    for step in (0, 1, 95, 119_727, 119_740, 159_635):
        assert ours.lr_at(step) == theirs.lr_at(step)
        assert ours.phase_span_at(step).phase.name == theirs.phase_span_at(step).phase.name


def test_rows_follow_the_replicas():
    _, _, [plan] = plans("stablelm-2-12b.yaml", world_size=16)
    assert (plan.span.phase.global_batch_size, plan.span.phase.micro_batch_size) == (4 * 8, 1)
    _, _, [plan] = plans("demo-btlm.yaml --phase long", world_size=4)
    assert plan.span.phase.global_batch_size == 4, "the phase's own batch, which has fewer than four micro-batches"


def test_each_phase_has_a_profile_of_its_own():
    _, _, found = plans("demo-btlm.yaml parallel.tp_size=1 --phase all --profile btlm.json.gz")
    assert [plan.trace_path for plan in found] == [Path("btlm-short.json.gz"), Path("btlm-long.json.gz")]
    _, _, [one] = plans("demo-btlm.yaml parallel.tp_size=1 --phase long --profile btlm.json.gz")
    assert one.trace_path == Path("btlm.json.gz")


MISTAKES = {
    "phase": ("--phase medium", ["--phase: 'medium'", "short, long", "or all"]),
    "no layers": ("--num-layers 0", ["--num-layers: 0 is less than 1", "use 1 or more"]),
    "num_layers": ("--num-layers 5", ["--num-layers: 5 is more than the config's 4", "use at most that many"]),
    "rows": (
        "--global-batch-size 12",
        [
            "--global-batch-size: 12",
            "micro-batches of 8 on every replica (replicas: 1)",
            "phase 'short'",
            "use a multiple of 8",
        ],
    ),
    "micro rows": ("--global-batch-size 8 --micro-batch-size 3", ["--global-batch-size: 8", "use a multiple of 3"]),
    "no steps": ("--steps 0", ["--steps: 0 is less than 1", "use 1 or more"]),
    "warm-up": ("--warmup-steps -1", ["--warmup-steps: -1 is less than 0", "use 0 or more"]),
    "more steps than the phase has": (
        "--steps 295",
        [
            "--steps: 295 timed steps make 301 with the warm-up and instrumented steps",
            "'short' has only 300",
            "use fewer",
        ],
    ),
    "profile nowhere": (
        "--profile none/t.json",
        ["--profile: none/t.json", "is a folder, or its folder does not exist", "name another"],
    ),
    "a field": ("optim.clip_nrom=1", ["optim.clip_nrom: 1", "max_grad_norm"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, capfd):
    words, expected = MISTAKES[name]
    overrides = [word for word in words.split() if "=" in word]
    options = [word for word in words.split() if "=" not in word]
    assert main(["bench", str(CONFIGS / "demo-btlm.yaml"), "parallel.tp_size=1", *overrides, *options]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("tandem: ")
    assert [part for part in expected if part not in line] == []


def test_ranks_that_tp_size_does_not_divide_are_refused(capfd):
    assert main(["bench", str(CONFIGS / "demo-btlm.yaml")]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "parallel.tp_size: 2 does not divide 1, the number of ranks" in line


def on(rank: int, size: int) -> Mesh:
    return Mesh(rank, size, rank, 0, 1, rank, size, torch.device("cpu"))


def test_ranks_share_the_rows_of_one_step():
    config = tiny_configs.make_config("stablelm")
    phase = config.schedule.phases[0]
    whole = draw_batch(config, phase, 3, on(0, 1))
    halves = [draw_batch(config, phase, 3, on(rank, 2)) for rank in (0, 1)]
    for name in ("tokens", "targets", "document_ids"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    assert not torch.equal(whole.tokens, draw_batch(config, phase, 4, on(0, 1)).tokens)
    seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=2))
    assert not torch.equal(whole.tokens, draw_batch(seeded, phase, 3, on(0, 1)).tokens)


def test_rows_are_of_the_whole_vocabulary_and_targets_follow():
    config = tiny_configs.make_config("btlm")
    phase = dataclasses.replace(config.schedule.phases[0], global_batch_size=400)
    batch = draw_batch(config, phase, 0, on(0, 1))
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.tokens.unique().tolist() == list(range(config.model.vocab_size))
    assert not batch.document_ids.any(), "one document a row if the model masks none"


def test_documents_have_lengths_of_web_text(generator):
    documents = draw_document_indices(64, 4_096, generator)
    assert not documents[:, 0].any()
    assert set(documents.diff(dim=1).unique().tolist()) == {0, 1}
    begun = int((documents.diff(dim=1) == 1).sum())
    mean = MEDIAN_DOCUMENT_TOKENS * math.exp(DOCUMENT_LENGTH_SIGMA**2 / 2)
    # The standard deviation of a length is sqrt(exp(sigma^2) - 1) means; allow three standard errors of the mean.
    error = 3 * math.sqrt(math.exp(DOCUMENT_LENGTH_SIGMA**2) - 1) / math.sqrt(begun)
    assert 64 * 4_096 / begun == pytest.approx(mean, rel=error)
    assert torch.equal(draw_document_indices(2, 3, generator)[:, 0], torch.zeros(2, dtype=torch.int32)), (
        "rows of very few tokens work too"
    )


KINDS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT": "matmul",
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "optimizer",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>": "norm",
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, 32>": "norm",
    "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long>": "embedding",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "elementwise",
    "Memcpy HtoD (Pageable -> Device)": "memcpy",
    "_forward": "other",
}
"""Names of library kernels in traces of an H100, and their kinds."""


@pytest.mark.parametrize("name", KINDS)
def test_a_kernel_is_known_by_its_name(name):
    assert step_profile.classify_operation([name]) == KINDS[name]


def test_a_generic_name_takes_the_kind_of_the_enclosing_operation():
    assert step_profile.classify_operation(["_forward", "tandem::swiglu", "aten::sum"]) == "swiglu"
    assert step_profile.classify_operation(["aten::mul", "tandem::cross_entropy", "X"]) == "cross-entropy"
    assert step_profile.classify_operation(["aten::mm", "tandem::swiglu_linear"]) == "matmul"
    assert step_profile.classify_operation(["aten::mul", "X"]) == "elementwise"


def test_every_operation_of_ours_has_a_kind():
    """A Triton kernel is called `_forward`; only the enclosing operation identifies it."""
    for file in (ROOT / "kernels").glob("[!_]*.py"):
        import_module(f"tandem.kernels.{file.stem}")
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tandem::")]
    assert len(ours) >= 4
    assert [name for name in ours if step_profile.classify_operation([name]) == step_profile.OTHER_KIND] == []


def event(name: str, start: int, end: int, device: DeviceType, *, annotation: bool = False) -> FunctionEvent:
    """Build an event as torch does from a trace, in microseconds."""
    return FunctionEvent(0, name, 1, start, end, device_type=device, is_user_annotation=annotation, use_device="cuda")


def test_kernels_are_counted_once_by_the_operation_that_launched_them():
    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    swiglu, step = event("tandem::swiglu", 0, 9, cpu), event("Optimizer.step#AdamW.step", 10, 19, cpu, annotation=True)
    inner = event("aten::mul", 11, 12, cpu)
    inner.set_cpu_parent(step)
    swiglu.append_kernel("_forward", 0, 300.0)
    step.append_kernel("Optimizer.step#AdamW.step", 0, 5_000.0)
    inner.append_kernel("elementwise_kernel", 0, 20.0)
    traced = [
        swiglu, step, inner, event("_forward", 100, 400, gpu), event("elementwise_kernel", 400, 420, gpu),
        event("elementwise_kernel", 420, 450, gpu), event("Optimizer.step#AdamW.step", 0, 5_000, gpu, annotation=True),
    ]  # fmt: skip
    found = {
        (one.kind, one.name): (round(one.seconds * 1e6), one.num_calls) for one in step_profile.total_operations(traced)
    }
    assert found == {
        ("swiglu", "_forward"): (300, 1),
        ("optimizer", "elementwise_kernel"): (20, 1),
        ("elementwise", "elementwise_kernel"): (30, 1),
    }


def test_the_table_shows_shares_and_unknown_names():
    spent = [
        step_profile.OperationTotal("matmul", "gemm", 0.06, 3),
        step_profile.OperationTotal("other", "mystery", 0.01, 1),
    ]
    lines = step_profile.format_table(spent, 0.1).splitlines()
    assert lines[1].split() == ["matmul", "60.0%", "60.00", "3"]
    assert lines[4].split()[-1] == "mystery"
    assert lines[-1].split() == ["outside", "operations", "30.0%", "30.00", "0"]
