"""Models between `Read` (our names, true shapes) and a Hugging Face folder, both ways, one tensor at a time.

The tables of `stablelm` and `btlm` say what is where, `folder` how it lies in files; here is what a folder is made of (config,
tokenizer, weights, the shipped code), and what is refused.
"""

import dataclasses
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.hf import btlm, stablelm
from tandem.trainer.checkpoint.hf.folder import (
    INDEX,
    SHARD,
    SHARD_BYTES,
    WEIGHTS,
    appearing,
    open_weights,
    read_json,
    write_json,
    write_weights,
)
from tandem.trainer.checkpoint.hf.tensor_mapping import Read, Row, join, whole
from tandem.trainer.config import BTLM, FAMILIES, Mup, StableLM, UserError, section_from

TABLES: dict[str, Any] = {"stablelm": stablelm, "btlm": btlm}
MARK = "tandem"
"""Key in config.json of what the published schema lacks; it also tells an export of ours."""
ONLY_HERE = {"init_truncation_sigmas": 0.0, "document_masking": False}
"""The fields below it, with the values of folders made elsewhere."""
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Endings of buffers in older folders: causal masks and rotary frequencies."""
DTYPES = ("F32", "BF16", "F16")
"""Of weights in a folder, as its files call them; fp32 holds each without loss."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export(
    read: Read,
    model: StableLM | BTLM,
    mup: Mup | None,
    out: Path,
    *,
    tokenizer: Path | None,
    eos_token: str = "<|endoftext|>",
    max_seq_len: int,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`out` is a folder that transformers loads offline (BTLM with `trust_remote_code=True`).

    Memory: one of our tensors and a piece of it. An earlier export at `out` is replaced when the new one is complete; anything
    else there is left alone. `tokenizer` is a tokenizer.json with the special token `eos_token`.
    Raises: UserError where `out` holds other files, the tokenizer does not fit, or the family has no room for
    muP.
    """
    out, table = Path(out), TABLES[model.family]
    _check_replaceable(out)
    end = _token_id(eos_token, tokenizer, model.vocab) if tokenizer else None
    config = _config(model, mup, end, max_seq_len, dtype)
    with appearing(out) as folder:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", _ends("bos", "eos", "pad", end=end) if tokenizer else {})
        for code in table.CODE:
            shutil.copyfile(Path(__file__).parent / code, folder / code)
        if tokenizer:
            _write_tokenizer(folder, tokenizer, eos_token, max_seq_len)
        _write_weights(folder, read, model, dtype, shard_bytes)


def load(folder: Path) -> tuple[StableLM | BTLM, Mup | None, Read]:
    """The model of a Hugging Face folder, its muP section, and a reader of its tensors by our names.

    Names, shapes and dtypes of all tensors are checked here; values are read, as stored, when asked for.
    Raises: UserError for a folder that is damaged, incomplete, or not of one of the two families.
    """
    folder = Path(folder)
    given = read_json(folder / "config.json")
    model, mup = _section(folder, given)
    table = TABLES[model.family]
    files, defaults = open_weights(folder), table.defaults(model)
    if model.tied_head and table.HEAD in files:
        _check_tied(folder, files.pop(table.HEAD), files, table)
    changed = [name for name, value in defaults.items() if name in files and not _is(files[name], name, value)]
    if isinstance(model, StableLM):
        model = dataclasses.replace(model, norm_bias=model.norm_bias or bool(changed))
    elif changed:
        raise UserError(f"{folder}: {changed[0]} are not ALiBi's for {model.heads} heads; choose another folder")
    rows = {row.ours: row for row in table.rows(model)}
    _check_names(folder, rows.values(), files, defaults)

    def fetch(theirs: str) -> torch.Tensor:
        found: torch.Tensor = files[theirs].get_tensor(theirs) if theirs in files else defaults[theirs]
        return found

    return model, mup, lambda ours: join(rows[ours], fetch)


def text_facts(folder: Path) -> tuple[str | None, int | None]:
    """The token that ends a document, and the longest row, as far as the folder says."""
    given, settings = read_json(folder / "config.json"), folder / "tokenizer_config.json"
    end = read_json(settings).get("eos_token") if settings.is_file() else None
    longest = given.get(TABLES[given["model_type"]].MAX_SEQ_LEN)
    return end["content"] if isinstance(end, dict) else end, longest


def _config(
    model: StableLM | BTLM, mup: Mup | None, end: int | None, max_seq_len: int, dtype: torch.dtype
) -> dict[str, Any]:
    """config.json. No pad token: the class would give its row of the embedding no gradient, and it is also the end's."""
    name = str(dtype).removeprefix("torch.")
    return {
        **TABLES[model.family].fields(model, mup, max_seq_len),
        **_ends("bos", "eos", end=end),
        "dtype": name,
        "torch_dtype": name,
        MARK: {field: getattr(model, field) for field in ONLY_HERE},
    }


