"""Generates token ids from prompts. Rows are processed in one batch, but sampled independently of one another.

The random numbers of a row depend only on the seed and its prompt, and padding is masked. A row's text therefore does not
depend on the other rows, except that rounding may decide between almost equally likely tokens (in bf16, occasionally). As in
transformers, a row is one document, no matter which tokens it contains.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from tandem.trainer.models.decoder import Decoder
from tandem.trainer.models.kv_cache import KVCache

PAD_TO_MULTIPLE_OF = 128
"""On a GPU, prompts are padded to a multiple of this, because attention is compiled for each length."""


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 means no limit."""
    top_p: float = 1.0
    """Sample from the likeliest tokens with this total probability."""
    seed: int = 0


def generate_tokens(
    model: Decoder, prompts: list[list[int]], max_new_tokens: int, sampling: SamplingConfig, *,
    eos_token_id: int | None, use_cache: bool = True,
) -> Iterator[list[int]]:  # fmt: skip
    """Yield the next token of every row, up to `max_new_tokens` times, until every row has produced an EOS.

    The caller must ignore a row's tokens after its EOS. Without `use_cache`, every step processes all tokens again.
    """
    rows, is_finished = [list(prompt) for prompt in prompts], [False] * len(prompts)
    generators = [_row_generator(prompts, index, sampling.seed) for index in range(len(prompts))]
    device = model.embedding.weight.device
    pad_to_multiple_of = PAD_TO_MULTIPLE_OF if device.type == "cuda" else 1
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or not use_cache:
            input_tokens, documents = left_pad(rows, pad_to_multiple_of)
            cache = KVCache()
        else:
            input_tokens = torch.tensor([row[-1:] for row in rows])
            documents = torch.zeros(input_tokens.shape, dtype=torch.int32)
        logits = model.next_token_logits(input_tokens.to(device), documents.to(device), cache).cpu()
        next_tokens = sample_tokens(logits, sampling, generators)
        yield next_tokens
        for index, token in enumerate(next_tokens):
            rows[index].append(token)
            is_finished[index] |= token == eos_token_id
        if all(is_finished):
            return


def left_pad(
    rows: list[list[int]], pad_to_multiple_of: int
) -> tuple[Int64[Tensor, "rows seq"], Int32[Tensor, "rows seq"]]:
    """Pad the rows on the left to one length. Return tokens and document ids."""
    max_row_tokens = max(map(len, rows))
    seq_len = max_row_tokens + -max_row_tokens % pad_to_multiple_of
    tokens = torch.tensor([[0] * (seq_len - len(row)) + row for row in rows])
    documents = torch.tensor([[-1] * (seq_len - len(row)) + [0] * len(row) for row in rows], dtype=torch.int32)
    return tokens, documents


def sample_tokens(
    logits: Float[Tensor, "rows vocab"], sampling: SamplingConfig, generators: list[torch.Generator]
) -> list[int]:
    """Sample the next token of every row, each with its own generator."""
    if not sampling.temperature:
        return logits.argmax(-1).tolist()
    # Subtract the largest logit, so that nothing overflows, and use fp64, so that no temperature rounds to 0.
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / sampling.temperature, -1)
    if 0 < sampling.top_k < probabilities.shape[-1]:
        top = probabilities.topk(sampling.top_k)
        probabilities = torch.zeros_like(probabilities).scatter(-1, top.indices, top.values)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        probabilities = filter_top_p(probabilities, sampling.top_p)
    rows = zip(probabilities, generators, strict=True)
    return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]


def filter_top_p(probabilities: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """Keep the largest probabilities, at least one, until they add up to `top_p`. Set the others to zero.

    Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))


def _row_generator(prompts: list[list[int]], index: int, seed: int) -> torch.Generator:
    """Seed a generator from a prompt's tokens. A repeated prompt gets another generator."""
    num_earlier_duplicates = prompts[:index].count(prompts[index])
    digest = hashlib.sha256(f"{seed}/generate/{num_earlier_duplicates}/{prompts[index]}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
