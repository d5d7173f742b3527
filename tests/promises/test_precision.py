"""What stays fp32 in a bf16 run; that an update is AdamW's, clipped, group by group; that recomputing is invisible."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tandem.kernels.attention import alibi_slopes
from tandem.kernels.documents import document_starts
from tandem.kernels.rope import rotary_table
from tandem.trainer import models
from tandem.trainer.config.padding import padded_size
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models.mup import parameter_rules
from tandem.trainer.startup import build_engine
from tests import ranks, tiny_configs
from tests.sharded import fill

SMALL = 2**-9
"""Less than half of the last of bf16's eight bits: 1 + SMALL is 1 there, and exact in fp32."""
FP32_ROUNDING = 2**-23


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


def engine(variant: str, mesh: Mesh, **sections: dict) -> Engine:
    return build_engine(tiny_configs.make_config(variant, **sections), mesh, None)


def in_bf16(variant: str, mesh: Mesh) -> Engine:
    return engine(variant, mesh, run={"precision": "bf16"})


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: safe_get_full_grad(parameter).clone() for name, parameter in engine.model.named_parameters()}


def buffers(engine: Engine) -> list[Tensor]:
    """Where DeepSpeed's BF16 optimizer sums gradients, one for each group."""
    return engine._deepspeed_engine.optimizer.fp32_groups_gradients_flat


# --- accumulation and reduction


def test_micro_batches_accumulate_in_fp32(mesh):
    """63 gradients of which bf16 would lose every one, after a large one, come out to the last bit."""
    bf16 = in_bf16("btlm", mesh)
    loss = bf16(*tiny_configs.global_batch(0)).mean()
    bf16.backward(loss, is_last=False)
    first = gradients(bf16)
    for index in range(63):
        bf16.backward(bf16(*tiny_configs.global_batch(0)).mean() * SMALL, is_last=index == 62)
    for name, found in gradients(bf16).items():
        assert found.dtype == torch.float32
        rounded = first[name].bfloat16()
        assert torch.equal(rounded.float(), first[name])  # one micro-batch's is a bf16 number
        assert torch.equal(rounded + rounded * SMALL, rounded)  # and a sum in bf16 would stay there
        assert torch.equal(found, first[name] * (1 + 63 * SMALL)), name


def reduced() -> list[tuple[torch.dtype, bool]]:
    """Of each gradient buffer: its dtype, and whether it is the exact mean of a large and a small gradient."""
    with mesh_context(1) as mesh:
        bf16 = in_bf16("btlm", mesh)
        factor = SMALL if mesh.dp_rank else 1.0
        bf16.backward(bf16(*tiny_configs.global_batch(0)).mean() * factor, is_last=False)
        alone = [buffer / factor for buffer in buffers(bf16)]
        bf16.backward(bf16(*tiny_configs.global_batch(0)).mean() * 0.0, is_last=True)
        means = [gradient * (1 + SMALL) / 2 for gradient in alone]
        return [(buffer.dtype, torch.equal(buffer, mean)) for buffer, mean in zip(buffers(bf16), means, strict=True)]


@pytest.mark.dist
def test_data_parallel_ranks_reduce_in_fp32(tmp_path: Path):
    found = ranks.run(reduced, 2, tmp_path)
    assert found == [[(torch.float32, True)] * 3] * 2


def test_masters_and_moments_are_fp32(mesh):
    """And the weights of the model are the masters' rounding."""
    bf16 = in_bf16("btlm", mesh)
    bf16.backward(bf16(*tiny_configs.global_batch(0)).mean(), is_last=True)
    bf16.update(lr=1e-3)
    parameters = dict(bf16.model.named_parameters())
    for fragment in bf16.optimizer_fragments():
        assert {fragment.master.dtype} | {m.dtype for m in fragment.moments.values()} == {torch.float32}
        assert len(fragment.moments) == 2
        parameter = parameters[fragment.name].detach()
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(fragment.master.bfloat16(), parameter.reshape(-1))
        assert not torch.equal(fragment.master, parameter.reshape(-1).float())


# --- what casting the module must not touch


def test_alibi_slopes_stay_fp32(mesh):
    slopes = in_bf16("btlm", mesh).model.layer_context(tiny_configs.global_batch(0)[2], None).slopes
    assert slopes.dtype == torch.float32
    assert torch.equal(slopes, alibi_slopes(4))


