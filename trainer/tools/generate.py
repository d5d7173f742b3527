"""`tandem generate`: continue prompts with the weights of a run, an import or a Hugging Face folder."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.trainer.checkpoint.weight_source import WeightSource, add_alibi_scaling_argument, describe_weights
from tandem.trainer.config import BTLMConfig, UserError
from tandem.trainer.config.outside import read_text, safe_print
from tandem.trainer.data.tokenizer_file import file_sha256, read_tokenizer, same_encoding

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""An incomplete character decodes to this."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    top_p_help = "sample from the most likely tokens with this total probability (default 1)"
    no_cache_help = (
        "recompute the whole text for every token instead of caching keys and values; the result is the same up to rounding, "
        "except with --alibi-scaling train_seq_len=N for texts longer than N, because cached keys and values were computed "
        "with the divisor of a shorter text"
    )
    tokenizer_help = "tokenizer.json that the weights were trained with (default: the one next to the weights)"
    add("source", type=Path, help="run folder, import folder or Hugging Face folder")
    add("--prompt", action="append", default=[], help="text to continue; can be repeated")
    add("--prompts", type=Path, metavar="FILE", help="file with one text to continue per line")
    add("--max-new-tokens", type=int, default=64, help="maximum number of new tokens (default 64)")
    add(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 takes the most likely token (default 0)"
    )
    add("--top-k", type=int, default=0, help="sample from the K most likely tokens; 0 (the default) samples from all")
    add("--top-p", type=float, default=1.0, help=top_p_help)
    add("--seed", type=int, default=0, help="seed for sampling; prompts are sampled independently (default 0)")
    add("--ignore-eos", action="store_true", help="continue after the token that ends a document")
    add("--json", action="store_true", help="print one JSON object per prompt, each on one line")
    add("--no-cache", action="store_true", help=no_cache_help)
    add_alibi_scaling_argument(parser)
    add("--tokenizer", type=Path, help=tokenizer_help)


def run(arguments: argparse.Namespace) -> None:
    """Print each prompt with its continuation. Stream the text if there is a single prompt and no --json."""
    check_sampling(arguments)
    texts = read_prompts(arguments)
    weight_source = describe_weights(arguments.source, alibi_scaling=arguments.alibi_scaling)
    tokenizer = load_tokenizer(weight_source, arguments.tokenizer)
    prompts = [encode(text, tokenizer) for text in texts]
    eos_token_id = None if arguments.ignore_eos else find_eos_token_id(weight_source, tokenizer)
    warn_beyond_max_seq_len(weight_source, max(map(len, prompts)) + arguments.max_new_tokens)
    # Imported here because they import torch, which a refusal does not need.
    from tandem.trainer.checkpoint import weights
    from tandem.trainer.distributed.mesh import mesh_context
    from tandem.trainer.models.sampling import SamplingConfig, generate_tokens

    sampling = SamplingConfig(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    with mesh_context(tp_size=1) as mesh:
        model = weights.load_model(weights.open_weights(weight_source), mesh)
        options = {"use_cache": not arguments.no_cache}
        num_tokens = arguments.max_new_tokens
        token_steps = generate_tokens(model, prompts, num_tokens, sampling, eos_token_id=eos_token_id, **options)
        if len(prompts) == 1 and not arguments.json:
            stream_text((token for (token,) in token_steps if token != eos_token_id), prompts[0], tokenizer)
            return
        rows = [list(row) for row in zip(*token_steps, strict=True)]
    if eos_token_id is not None:
        rows = [row[: row.index(eos_token_id) + 1] if eos_token_id in row else row for row in rows]
    for index, (text, prompt, row) in enumerate(zip(texts, prompts, rows, strict=True)):
        full_text = decode(prompt + [token for token in row if token != eos_token_id], tokenizer)
        tree = {"prompt": text, "text": full_text, "tokens": row}
        print_text(json.dumps(tree) if arguments.json else f"[{index}] {full_text}")


def stream_text(new_tokens: Iterator[int], prompt: list[int], tokenizer: "Tokenizer") -> None:
    """Print the text while it is generated, each part as soon as its characters are complete."""
    tokens, text, num_printed = list(prompt), decode(prompt, tokenizer), 0
    for token in new_tokens:
        if not text.endswith(REPLACEMENT_CHARACTER):
            print_text(text[num_printed:], end="")
            num_printed = len(text)
        tokens.append(token)
        text = decode(tokens, tokenizer)
    print_text(text[num_printed:])


def print_text(text: str, end: str = "\n") -> None:
    """Print generated text. A terminal gets escape sequences instead of control characters, which a model may have learned."""
    (safe_print if sys.stdout.isatty() else print)(text, end=end, flush=True)


def decode(tokens: list[int], tokenizer: "Tokenizer") -> str:
    """Decode tokens. Keep special tokens, so that the text begins with the prompt."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False)
    return text


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Return all texts to continue, those of the file last.  Raises: UserError if there is none."""
    texts: list[str] = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            # Not splitlines, which also splits at form feeds and rarer characters.
            texts += read_text(arguments.prompts).removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts: {arguments.prompts} cannot be read ({error}); give a text file") from None
    if not texts:
        raise UserError("--prompt: is missing; give --prompt TEXT or --prompts FILE")
    return texts


def encode(text: str, tokenizer: "Tokenizer") -> list[int]:
    """Return the tokens of a text.  Raises: UserError if there is none."""
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if not tokens:
        raise UserError(
            "--prompt: a text (or a line of --prompts) has no tokens; each must have at least one; give some text"
        )
    return tokens


def load_tokenizer(weight_source: WeightSource, path: Path | None) -> "Tokenizer":
    """Load the tokenizer of the weights.

    Raises: UserError if it is unknown, has more ids than the weights, or is not the tokenizer that is kept with them.
    """
    from tokenizers import Tokenizer

    file = path or weight_source.tokenizer_file
    if file is None or not file.is_file():
        problem = f"{file} is not a file" if file else "is missing, and there is none next to the weights"
        raise UserError(f"--tokenizer: {problem}; give the tokenizer.json of the corpus")
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"--tokenizer: {file} cannot be read ({error}); give a tokenizer.json") from None
    max_token_id = max(tokenizer.get_vocab().values(), default=-1)
    if max_token_id >= weight_source.model.vocab_size:
        sizes = f"has id {max_token_id}, but the weights have only {weight_source.model.vocab_size} ids"
        raise UserError(f"--tokenizer: {file} {sizes}; name the tokenizer that the weights were trained with")
    if path:
        check_same_tokenizer(weight_source, path)
    return tokenizer


def check_same_tokenizer(weight_source: WeightSource, path: Path) -> None:
    """Raise UserError if the tokenizer kept with the weights encodes otherwise. Log a warning if only its hash is known."""
    found, own = file_sha256(path), weight_source.tokenizer_file
    trained = file_sha256(own) if own else weight_source.tokenizer_sha256
    if trained is None or found == trained:
        return
    if own is None:
        message = "--tokenizer: %s has sha256 %s, but the weights were trained with a tokenizer whose sha256 is %s"
        log.warning(message, path, found[:12], trained[:12])
    elif not same_encoding(read_tokenizer(path), read_tokenizer(own), weight_source.eos_token):
        raise UserError(
            f"--tokenizer: {path} (sha256 {found[:12]}) encodes otherwise than {own} (sha256 {trained[:12]}), with which the "
            "weights were trained; leave the option out"
        )


def find_eos_token_id(weight_source: WeightSource, tokenizer: "Tokenizer") -> int:
    """Return the token that ends a document.  Raises: UserError if the tokenizer has none."""
    eos_token_id: int | None = tokenizer.token_to_id(weight_source.eos_token)
    if eos_token_id is None:
        problem = f"has no token {weight_source.eos_token}, which ends documents for these weights"
        remedy = "name the tokenizer that they were trained with, or continue past the end with --ignore-eos"
        raise UserError(f"--tokenizer: {problem}; {remedy}")
    return eos_token_id


def warn_beyond_max_seq_len(weight_source: WeightSource, seq_len: int) -> None:
    """Log a warning if texts can become longer than the rows that the weights were trained on."""
    if (trained := weight_source.max_seq_len) and seq_len > trained:
        is_btlm = isinstance(weight_source.model, BTLMConfig)
        remedy = f"; consider --alibi-scaling train_seq_len={trained}" if is_btlm else ""
        log.warning("texts may reach %d tokens, but the weights were trained on rows of %d%s", seq_len, trained, remedy)


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raise UserError if the value of a sampling option is out of range."""
    if not arguments.temperature >= 0:
        raise UserError(
            f"--temperature: {arguments.temperature} is out of range; use 0 or more; 0 takes the most likely token"
        )
    if arguments.top_k < 0:
        raise UserError(
            f"--top-k: {arguments.top_k} is negative; use a positive number, or 0 to sample from all tokens"
        )
    if not 0 < arguments.top_p <= 1:
        raise UserError(
            f"--top-p: {arguments.top_p} is out of range; use more than 0 and at most 1; 1 samples from all tokens"
        )
    if not arguments.temperature and (arguments.top_k or arguments.top_p < 1):
        raise UserError(
            "--temperature: 0 takes the most likely token and ignores --top-k and --top-p; use a higher temperature"
        )
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {arguments.max_new_tokens} is less than 1; use 1 or more")
