"""The text of a tokenizer.json, from each of the forms a tokenizer comes in, or trained on text.

That text is all the rest of the code knows: it ships in the corpus, and generation and exports read it. A tokenizer.json
is taken as it is; of vocabulary files and ranks one is made that gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandem.data_prep.tokenizers import tiktoken_file
from tandem.data_prep.tokenizers.byte_level import BYTE_VALUES, CHARACTERS
from tandem.data_prep.tokenizers.tiktoken_file import END, SCHEMES
from tandem.trainer.config import UserError

KINDS = tuple(SCHEMES)
"""What a ranks file may be of."""
FILE = "tokenizer.json"
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Names that GPT-2's vocabulary and merges go by."""


def read(path: str, kind: str | None = None) -> str:
    """The tokenizer.json in, or made of, `path`: a tokenizer.json, a folder with one or with GPT-2's vocabulary files (or
    one of these), or a ranks file of a kind that `kind` or its name says.

    Raises: UserError naming the file, and the line where one is malformed.
    """
    given = Path(path)
    if kind is not None and kind not in KINDS:
        raise UserError(f"--tokenizer-kind: {kind}; must be one of {', '.join(KINDS)}; change it")
    if given.is_dir():
        return _in_folder(given, kind)
    kind = kind or tiktoken_file.NAMES.get(given.name)
    if kind is not None:
        return tiktoken_file.tokenizer_json(tiktoken_file.read(_bytes(given), path), SCHEMES[kind], path)
    for names in VOCABULARY_FILES:
        if given.name in names:
            return vocabulary(*(given.with_name(name) for name in names))
    if given.suffix == ".tiktoken":
        raise UserError(
            f"--tokenizer: {path} is a ranks file, which does not say how text is split; "
            f"say what it is of with --tokenizer-kind {'|'.join(KINDS)}"
        )
    return _text(given)


def _in_folder(folder: Path, kind: str | None) -> str:
    names = [FILE, *(names[0] for names in VOCABULARY_FILES), *tiktoken_file.NAMES]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise UserError(f"--tokenizer: {folder} has none of {', '.join(names)}; name a file, or a folder with one")
    return read(str(found), kind if found.name in tiktoken_file.NAMES else None)


def vocabulary(vocab: Path, merges: Path) -> str:
    """The tokenizer.json of GPT-2's two files: ids of tokens, and the pairs that are merged, in their order."""
    try:
        ids = json.loads(_text(vocab))
        if not all(type(index) is int for index in ids.values()) or len(set(ids.values())) < len(ids):
            raise ValueError("ids must be whole numbers, each of one token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{vocab}: is no vocabulary ({error}); must be a JSON object of tokens and ids") from None
    absent = next((value for value, character in CHARACTERS.items() if character not in ids), None)
    if absent is not None:
        raise UserError(f"{vocab}: has no token for byte {absent}; every byte needs one; get the file again")
    specials = {END: ids[END]} if END in ids else {}
    return json.dumps(tiktoken_file.tree(ids, _pairs(merges, ids), None, specials), ensure_ascii=False)


def _pairs(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    pairs = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys() or pair in pairs:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}; must be two tokens of the vocabulary, parted by a space, "
                "that make a third, and no line before; get the file again"
            )
        pairs[pair] = number
    return list(pairs)


def train(texts: Iterable[str], vocab: int, eos: str) -> str:
    """tokenizer.json of a byte-level BPE of at most `vocab` ids, every byte and EOS among them."""
    if vocab <= BYTE_VALUES:
        raise UserError(f"--vocab: {vocab}; must be above {BYTE_VALUES}, room for every byte and EOS; raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=True))


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--tokenizer: {path} is not UTF-8 ({error}); name a tokenizer.json") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer: {path} cannot be read ({error}); name a tokenizer.json") from None
