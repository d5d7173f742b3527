"""`tandem generate`: prompts continued, from a run, an import or a Hugging Face folder."""

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.trainer.checkpoint.weights import Source, add_alibi_scaling, model_from, source, with_alibi_scaling
from tandem.trainer.config import BTLM, UserError
from tandem.trainer.distributed.mesh import started
from tandem.trainer.models.sampling import Sampling, continuations

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character are decoded to while its last are still to come."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tandem generate`."""
    parser.add_argument("source", type=Path, help="run folder, import folder or Hugging Face folder")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given again")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="texts to continue, one in a line")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many of the likeliest tokens; 0 from all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; each prompt has its own draws")
    parser.add_argument("--past-end", action="store_true", help="go on after the token that ends a document")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt, one in a line")
    parser.add_argument(
        "--no-cache", action="store_true",
        help="read the whole text again for every token. The text is the same up to rounding, but for dynamic "
        "--alibi-scaling beyond its train_seq_len: keys and values that are kept were made with the divisor of a shorter text",
    )  # fmt: skip
    add_alibi_scaling(parser)
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json; default: the one beside the weights or their corpus"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints every prompt and its continuation; that of a single prompt while it is made."""
    sampling = sampling_of(arguments)
    origin = with_alibi_scaling(source(arguments.source), arguments.alibi_scaling)
    tokenizer = tokenizer_of(origin, arguments.tokenizer)
    texts = texts_of(arguments)
    prompts = [encoded(text, tokenizer) for text in texts]
    end = None if arguments.past_end else end_of_document(origin, tokenizer)
    warn_beyond(origin, max(map(len, prompts)) + arguments.tokens)
    with started(tp_size=1) as mesh:
        model = model_from(origin, mesh)
        steps = continuations(model, prompts, arguments.tokens, sampling, end=end, cached=not arguments.no_cache)
        if len(prompts) == 1 and not arguments.json:
            show((token for (token,) in steps if token != end), prompts[0], tokenizer)
            return
        rows = [until(row, end) for row in zip(*steps, strict=True)]
    for index, (text, prompt, row) in enumerate(zip(texts, prompts, rows, strict=True)):
        whole = decoded(prompt + [token for token in row if token != end], tokenizer)
        print(json.dumps({"prompt": text, "text": whole, "tokens": row}) if arguments.json else f"[{index}] {whole}")


def show(steps: Iterator[int], prompt: list[int], tokenizer: "Tokenizer") -> None:
    """The text stands on the terminal, each part as soon as its characters are whole."""
    tokens, text, shown = list(prompt), decoded(prompt, tokenizer), 0
    for token in steps:
        if not text.endswith(INCOMPLETE):
            print(text[shown:], end="", flush=True)
            shown = len(text)
        tokens.append(token)
        text = decoded(tokens, tokenizer)
    print(text[shown:])


def decoded(tokens: list[int], tokenizer: "Tokenizer") -> str:
    """The text of the tokens, with the marks between documents, so that it begins as the prompt does."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False)
    return text


def until(row: tuple[int, ...], end: int | None) -> list[int]:
    """The row up to its first `end`, which is part of it."""
    return list(row[: row.index(end) + 1] if end in row else row)


def texts_of(arguments: argparse.Namespace) -> list[str]:
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


def encoded(text: str, tokenizer: "Tokenizer") -> list[int]:
    """The tokens of a text.

    Raises: UserError where there is none.
    """
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if not tokens:
        raise UserError("--prompt: is empty, or a line of --prompts; at least one token is continued; give some text")
    return tokens


def tokenizer_of(origin: Source, named: Path | None) -> "Tokenizer":
    """The tokenizer the weights were trained with.

    Raises: UserError where none is known, or it has more ids than the weights.
    """
    from tokenizers import Tokenizer

    file = named or origin.tokenizer
    if file is None or not file.is_file():
        raise UserError(
            f"--tokenizer: {file}; text needs the tokenizer the corpus was prepared with; give its tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"--tokenizer: {file} cannot be read: {error}; it must be a tokenizer.json") from None
    largest = max(tokenizer.get_vocab().values())
    if largest >= origin.model.vocab:
        raise UserError(
            f"--tokenizer: {file} has id {largest}; the weights know {origin.model.vocab} ids; name the tokenizer they were "
            "trained with"
        )
    return tokenizer


def end_of_document(origin: Source, tokenizer: "Tokenizer") -> int:
    """The token that ends a document.

    Raises: UserError where the tokenizer has none.
    """
    end: int | None = tokenizer.token_to_id(origin.eos_token)
    if end is None:
        raise UserError(
            f"--tokenizer: has no token {origin.eos_token}, which ends documents of these weights; name the tokenizer they "
            "were trained with, or go on past the end with --past-end"
        )
    return end


def warn_beyond(origin: Source, length: int) -> None:
    """It is said when texts may grow longer than any row the weights were trained on."""
    if origin.max_seq_len and length > origin.max_seq_len:
        remedy = f"; see --alibi-scaling train_seq_len={origin.max_seq_len}" if isinstance(origin.model, BTLM) else ""
        log.warning("texts of up to %d tokens; the weights were trained on %d%s", length, origin.max_seq_len, remedy)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
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
    if arguments.tokens < 1:
        raise UserError(f"--tokens: {arguments.tokens}; must be at least 1; give a number of tokens")
    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