def _ends(*roles: str, end: int | None) -> dict[str, int | None]:
    return {f"{role}_token_id": end for role in roles}


def _write_weights(folder: Path, read: Read, model: StableLM | BTLM, dtype: torch.dtype, shard_bytes: int) -> None:
    table = TABLES[model.family]
    rows = list(table.rows(model))
    mapped = {piece.theirs for row in rows for piece in row.pieces}
    fixed = {name: value for name, value in table.defaults(model, dtype).items() if name not in mapped}
    # These come first: in a 16-bit export the slopes are wider than the rest.
    rows = [whole(name, name, *value.shape) for name, value in fixed.items()] + rows
    dtypes = {row.ours: fixed[row.ours].dtype if row.ours in fixed else dtype for row in rows}
    write_weights(folder, lambda name: fixed[name] if name in fixed else read(name), rows, dtypes, shard_bytes)


def _write_tokenizer(folder: Path, tokenizer: Path, eos_token: str, max_seq_len: int) -> None:
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    special = {f"{role}_token": eos_token for role in ("bos", "eos", "pad", "unk")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)


def _token_id(token: str, tokenizer: Path, vocab: int) -> int:
    tree = read_json(Path(tokenizer))
    added = {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or []}
    words = tree.get("model", {}).get("vocab", {})
    largest = max([*added.values(), *(words.values() if isinstance(words, dict) else [len(words) - 1])])
    if token not in added:
        raise UserError(f"{tokenizer}: has no special token {token}; documents end with it; add it")
    if largest >= vocab:
        raise UserError(
            f"{tokenizer}: has token id {largest}; model.vocab is {vocab}; name the tokenizer of the run's corpus"
        )
    return int(added[token])


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    known = {"config.json", "generation_config.json", WEIGHTS, INDEX, *TOKENIZER_FILES, *btlm.CODE}
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        others = {name for name in names - known if not re.fullmatch(SHARD, name)}
        if not names or (not others and "config.json" in names and MARK in read_json(out / "config.json")):
            return
    raise UserError(f"{out}: holds files that no export wrote; nothing is overwritten; name a new folder")


def _section(folder: Path, given: dict[str, Any]) -> tuple[StableLM | BTLM, Mup | None]:
    where, family = f"{folder}/config.json", given.get("model_type")
    if family not in TABLES:
        raise UserError(f"{where}: model_type {family!r}; must be one of {', '.join(TABLES)}; name another folder")
    try:
        model_tree, mup_tree = TABLES[family].section(given)
        model = section_from(FAMILIES[family], model_tree | ONLY_HERE | given.get(MARK, {}), where)
        mup = section_from(Mup, mup_tree, where) if mup_tree else None
        if model.width % model.heads or model.heads % model.kv_heads:
            raise UserError(f"{where}: {model.heads} heads do not divide width {model.width}; correct it")
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing; the model needs it; add it") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: {error}; a field has an impossible value; correct it") from None
    return model, mup


def _check_names(folder: Path, rows: Iterable[Row], files: dict[str, Any], defaults: dict[str, torch.Tensor]) -> None:
    expected = {piece.theirs: piece.shape for row in rows for piece in row.pieces}
    for name, shape in expected.items():
        if name not in files and name not in defaults:
            raise UserError(f"{folder}: {name} is missing; config.json asks for it; complete the folder")
        if name not in files:
            continue
        found, dtype = tuple(files[name].get_slice(name).get_shape()), files[name].get_slice(name).get_dtype()
        if found != shape:
            raise UserError(f"{folder}: {name} has shape {found}; config.json makes it {shape}; correct one of them")
        if dtype not in DTYPES:
            raise UserError(
                f"{folder}: {name} is {dtype}; weights are read from {', '.join(DTYPES)}; convert the folder"
            )
    for name in files:
        if name not in expected and name not in defaults and not name.endswith(IGNORED):
            raise UserError(f"{folder}: {name} is no tensor of the model in config.json; correct config.json")


def _check_tied(folder: Path, head: Any, files: dict[str, Any], table: Any) -> None:
    embedding = files[table.EMBEDDING].get_tensor(table.EMBEDDING) if table.EMBEDDING in files else None
    if embedding is not None and not torch.equal(head.get_tensor(table.HEAD), embedding):
        raise UserError(
            f"{folder}: {table.HEAD} differs from the embedding; config.json ties them; set "
            "tie_word_embeddings to false"
        )


def _is(file: Any, name: str, value: torch.Tensor) -> bool:
    """Whether the file's tensor is `value`, to the rounding of 16-bit storage."""
    found = file.get_tensor(name).float().flatten()
    return found.numel() == value.numel() and torch.allclose(found, value.flatten(), rtol=2**-8, atol=0.0)
