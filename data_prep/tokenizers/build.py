"""Make the text of a tokenizer.json from any kind of tokenizer, or train one on text.

The rest of the code uses only this text, which is part of the corpus. Generation and exports read it from there. A
tokenizer.json is used unchanged. Vocabulary files and ranks files are converted to a tokenizer.json that gives the same ids.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandem.data_prep.tokenizers import tiktoken_file
from tandem.data_prep.tokenizers.byte_level import BYTE_TO_UNICODE, NUM_BYTE_VALUES
from tandem.data_prep.tokenizers.tiktoken_file import END_OF_TEXT, SCHEMES
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import parse_json, read_file

TIKTOKEN_KINDS = tuple(SCHEMES)
"""The kinds of ranks files."""
TOKENIZER_FILE = "tokenizer.json"
VOCAB_AND_MERGES_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""File names of GPT-2's vocabulary and merges."""


def read_tokenizer(path: str, kind: str | None = None) -> str:
    """Return the tokenizer.json at `path`, or make one from it.

    `path` is a tokenizer.json, one of GPT-2's vocabulary files, a ranks file, or a folder with any of these. `kind` states
    the kind of a ranks file; the default is the kind that its name implies.

    Raises: UserError naming the file and the malformed line.
    """
    given_path = Path(path)
    if kind is not None and kind not in TIKTOKEN_KINDS:
        raise UserError(f"--tokenizer-kind: {kind} is not known; use one of {', '.join(TIKTOKEN_KINDS)}")
    if given_path.is_dir():
        return _read_folder(given_path, kind)
    kind = kind or tiktoken_file.KIND_BY_FILE_NAME.get(given_path.name)
    if kind is not None:
        return tiktoken_file.build_tokenizer_json(
            tiktoken_file.parse_ranks_file(_read_bytes(given_path), path), SCHEMES[kind], path
        )
    for names in VOCAB_AND_MERGES_FILES:
        if given_path.name in names:
            return read_vocab_and_merges(*(given_path.with_name(name) for name in names))
    if given_path.suffix == ".tiktoken":
        raise UserError(
            f"--tokenizer: {path} is a ranks file, which does not define how text is split; "
            f"add --tokenizer-kind {'|'.join(TIKTOKEN_KINDS)}"
        )
    return _read_text(given_path)


def _read_folder(folder: Path, kind: str | None) -> str:
    names = [TOKENIZER_FILE, *(names[0] for names in VOCAB_AND_MERGES_FILES), *tiktoken_file.KIND_BY_FILE_NAME]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise UserError(f"--tokenizer: {folder} contains none of {', '.join(names)}; name a file, or a folder with one")
    return read_tokenizer(str(found), kind if found.name in tiktoken_file.KIND_BY_FILE_NAME else None)


def read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> str:
    """Make a tokenizer.json from GPT-2's two files: ids of tokens, and pairs to merge, in order."""
    try:
        ids = parse_json(_read_text(vocab_path))
        if not all(type(index) is int for index in ids.values()) or len(set(ids.values())) < len(ids):
            raise ValueError("ids must be integers, and no two tokens may share one")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{vocab_path}: is not a vocabulary ({error}); it must be a JSON object of tokens and ids; get the file again"
        ) from None
    absent = next((value for value, character in BYTE_TO_UNICODE.items() if character not in ids), None)
    if absent is not None:
        raise UserError(f"{vocab_path}: has no token for byte {absent}; every byte needs one; get the file again")
    special_tokens = {END_OF_TEXT: ids[END_OF_TEXT]} if END_OF_TEXT in ids else {}
    return json.dumps(
        tiktoken_file.build_tokenizer_tree(ids, _read_merges(merges_path, ids), None, special_tokens),
        ensure_ascii=False,
    )


def _read_merges(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    pairs = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys() or pair in pairs:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}; a line must have two tokens with a space between them and must not "
                "repeat an earlier line, and both tokens and their concatenation must be in the vocabulary; get the file again"
            )
        pairs[pair] = number
    return list(pairs)


def train_bpe(texts: Iterable[str], vocab_size: int, eos_token: str) -> str:
    """Train a byte-level BPE of at most `vocab_size` ids, including every byte and EOS. Return its tokenizer.json."""
    if vocab_size <= NUM_BYTE_VALUES:
        raise UserError(
            f"--vocab-size: {vocab_size} is too small; use more than {NUM_BYTE_VALUES}, because every byte and EOS need an id"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eos_token], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=True))


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--tokenizer: {path} is not UTF-8 ({error}); name a tokenizer.json") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise UserError(f"--tokenizer: {path} cannot be read ({error}); name a tokenizer.json") from None
