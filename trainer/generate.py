"""`tandem generate`: text from a run, an import or a Hugging Face folder, token by token, each step from scratch."""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer import models
from trainer.checkpoint.source import source
from trainer.config import UserError
from trainer.evaluate import model_from
from trainer.parallel.mesh import started

LENGTH_STEP = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tandem generate`."""
    parser.add_argument("source", type=Path, help="run folder, import folder or Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json; default: the one beside the weights or their corpus"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the prompt and its continuation."""
    from tokenizers import Tokenizer

    check_sampling(arguments)
    origin = source(arguments.source)
    file = arguments.tokenizer or origin.tokenizer
    if file is None or not file.is_file():
        raise UserError(
            f"--tokenizer: {file}; text needs the tokenizer the corpus was prepared with; give its tokenizer.json"
        )
    tokenizer = Tokenizer.from_file(str(file))
    largest = max(tokenizer.get_vocab().values())
    if largest >= origin.model.vocab:
        raise UserError(
            f"--tokenizer: {file} has id {largest}; the weights know {origin.model.vocab} ids; name the tokenizer they were "
            "trained with"
        )
    prompt = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
    if not prompt:
        raise UserError("--prompt: is empty; generation continues at least one token; give some text")
    with started(tp_size=1) as mesh:
        model = model_from(origin, mesh)
        generator = torch.Generator().manual_seed(arguments.seed)
        tokens = torch.tensor([prompt])
        for _ in range(arguments.tokens):
            tokens = torch.cat(
                [tokens, next_token(model, tokens, generator, arguments.temperature, arguments.top_p)], dim=1
            )
    print(tokenizer.decode(tokens[0].tolist()))


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raises UserError for settings that mean nothing."""
    if arguments.temperature < 0:
        raise UserError(f"--temperature: {arguments.temperature}; must not be negative; 0 takes the likeliest token")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p: {arguments.top_p}; must lie above 0 and at most 1; 1 samples from all tokens")
    if arguments.tokens < 1:
        raise UserError(f"--tokens: {arguments.tokens}; must be at least 1; give a number of tokens")


def next_token(
    model: models.Decoder,
    tokens: Int64[Tensor, "rows seq"],
    generator: torch.Generator,
    temperature: float,
    top_p: float,
) -> Int64[Tensor, "rows 1"]:
    """The likeliest next token, or a draw from the nucleus of probability top_p at the given temperature."""
    length, device = tokens.shape[1], model.embedding.weight.device
    # Lengths in large steps, as compiled attention is made anew for each; what follows a token cannot change its logits.
    padded = torch.nn.functional.pad(tokens, (0, -length % LENGTH_STEP))
    documents = torch.zeros(padded.shape, dtype=torch.int32)
    logits = model.logits(padded.to(device), documents.to(device))[:, length - 1].cpu()
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(nucleus(torch.softmax(logits / temperature, -1), top_p), 1, generator=generator)


def nucleus(probabilities: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """The same probabilities with all but the likeliest of total top_p set to zero; at least one stays.

    Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
