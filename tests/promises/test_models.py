"""Our models are the published ones: as the references have them, on one rank and on two, and transformers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy

from tests import ranks
from tests.reference.variants import VARIANTS, in_double, reference, tokens
from trainer.checkpoint.read import load_weights
from trainer.config import BTLM, Mup, StableLM
from trainer.hf import convert
from trainer.hf.mapping import cut
from trainer.models import build
from trainer.models.layers import Decoder
from trainer.parallel.mesh import Mesh, gather_to_all, started
from trainer.parallel.shards import joined

NOISE = 4
"""Two evaluations in fp32 stray about equally far from fp64; this leaves room for another order of sums."""
LIMIT = 1e-5
"""Relative error that no noise excuses."""

Case = tuple[StableLM | BTLM, Mup | None]


def divisible(case: Case) -> Case:
    """A model that two ranks can share, with an odd ffn_width, and padding that lies on the second rank."""
    model, mup = case
    if isinstance(model, StableLM) and model.kv_heads % 2:
        model = replace(model, kv_heads=model.heads)
    return replace(model, vocab=model.vocab + 200, ffn_width=151), mup


ON_ONE = VARIANTS | {
    "btlm_documents": (replace(VARIANTS["btlm_mup"][0], document_masking=True), VARIANTS["btlm_mup"][1]),
    "stablelm_no_documents": (replace(VARIANTS["stablelm_12b"][0], document_masking=False), None),
}
ON_TWO = {name: divisible(case) for name, case in ON_ONE.items()}
CASES = {"tp1": ON_ONE, "tp2": ON_TWO}
MASKED = [name for name, (model, _) in ON_ONE.items() if model.document_masking]
every_case = pytest.mark.parametrize(
    ("layout", "variant"),
    [pytest.param("tp1", name) for name in ON_ONE]
    + [pytest.param("tp2", name, marks=pytest.mark.dist) for name in ON_TWO],
)


def batch(model: StableLM | BTLM) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, and documents of one and more tokens."""
    drawn = tokens(model, rows=2, length=41)
    lengths = [[6, 1, 14, 19], [40]]
    documents = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return drawn[:, :-1], drawn[:, 1:], torch.stack(documents).int()


def weights(losses: Tensor) -> Tensor:
    """A different weight for each token's loss, so that no two may be exchanged."""
    return torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).reshape(losses.shape)


def decoder(model: StableLM | BTLM, mup: Mup | None, mesh: Mesh) -> Decoder:
    built = build(model, mup, mesh, dtype=torch.float32)
    load_weights(built, reference(model).random_tensors(model, seed=5).__getitem__, mesh)
    return built


def evaluate(cases: dict[str, Case], tp_size: int) -> dict[str, dict[str, Tensor]]:
    """Logits, losses and gathered gradients of every case."""
    found = {}
    with started(tp_size) as mesh:
        for name, (model, mup) in cases.items():
            ours, (read, targets, documents) = decoder(model, mup, mesh), batch(model)
            losses = ours(read, targets, documents)
            (losses * weights(losses)).mean().backward()
            found[name] = {"logits": ours.logits(read, documents), "losses": losses.detach()}
            for parameter_name, parameter in ours.named_parameters():
                found[name][parameter_name] = joined(parameter.shard, gather_to_all(parameter.grad))
    return found


def on_two_ranks() -> dict:
    found: dict = evaluate(ON_TWO, 2)
    for name in ("stablelm_12b", "stablelm_1_6b"):
        found[name, "reductions"] = reductions(ON_TWO[name])
    return found


def reductions(case: Case) -> tuple[int, int]:
    """All-reduces that one layer more costs, forward and backward."""
    model, mup = case
    with started(2) as mesh:
        shallow, deep = (collectives(replace(model, depth=depth), mup, mesh) for depth in (1, 2))
    return deep[0] - shallow[0], deep[1] - shallow[1]


