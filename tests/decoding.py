"""Texts read on token by token, through a decoder's cache and from scratch; what each rank of a test imports is kept small."""

from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.checkpoint.read import load_weights
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models import build_model
from tandem.trainer.models.decoder import Decoder
from tandem.trainer.models.kv_cache import KVCache
from tandem.trainer.models.sampling import SamplingConfig, generate_tokens, left_pad
from tests.reference.variants import VARIANTS, random_tokens, reference_module

NUM_STEPS = 14
PROMPT_LENGTHS = (5, 9, 1)
"""Of the prompts; with the steps none is longer than the train_seq_len of the dynamic variant, 24."""
LONG_PROMPT_LENGTHS = (20, 23, 2)
"""Two grow beyond it."""
DECODER_VARIANTS = VARIANTS | {
    "btlm_documents": (replace(VARIANTS["btlm_mup"][0], document_masking=True), VARIANTS["btlm_mup"][1]),
    "stablelm_no_documents": (replace(VARIANTS["stablelm_12b"][0], document_masking=False), None),
}
TP2_VARIANTS = ("stablelm_12b", "stablelm_1_6b", "btlm_6_heads", "btlm_dynamic")


def build_decoder(variant: str, mesh: Mesh) -> Decoder:
    model, mup = DECODER_VARIANTS[variant]
    built = build_model(model, mup, mesh, dtype=torch.float32)
    load_weights(built, reference_module(model).random_tensors(model, seed=3).__getitem__, mesh)
    return built


def prompts_and_continuations(variant: str, lengths: tuple[int, ...]) -> tuple[list[list[int]], Tensor]:
    """Prompts of these lengths, and what each is made to go on with, [rows, steps]: other tokens than a model would choose,
    which soon repeats itself.
    """
    drawn = random_tokens(DECODER_VARIANTS[variant][0], num_rows=len(lengths), seq_len=max(lengths) + NUM_STEPS)
    return [row[:length].tolist() for row, length in zip(drawn, lengths, strict=True)], drawn[:, -NUM_STEPS:]


def cached_logits(decoder: Decoder, prompts: list[list[int]], continuations: Tensor) -> Tensor:
    """[rows, steps, vocab]: the logits from which each of the following tokens would be drawn."""
    read, documents = left_pad(prompts, 1)
    cache, logits = KVCache(), []
    for step in range(NUM_STEPS):
        logits.append(decoder.next_token_logits(read, documents, cache))
        read = continuations[:, step : step + 1]
        documents = torch.zeros_like(read).int()
    return torch.stack(logits, dim=1)


def uncached_logits(decoder: Decoder, prompts: list[list[int]], followed_by: Tensor) -> Tensor:
    """The same, each row alone, every logit from a forward pass over all that stands before."""
    rows = []
    for prompt, following in zip(prompts, followed_by.tolist(), strict=True):
        wholes = [torch.tensor([prompt + following[:step]]) for step in range(NUM_STEPS)]
        rows.append(torch.cat([decoder.logits(whole, torch.zeros_like(whole).int())[:, -1] for whole in wholes]))
    return torch.stack(rows)


def decode_on_two_ranks() -> dict[str, tuple[Tensor, list]]:
    with mesh_context(2) as mesh:
        return {variant: logits_and_samples(variant, mesh) for variant in TP2_VARIANTS}


def logits_and_samples(variant: str, mesh: Mesh) -> tuple[Tensor, list]:
    """Logits along given tokens, and tokens drawn."""
    ours, (prompts, followed_by) = build_decoder(variant, mesh), prompts_and_continuations(variant, PROMPT_LENGTHS)
    drawn = generate_tokens(
        ours, prompts, NUM_STEPS, SamplingConfig(temperature=1.0, top_k=40, top_p=0.9), eos_token_id=None
    )
    return cached_logits(ours, prompts, followed_by), list(drawn)
