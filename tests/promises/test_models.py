"""Our models are the published ones, on one rank, two and four: as our references have them, and as transformers runs them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy

from tandem.trainer.checkpoint.hf import description
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.tensor_conversion import to_hf_tensor
from tandem.trainer.checkpoint.read import load_weights
from tandem.trainer.config import BTLMConfig, MupConfig, StableLMConfig
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models import build_model
from tandem.trainer.models.decoder import Decoder
from tests import ranks
from tests.reference.offline import offline
from tests.reference.variants import NOT_IN_TRANSFORMERS, VARIANTS, random_tokens, reference_module, to_fp64
from tests.sharded import joined

__all__ = ["offline"]

NOISE = 4
"""Two evaluations in fp32 stray about equally far from fp64; this leaves room for another order of sums."""
LIMIT = 1e-5
"""Of the range of the logits, of the norm of a gradient: an error that no noise excuses."""
BF16_LIMIT = 1.1
"""Our error in bf16 against fp64, over that of the plain PyTorch model."""

Values = dict[str, Tensor]
"""Logits, losses, and gradients by the names of their parameters."""


class Case(NamedTuple):
    model: StableLMConfig | BTLMConfig
    mup: MupConfig | None


def shared_by(case: Case, tp_size: int) -> Case:
    """A model that so many ranks can share, with an odd ffn_hidden_size, and padding that lies on the last rank."""
    model = replace(case.model, vocab_size=case.model.vocab_size + 200, ffn_hidden_size=151)
    while model.num_heads % tp_size or model.num_kv_heads % tp_size:
        model = replace(model, num_heads=2 * model.num_heads, hidden_size=2 * model.hidden_size)
        model = replace(model, num_kv_heads=2 * model.num_kv_heads) if isinstance(model, StableLMConfig) else model
    return Case(model, case.mup)


def in_bf16(case: Case) -> Case:
    """Large enough for errors to average out."""
    model = shared_by(case, 4).model
    return Case(replace(model, hidden_size=32 * model.num_heads, ffn_hidden_size=640, vocab_size=1_000), case.mup)


ON_ONE = {name: Case(*case) for name, case in VARIANTS.items()} | {
    "btlm_documents": Case(replace(VARIANTS["btlm_mup"][0], document_masking=True), VARIANTS["btlm_mup"][1]),
    "stablelm_no_documents": Case(replace(VARIANTS["stablelm_12b"][0], document_masking=False), None),
}
LAYOUTS = {1: ON_ONE} | {size: {name: shared_by(case, size) for name, case in ON_ONE.items()} for size in (2, 4)}
IN_BF16 = {name: in_bf16(ON_ONE[name]) for name in ("stablelm_12b", "stablelm_1_6b", "btlm_mup", "btlm_6_heads")}
IN_TRANSFORMERS = [name for name in ON_ONE if name not in NOT_IN_TRANSFORMERS]
MASKED = [name for name, case in ON_ONE.items() if case.model.document_masking]


def layouts(names: list[str] | dict) -> pytest.MarkDecorator:
    marks = {1: (), 2: pytest.mark.dist, 4: pytest.mark.dist}
    cases = [pytest.param(size, name, marks=mark) for size, mark in marks.items() for name in names]
    return pytest.mark.parametrize(("tp_size", "variant"), cases)


# --- what is evaluated


def batch(model: StableLMConfig | BTLMConfig, length: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, and documents of one and more tokens."""
    drawn = random_tokens(model, num_rows=2, seq_len=length + 1)
    lengths = [[6, 1, 14, length - 21], [length]]
    documents = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return drawn[:, :-1], drawn[:, 1:], torch.stack(documents).int()


def weighted(losses: Tensor) -> Tensor:
    """Their mean with a different weight for each, so that no two may be exchanged."""
    return (losses * torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).reshape(losses.shape)).mean()


def decoder(case: Case, mesh: Mesh, dtype: torch.dtype = torch.float32) -> Decoder:
    built = build_model(case.model, case.mup, mesh, dtype=dtype)
    load_weights(built, reference_module(case.model).random_tensors(case.model, seed=5).__getitem__, mesh)
    return built


def evaluated(ours: Decoder, read: Tensor, targets: Tensor, documents: Tensor, mesh: Mesh) -> Values:
    """Logits, losses and gathered gradients."""
    losses = ours(read, targets, documents)
    weighted(losses).backward()
    found = {"logits": ours.logits(read, documents), "losses": losses.detach()}
    for name, parameter in ours.named_parameters():
        # The first tp_size of all ranks are one replica.
        found[name] = joined(parameter.sharding, ranks.all_gather_objects(parameter.grad)[: mesh.tp_size])
        parameter.grad = None
    return found


