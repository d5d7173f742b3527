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
from tandem.trainer.models.kv_cache import Cache

LENGTH_STEP = 128
"""Prompts are padded to a multiple of this on a GPU, whose compiled attention is made anew for every length."""


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 has no limit."""
    top_p: float = 1.0
    """Only the likeliest tokens of this total probability."""
    seed: int = 0


def continuations(
    model: Decoder,
    prompts: list[list[int]],
    num_tokens: int,
    sampling: Sampling,
    *,
    end: int | None,
    cached: bool = True,
) -> Iterator[list[int]]:
    """The next token of every prompt, then the one after it, at most `num_tokens` times; until all rows have had `end`.

    What a row gets after its `end` means nothing. Not `cached`, all tokens are read again for every next one.
    """
    rows, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    generators = [_generator(prompts, index, sampling.seed) for index in range(len(prompts))]
    device = model.embedding.weight.device
    length_step = LENGTH_STEP if device.type == "cuda" else 1
    cache = None
    for _ in range(num_tokens):
        if cache is None or not cached:
            read, documents = side_by_side(rows, length_step)
            cache = Cache()
        else:
            read = torch.tensor([row[-1:] for row in rows])
            documents = torch.zeros(read.shape, dtype=torch.int32)
        chosen = draw(model.read(read.to(device), documents.to(device), cache).cpu(), sampling, generators)
        yield chosen
        for index, token in enumerate(chosen):
            rows[index].append(token)
            ended[index] |= token == end
        if all(ended):
            return


def side_by_side(
    rows: list[list[int]], length_step: int
) -> tuple[Int64[Tensor, "rows seq"], Int32[Tensor, "rows seq"]]:
    """Tokens and documents of rows that end together, the shorter ones padded in front."""
    longest = max(map(len, rows))
    seq = longest + -longest % length_step
    tokens = torch.tensor([[0] * (seq - len(row)) + row for row in rows])
    documents = torch.tensor([[-1] * (seq - len(row)) + [0] * len(row) for row in rows], dtype=torch.int32)
    return tokens, documents


def draw(logits: Float[Tensor, "rows vocab"], sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """The next token of every row, each with its own generator."""
    if not sampling.temperature:
        return logits.argmax(-1).tolist()
    # In fp64 from the largest, so that no temperature is 0 or overflows.
    likely = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / sampling.temperature, -1)
    if 0 < sampling.top_k < likely.shape[-1]:
        kept = likely.topk(sampling.top_k)
        likely = torch.zeros_like(likely).scatter(-1, kept.indices, kept.values)
        likely = likely / likely.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        likely = nucleus(likely, sampling.top_p)
    return [int(torch.multinomial(row, 1, generator=own)) for row, own in zip(likely, generators, strict=True)]


def nucleus(probabilities: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """The same probabilities with all but the likeliest of total top_p set to zero; at least one stays.

    Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0.0))


def _generator(prompts: list[list[int]], index: int, seed: int) -> torch.Generator:
    """Of a prompt's tokens, so that other prompts change nothing; a prompt given again is drawn anew."""
    before = prompts[:index].count(prompts[index])
    digest = hashlib.sha256(f"{seed}/generate/{before}/{prompts[index]}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
