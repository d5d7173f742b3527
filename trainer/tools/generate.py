"""`tandem generate`: prompts continued, from a run, an import or a Hugging Face folder."""

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.trainer.checkpoint.weights import (
    WeightSource,
    add_alibi_scaling_argument,
    load_model,
    open_weight_source,
    override_alibi_scaling,
)
from tandem.trainer.config import BTLMConfig, UserError
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.models.sampling import SamplingConfig, generate_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character are decoded to while its last are still to come."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tandem generate`."""
    parser.add_argument("source", type=Path, help="run folder, import folder or Hugging Face folder")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given again")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="texts to continue, one in a line")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many of the likeliest tokens; 0 from all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; each prompt has its own draws")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the token that ends a document")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt, one in a line")
    parser.add_argument(
        "--no-cache", action="store_true",
        help="read the whole text again for every token. The text is the same up to rounding, but for dynamic "
        "--alibi-scaling beyond its train_seq_len: keys and values that are kept were made with the divisor of a shorter text",
    )  # fmt: skip
    add_alibi_scaling_argument(parser)
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json; default: the one beside the weights or their corpus"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints every prompt and its continuation; that of a single prompt while it is made."""
    sampling = parse_sampling(arguments)
    weight_source = override_alibi_scaling(open_weight_source(arguments.source), arguments.alibi_scaling)
    tokenizer = load_tokenizer(weight_source, arguments.tokenizer)
    texts = read_prompts(arguments)
    prompts = [encode(text, tokenizer) for text in texts]
    eos_token_id = None if arguments.ignore_eos else find_eos_token_id(weight_source, tokenizer)
    warn_beyond_max_seq_len(weight_source, max(map(len, prompts)) + arguments.max_new_tokens)
    with mesh_context(tp_size=1) as mesh:
        model = load_model(weight_source, mesh)
        token_steps = generate_tokens(
            model,
            prompts,
            arguments.max_new_tokens,
            sampling,
            eos_token_id=eos_token_id,
            use_cache=not arguments.no_cache,
        )
        if len(prompts) == 1 and not arguments.json:
            stream_text((token for (token,) in token_steps if token != eos_token_id), prompts[0], tokenizer)
            return
        rows = [truncate_at_eos(row, eos_token_id) for row in zip(*token_steps, strict=True)]
    for index, (text, prompt, row) in enumerate(zip(texts, prompts, rows, strict=True)):
        full_text = decode(prompt + [token for token in row if token != eos_token_id], tokenizer)
        print(
            json.dumps({"prompt": text, "text": full_text, "tokens": row})
            if arguments.json
            else f"[{index}] {full_text}"
        )


def stream_text(new_tokens: Iterator[int], prompt: list[int], tokenizer: "Tokenizer") -> None:
    """The text stands on the terminal, each part as soon as its characters are whole."""
    tokens, text, num_printed = list(prompt), decode(prompt, tokenizer), 0
    for token in new_tokens:
        if not text.endswith(REPLACEMENT_CHARACTER):
            print(text[num_printed:], end="", flush=True)
            num_printed = len(text)
        tokens.append(token)
        text = decode(tokens, tokenizer)
    print(text[num_printed:])


def decode(tokens: list[int], tokenizer: "Tokenizer") -> str:
    """The text of the tokens, with the marks between documents, so that it begins as the prompt does."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False)
    return text


def truncate_at_eos(tokens: tuple[int, ...], eos_token_id: int | None) -> list[int]:
    """The row up to its first `eos_token_id`, which is part of it."""
    return list(tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """All texts to continue, in the order of the command line, the file's last.

    Raises: UserError where there is none.
    """
    texts: list[str] = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            # Not splitlines, which would also cut at form feeds and rarer characters.
            texts += arguments.prompts.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts: {arguments.prompts} cannot be read: {error}; give a text file") from None
    if not texts:
        raise UserError("--prompt: is missing; generation continues a text; give --prompt TEXT or --prompts FILE")
    return texts


def encode(text: str, tokenizer: "Tokenizer") -> list[int]:
    """The tokens of a text.

    Raises: UserError where there is none.
    """
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if not tokens:
        raise UserError("--prompt: is empty, or a line of --prompts; at least one token is continued; give some text")
    return tokens


def load_tokenizer(weight_source: WeightSource, path: Path | None) -> "Tokenizer":
    """The tokenizer the weights were trained with.

    Raises: UserError where none is known, or it has more ids than the weights.
    """
    from tokenizers import Tokenizer

    file = path or weight_source.tokenizer_file
    if file is None or not file.is_file():
        raise UserError(
            f"--tokenizer: {file}; text needs the tokenizer the corpus was prepared with; give its tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"--tokenizer: {file} cannot be read: {error}; it must be a tokenizer.json") from None
    max_token_id = max(tokenizer.get_vocab().values())
    if max_token_id >= weight_source.model.vocab_size:
        raise UserError(
            f"--tokenizer: {file} has id {max_token_id}; the weights know {weight_source.model.vocab_size} ids; "
            f"name the tokenizer they were "
            "trained with"
        )
    return tokenizer


def find_eos_token_id(weight_source: WeightSource, tokenizer: "Tokenizer") -> int:
    """The token that ends a document.

    Raises: UserError where the tokenizer has none.
    """
    eos_token_id: int | None = tokenizer.token_to_id(weight_source.eos_token)
    if eos_token_id is None:
        raise UserError(
            f"--tokenizer: has no token {weight_source.eos_token}, which ends documents of these weights; name "
            f"the tokenizer they "
            "were trained with, or go on past the end with --ignore-eos"
        )
    return eos_token_id


def warn_beyond_max_seq_len(weight_source: WeightSource, seq_len: int) -> None:
    """It is said when texts may grow longer than any row the weights were trained on."""
    if weight_source.max_seq_len and seq_len > weight_source.max_seq_len:
        remedy = (
            f"; see --alibi-scaling train_seq_len={weight_source.max_seq_len}"
            if isinstance(weight_source.model, BTLMConfig)
            else ""
        )
        log.warning(
            "texts of up to %d tokens; the weights were trained on %d%s", seq_len, weight_source.max_seq_len, remedy
        )


def parse_sampling(arguments: argparse.Namespace) -> SamplingConfig:
    """The settings of the command line.

    Raises: UserError for those that mean nothing.
    """
    if not arguments.temperature >= 0:
        raise UserError(f"--temperature: {arguments.temperature}; must not be negative; 0 takes the likeliest token")
    if arguments.top_k < 0:
        raise UserError(f"--top-k: {arguments.top_k}; must not be negative; 0 samples from all tokens")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p: {arguments.top_p}; must lie above 0 and at most 1; 1 samples from all tokens")
    if not arguments.temperature and (arguments.top_k or arguments.top_p < 1):
        raise UserError(
            "--temperature: 0 takes the likeliest token; --top-k and --top-p choose among several; raise it"
        )
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {arguments.max_new_tokens}; must be at least 1; give a number of tokens")
    return SamplingConfig(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