def evaluate(tp_size: int) -> dict[tuple[str, str], Values]:
    """By variant and what it is to be compared with: rows of documents, rows of one document, bf16."""
    found = {}
    with mesh_context(tp_size) as mesh:
        for name, case in LAYOUTS[tp_size].items():
            ours, (read, targets, documents) = decoder(case, mesh), batch(case.model)
            found[name, "documents"] = evaluated(ours, read, targets, documents, mesh)
            found[name, "one document"] = evaluated(ours, read, targets, torch.zeros_like(documents), mesh)
        for name, case in IN_BF16.items():
            read, targets, documents = batch(case.model, length=128)
            ours = decoder(case, mesh, torch.bfloat16)
            found[name, "bf16"] = evaluated(ours, read, targets, torch.zeros_like(documents), mesh)
    return found


def on_two_ranks() -> dict:
    return {"values": evaluate(2)} | {name: reductions(LAYOUTS[2][name]) for name in ("stablelm_12b", "stablelm_1_6b")}


def reductions(case: Case) -> tuple[int, int]:
    """All-reduces that one layer more costs, forward and backward."""
    with mesh_context(2) as mesh:
        shallow, deep = (
            collectives(case._replace(model=replace(case.model, num_layers=depth)), mesh) for depth in (1, 2)
        )
    return deep[0] - shallow[0], deep[1] - shallow[1]


def collectives(case: Case, mesh: Mesh) -> tuple[int, int]:
    """Collective calls of any kind in forward and in backward."""
    ours = decoder(case, mesh)
    with CommDebugMode() as forward:
        loss = ours(*batch(case.model)).mean()
    with CommDebugMode() as backward:
        loss.backward()
    return forward.get_total_counts(), backward.get_total_counts()


# --- what is expected


def expected(case: Case, tensors: Values, *, length: int = 40, apart: bool = True) -> Values:
    """The reference's own, in the dtype of the tensors."""
    read, targets, documents = batch(case.model, length)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    seen = documents if apart and case.model.document_masking else None
    logits = reference_module(case.model).logits(leaves.__getitem__, *case, read, seen)
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    weighted(losses).backward()
    return {"logits": logits.detach(), "losses": losses.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def of_transformers(case: Case, folder: Path, dtype: torch.dtype = torch.float32, length: int = 40) -> Values:
    """transformers' own, through the export, under its own names; in rows of one document, because it knows no others."""
    from transformers import AutoModelForCausalLM  # not at the top, where each rank would spend seconds on it

    tensors = reference_module(case.model).random_tensors(case.model, seed=5)
    export_folder(tensors.__getitem__, *case, folder, tokenizer=None, max_seq_len=256, dtype=dtype)
    remote = case.model.family == "btlm"
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=dtype)
    read, targets, _ = batch(case.model, length)
    logits = theirs(read).logits
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    weighted(losses).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), "losses": losses.detach(), **gradients}


def their_names(case: Case, values: Values) -> Values:
    """Our values under transformers' names; what only transformers has is not there."""
    pieces = {
        piece.hf_name: to_hf_tensor(row, piece, values[row.name])
        for row in description.FAMILY_MODULES[case.model.family].tensor_mappings(case.model)
        for piece in row.hf_tensors
    }
    return {"logits": values["logits"], "losses": values["losses"], **pieces}


def relative(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found - exact).norm() / exact.norm())


def of_the_range(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / (exact.max() - exact.min()))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    """The values, and by variant the reductions."""
    return ranks.run(on_two_ranks, 2, tmp_path_factory.mktemp("two"))[0]


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> dict[tuple[str, str], Values]:
    return ranks.run(evaluate, 4, tmp_path_factory.mktemp("four"), 4)[0]


@pytest.fixture(scope="module")
def one_rank() -> dict[tuple[str, str], Values]:
    return evaluate(1)


@pytest.fixture(scope="module")
def expected_in_bf16(tmp_path_factory) -> Callable[[str], tuple[Values, Values]]:
    """expected_in_bf16(variant): the values in fp64 of the weights as bf16 holds them, and those of the plain model in bf16."""

    @cache
    def compute(variant: str) -> tuple[Values, Values]:
        case = IN_BF16[variant]
        tensors = reference_module(case.model).random_tensors(case.model, seed=5)
        rounded = {name: tensor.bfloat16().double() for name, tensor in tensors.items()}
        exact = their_names(case, expected(case, rounded, length=128, apart=False))
        return exact, of_transformers(case, tmp_path_factory.mktemp("bf16") / "out", torch.bfloat16, length=128)

    return compute


