"""Texts read on token by token, through a decoder's cache and from scratch; what each rank of a test imports is kept small."""

from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.checkpoint.read import load_weights
from tandem.trainer.distributed.mesh import Mesh, started
from tandem.trainer.models import build
from tandem.trainer.models.decoder import Decoder
from tandem.trainer.models.kv_cache import Cache
from tandem.trainer.models.sampling import Sampling, continuations, side_by_side
from tests.reference.variants import VARIANTS, reference, tokens

STEPS = 14
LENGTHS = (5, 9, 1)
"""Of the prompts; with the steps none is longer than the train_seq_len of the dynamic variant, 24."""
LONG = (20, 23, 2)
"""Two grow beyond it."""
CASES = VARIANTS | {
    "btlm_documents": (replace(VARIANTS["btlm_mup"][0], document_masking=True), VARIANTS["btlm_mup"][1]),
    "stablelm_no_documents": (replace(VARIANTS["stablelm_12b"][0], document_masking=False), None),
}
ON_TWO = ("stablelm_12b", "stablelm_1_6b", "btlm_6_heads", "btlm_dynamic")


def decoder(variant: str, mesh: Mesh) -> Decoder:
    model, mup = CASES[variant]
    built = build(model, mup, mesh, dtype=torch.float32)
    load_weights(built, reference(model).random_tensors(model, seed=3).__getitem__, mesh)
    return built


def texts(variant: str, lengths: tuple[int, ...]) -> tuple[list[list[int]], Tensor]:
    """Prompts of these lengths, and what each is made to go on with, [rows, steps]: other tokens than a model would choose,
    which soon repeats itself.
    """
    drawn = tokens(CASES[variant][0], rows=len(lengths), length=max(lengths) + STEPS)
    return [row[:length].tolist() for row, length in zip(drawn, lengths, strict=True)], drawn[:, -STEPS:]


def read_on(ours: Decoder, prompts: list[list[int]], followed_by: Tensor) -> Tensor:
    """[rows, steps, vocab]: the logits from which each of the following tokens would be drawn."""
    read, documents = side_by_side(prompts, 1)
    cache, logits = Cache(), []
    for step in range(STEPS):
        logits.append(ours.read(read, documents, cache))
        read = followed_by[:, step : step + 1]
        documents = torch.zeros_like(read).int()
    return torch.stack(logits, dim=1)


def from_scratch(ours: Decoder, prompts: list[list[int]], followed_by: Tensor) -> Tensor:
    """The same, each row alone, every logit from a forward pass over all that stands before."""
    rows = []
    for prompt, following in zip(prompts, followed_by.tolist(), strict=True):
        wholes = [torch.tensor([prompt + following[:step]]) for step in range(STEPS)]
        rows.append(torch.cat([ours.logits(whole, torch.zeros_like(whole).int())[:, -1] for whole in wholes]))
    return torch.stack(rows)


def on_two_ranks() -> dict[str, tuple[Tensor, list]]:
    with started(2) as mesh:
        return {variant: followed(variant, mesh) for variant in ON_TWO}


def followed(variant: str, mesh: Mesh) -> tuple[Tensor, list]:
    """Logits along given tokens, and tokens drawn."""
    ours, (prompts, followed_by) = decoder(variant, mesh), texts(variant, LENGTHS)
    drawn = continuations(ours, prompts, STEPS, Sampling(temperature=1.0, top_k=40, top_p=0.9), end=None)
    return read_on(ours, prompts, followed_by), list(drawn)