def test_rotary_tables_stay_fp32(mesh):
    documents = tiny_configs.global_batch(0, seq_len=64)[2]
    context = in_bf16("stablelm", mesh).model.layer_context(documents, None)
    exact = rotary_table(torch.arange(64) - document_starts(documents), 4, 10_000.0)
    for found, expected in zip((context.cos, context.sin), exact, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_the_loss_is_fp32(mesh, variant):
    losses = in_bf16(variant, mesh)(*tiny_configs.global_batch(0))
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, losses.bfloat16().float())


# --- one update

LR, EPSILON, DECAY = 1e-2, 1e-4, 0.1


def settings(variant: str, name: str) -> tuple[float, float]:
    """lr factor and decay, in words of names: the width is twice muP's base, and Stable LM has no muP."""
    if "norm" in name or name.endswith("bias"):
        return 1.0, 0.0
    return (1.0 if variant != "btlm" or name == "embedding.weight" else 0.5), DECAY


@pytest.mark.parametrize("variant", ["btlm", "stablelm"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_one_update_is_adamw_of_the_clipped_gradient(mesh, variant, max_grad_norm, zero_stage):
    """At the first update both moments are the gradient's, so AdamW moves by lr * g / (|g| + epsilon)."""
    optim = {"max_grad_norm": max_grad_norm, "eps": EPSILON, "weight_decay": DECAY}
    fp32 = engine(variant, mesh, optim=optim, parallel={"zero_stage": zero_stage})
    before = {name: parameter.detach().clone() for name, parameter in fp32.model.named_parameters()}
    fp32.backward(fp32(*tiny_configs.global_batch(0)).mean(), is_last=True)
    gradient = gradients(fp32)
    norm = float(fp32.grad_norm())
    fp32.update(LR)
    assert norm == pytest.approx(float(torch.cat([g.double().flatten() for g in gradient.values()]).norm()), rel=1e-5)
    factor = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
    for name, parameter in fp32.model.named_parameters():
        lr_scale, decay = settings(variant, name)
        clipped, lr = gradient[name].double() * factor, LR * lr_scale
        moved = -lr * decay * before[name] - lr * clipped / (clipped.abs() + EPSILON)
        error = float((parameter.detach() - before[name] - moved).norm())
        # The clip factor is known to 1e-5, and the sum is rounded to fp32 at the size of the weights.
        assert error <= 2e-5 * float(moved.norm()) + FP32_ROUNDING * float(before[name].norm()), name


@pytest.mark.parametrize("variant", ["btlm", "stablelm"])
def test_zero_1_trains_as_zero_0(mesh, variant):
    """Bit for bit; unclipped, because the two sum the norm, and so round the clip factor, in another order."""
    found = []
    for zero_stage in (0, 1):
        fp32 = engine(variant, mesh, optim={"max_grad_norm": 0.0}, parallel={"zero_stage": zero_stage})
        for step in range(3):
            fp32.backward(fp32(*tiny_configs.global_batch(step)).mean(), is_last=True)
            fp32.update(LR)
        found.append(dict(fp32.model.named_parameters()))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


# --- recomputation


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_recomputation_changes_memory_only(mesh, variant, precision):
    """Losses and gradients to the last bit; `full` keeps less for backward than `selective`, that less than `none`."""
    config = tiny_configs.make_config(variant)
    found, saved_bytes = [], []
    for recompute in ("none", "selective", "full"):
        model = models.build_model(config.model, config.mup, mesh, dtype=precision, recompute=recompute)
        fill(model, parameter_rules(config.model, config.mup), seed=1, truncation_sigmas=2.0, mesh=mesh)
        losses, kept = saving(lambda model=model: model(*tiny_configs.global_batch(0)), model)
        losses.mean().backward()
        found.append({"losses": losses, **{name: p.grad for name, p in model.named_parameters()}})
        saved_bytes.append(kept)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    none, selective, full = saved_bytes
    tokens, ffn_hidden_size = (
        tiny_configs.GLOBAL_BATCH_SIZE * tiny_configs.SEQ_LEN,
        padded_size(config.model.ffn_hidden_size, 1),
    )
    ffn_products = config.model.num_layers * tokens * ffn_hidden_size * precision.itemsize
    assert selective < none - ffn_products  # the rest is attention's
    assert full < 0.5 * selective


def saving(forward, model: torch.nn.Module) -> tuple[Tensor, int]:
    """forward(), and the bytes of distinct tensors that it keeps for backward, parameters not counted."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return result, sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in own)