@pytest.fixture
def found(request) -> Callable[[int], dict[tuple[str, str], Values]]:
    """found(tp_size): what `evaluate` found; starts the ranks when they are first asked for."""

    def values(size: int) -> dict[tuple[str, str], Values]:
        if size == 2:
            return request.getfixturevalue("two_ranks")["values"]
        return request.getfixturevalue("one_rank" if size == 1 else "four_ranks")

    return values


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


# --- promises


@layouts(ON_ONE)
def test_logits_losses_and_every_gradient_are_the_references(tp_size, variant, found):
    case, ours = LAYOUTS[tp_size][variant], found(tp_size)[variant, "documents"]
    tensors = reference_module(case.model).random_tensors(case.model, seed=5)
    exact, noisy = expected(case, to_fp64(tensors)), expected(case, tensors)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error, noise = relative(ours[name], value), relative(noisy[name], value)
        assert error <= min(NOISE * noise, LIMIT), f"{name}: {error:.1e} where the reference has {noise:.1e}"
    assert of_the_range(ours["logits"], exact["logits"]) <= LIMIT


@layouts(IN_TRANSFORMERS)
def test_logits_losses_and_every_gradient_are_those_of_transformers(tp_size, variant, found, tmp_path):
    """Stable LM by transformers' own class, without remote code; BTLM by the code that the export ships."""
    case = LAYOUTS[tp_size][variant]
    theirs = of_transformers(case, tmp_path / "out")
    ours = their_names(case, found(tp_size)[variant, "one document"])
    assert of_the_range(ours["logits"], theirs["logits"]) <= LIMIT
    # Norm biases that our model lacks have gradients there and no place here.
    assert ours.keys() <= theirs.keys()
    assert {name for name in theirs.keys() - ours.keys() if not name.endswith("norm.bias")} == set()
    for name in ours.keys() - {"logits"}:
        assert relative(ours[name], theirs[name]) <= LIMIT, name


@layouts(IN_BF16)
def test_bf16_strays_no_further_than_the_plain_model_in_bf16(tp_size, variant, found, expected_in_bf16):
    """From the same computation in fp64 on the same weights, as bf16 holds them: logits, losses, and gradients kind by kind."""
    exact, plain = expected_in_bf16(variant)
    ours = their_names(IN_BF16[variant], found(tp_size)[variant, "bf16"])
    kinds: dict[str, list[str]] = {}
    for name in exact:
        kinds.setdefault(kind(name), []).append(name)

    def strays(values: Values, names: list[str]) -> float:
        return float(sum((values[name].double() - exact[name]).square().sum() for name in names)) ** 0.5

    ratios = {each: strays(ours, names) / strays(plain, names) for each, names in kinds.items()}
    assert len(ratios) >= 8
    assert {each: ratio for each, ratio in ratios.items() if ratio > BF16_LIMIT} == {}


def kind(name: str) -> str:
    """The same matrix of all layers; all norms, whose gradients torch adds up in bf16 on the CPU; all biases of matrices,
    since a single one's gradient may be a sum that cancels to little but rounding.
    """
    if "norm" in name or "ln_" in name:
        return "norms"
    return "biases" if name.endswith("bias") else re.sub(r"\.\d+\.", ".", name)


@pytest.mark.dist
@pytest.mark.parametrize(("variant", "calls"), [("stablelm_12b", (1, 1)), ("stablelm_1_6b", (2, 2))])
def test_a_parallel_layer_reduces_once_forward_and_once_backward(two_ranks, variant, calls):
    """And a sequential one twice."""
    assert two_ranks[variant] == calls


@pytest.mark.parametrize("variant", MASKED)
def test_documents_together_are_each_document_alone(mesh, variant):
    case = ON_ONE[variant]
    ours, (read, _, documents) = decoder(case, mesh), batch(case.model)
    together = ours.logits(read, documents)
    for document in range(int(documents.max()) + 1):
        inside = documents[0] == document
        alone = read[:1, inside]
        assert relative(together[:1, inside], ours.logits(alone, torch.zeros_like(alone).int())) <= LIMIT


@pytest.mark.parametrize("variant", [name for name in ON_ONE if name not in MASKED])
def test_documents_are_ignored_without_document_masking(mesh, variant):
    case = ON_ONE[variant]
    ours, (read, _, documents) = decoder(case, mesh), batch(case.model)
    assert torch.equal(ours.logits(read, documents), ours.logits(read, torch.zeros_like(documents)))
