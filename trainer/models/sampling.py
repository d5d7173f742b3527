"""Token ids to more token ids: rows are read together through a cache, and each is drawn as if it were alone.

A row's draws are keyed by the seed and its prompt, and padding is never seen, so its text does not depend on the rows
beside it, but for the rounding of sums that may settle a near tie (in bf16 now and then). A row is one document, as for
transformers, whatever tokens it holds.
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
"""Prompts are padded to a multiple of this on a GPU, whose compiled attention is made anew for every length."""


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 has no limit."""
    top_p: float = 1.0
    """Only the likeliest tokens of this total probability."""
    seed: int = 0


def generate_tokens(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: SamplingConfig,
    *,
    eos_token_id: int | None,
    use_cache: bool = True,
) -> Iterator[list[int]]:
    """The next token of every prompt, then the one after it, at most `max_new_tokens` times; until all rows have had EOS.

    What a row gets after its EOS means nothing. Without `use_cache` all tokens are read again for every next one.
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
        next_tokens = sample_tokens(
            model.next_token_logits(input_tokens.to(device), documents.to(device), cache).cpu(), sampling, generators
        )
        yield next_tokens
        for index, token in enumerate(next_tokens):
            rows[index].append(token)
            is_finished[index] |= token == eos_token_id
        if all(is_finished):
            return


def left_pad(
    rows: list[list[int]], pad_to_multiple_of: int
) -> tuple[Int64[Tensor, "rows seq"], Int32[Tensor, "rows seq"]]:
    """Tokens and documents of rows that end together, the shorter ones padded in front."""
    max_row_tokens = max(map(len, rows))
    seq_len = max_row_tokens + -max_row_tokens % pad_to_multiple_of
    tokens = torch.tensor([[0] * (seq_len - len(row)) + row for row in rows])
    documents = torch.tensor([[-1] * (seq_len - len(row)) + [0] * len(row) for row in rows], dtype=torch.int32)
    return tokens, documents


def sample_tokens(
    logits: Float[Tensor, "rows vocab"], sampling: SamplingConfig, generators: list[torch.Generator]
) -> list[int]:
    """The next token of every row, each with its own generator."""
    if not sampling.temperature:
        return logits.argmax(-1).tolist()
    # In fp64 from the largest, so that no temperature is 0 or overflows.
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / sampling.temperature, -1)
    if 0 < sampling.top_k < probabilities.shape[-1]:
        top = probabilities.topk(sampling.top_k)
        probabilities = torch.zeros_like(probabilities).scatter(-1, top.indices, top.values)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        probabilities = filter_top_p(probabilities, sampling.top_p)
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def filter_top_p(probabilities: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """The same probabilities with all but the likeliest of total top_p set to zero; at least one stays.

    Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))


def _row_generator(prompts: list[list[int]], index: int, seed: int) -> torch.Generator:
    """Of a prompt's tokens, so that other prompts change nothing; a prompt given again is drawn anew."""
    num_earlier_duplicates = prompts[:index].count(prompts[index])
    digest = hashlib.sha256(f"{seed}/generate/{num_earlier_duplicates}/{prompts[index]}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