def collectives(model: StableLM | BTLM, mup: Mup | None, mesh: Mesh) -> tuple[int, int]:
    """Collective calls of any kind in forward and in backward."""
    ours = decoder(model, mup, mesh)
    with CommDebugMode() as forward:
        loss = ours(*batch(model)).mean()
    with CommDebugMode() as backward:
        loss.backward()
    return forward.get_total_counts(), backward.get_total_counts()


def expected(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's own, in the dtype of the tensors."""
    model, mup = case
    read, targets, documents = batch(model)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    seen = documents if model.document_masking else None
    logits = reference(model).logits(leaves.__getitem__, model, mup, read, seen)
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    (losses * weights(losses)).mean().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return {"logits": logits.detach(), "losses": losses.detach(), **gradients}


def relative(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    return ranks.run(on_two_ranks, 2, tmp_path_factory.mktemp("two"))[0]


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return evaluate(ON_ONE, 1)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with started(1) as mesh:
        yield mesh


@every_case
def test_logits_losses_and_every_gradient_are_the_references(layout, variant, request):
    found = request.getfixturevalue("one_rank" if layout == "tp1" else "two_ranks")
    model, _ = case = CASES[layout][variant]
    tensors = reference(model).random_tensors(model, seed=5)
    exact, noisy = expected(case, in_double(tensors)), expected(case, tensors)
    assert found[variant].keys() == exact.keys()
    for name, value in exact.items():
        error, noise = relative(found[variant][name], value), relative(noisy[name], value)
        assert error <= min(NOISE * noise, LIMIT), f"{name}: {error:.1e} where the reference has {noise:.1e}"


@pytest.mark.dist
@pytest.mark.parametrize(("variant", "calls"), [("stablelm_12b", (1, 1)), ("stablelm_1_6b", (2, 2))])
def test_a_parallel_layer_reduces_once_forward_and_once_backward(two_ranks, variant, calls):
    """And a sequential one twice."""
    assert two_ranks[variant, "reductions"] == calls


@pytest.mark.parametrize("variant", MASKED)
def test_documents_together_are_each_document_alone(mesh, variant):
    model, mup = ON_ONE[variant]
    ours, (read, _, documents) = decoder(model, mup, mesh), batch(model)
    together = ours.logits(read, documents)
    for document in range(int(documents.max()) + 1):
        inside = documents[0] == document
        alone = read[:1, inside]
        assert relative(together[:1, inside], ours.logits(alone, torch.zeros_like(alone).int())) <= LIMIT


@pytest.mark.parametrize("variant", [name for name in ON_ONE if name not in MASKED])
def test_documents_are_ignored_without_document_masking(mesh, variant):
    model, mup = ON_ONE[variant]
    ours, (read, _, documents) = decoder(model, mup, mesh), batch(model)
    assert torch.equal(ours.logits(read, documents), ours.logits(read, torch.zeros_like(documents)))


def test_stablelm_is_the_one_of_transformers(mesh, tmp_path: Path):
    """Logits and every gradient, through the export; one document, because transformers knows no others."""
    from transformers import StableLmForCausalLM  # not at the top, where each rank would spend seconds on it

    model, mup = VARIANTS["stablelm_12b"]
    tensors = reference(model).random_tensors(model, seed=5)
    convert.export(
        tensors.__getitem__, model, mup, tmp_path / "out", tokenizer=None, max_seq_len=64, dtype=torch.float32
    )
    theirs = StableLmForCausalLM.from_pretrained(tmp_path / "out")
    ours, (read, targets, documents) = decoder(model, mup, mesh), batch(model)
    one = torch.zeros_like(documents)
    ours(read, targets, one).mean().backward()
    logits = theirs(read).logits
    cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert relative(ours.logits(read, one), logits.detach()) <= LIMIT
    gradients = {name: joined(p.shard, [p.grad]) for name, p in ours.named_parameters()}
    found = dict(theirs.named_parameters())
    for row in convert.TABLES["stablelm"].rows(model):
        for piece in row.pieces:
            error = relative(cut(row, piece, gradients[row.ours]), found[piece.theirs].grad)
            assert error <= LIMIT, f"{piece.theirs}: {error:.1e}"
