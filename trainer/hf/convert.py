"""Weights between `Read` (our names, true shapes) and a Hugging Face folder, both ways, one tensor at a time.

The tables of `stablelm` and `btlm` say what is where; here are files only: config.json, safetensors in shards
with their index, the tokenizer, the shipped code. A folder appears whole or not at all.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.config import BTLM, FAMILIES, Mup, StableLM, UserError, section_from
from trainer.hf import btlm, stablelm
from trainer.hf.mapping import Read, Row, cut, join

TABLES: dict[str, Any] = {"stablelm": stablelm, "btlm": btlm}
SHARD_BYTES = 4_000_000_000
MARK = "tandem"
"""Key in config.json of what the published schema lacks; it also tells an export of ours."""
ONLY_HERE = {"init_truncation_sigmas": 0.0, "document_masking": False}
"""The fields below it, with the values of folders made elsewhere."""
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Endings of buffers in older folders: causal masks and rotary frequencies."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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

    Memory: one shard. An earlier export at `out` is replaced when the new one is complete; anything else
    there is left alone. `tokenizer` is a tokenizer.json with the special token `eos_token`.
    Raises: UserError where `out` holds other files, the tokenizer does not fit, or the family has no room for
    muP.
    """
    out, table = Path(out), TABLES[model.family]
    _check_replaceable(out)
    name = str(dtype).removeprefix("torch.")
    config = {**table.fields(model, mup, max_seq_len), "dtype": name, "torch_dtype": name}
    config[MARK] = {field: getattr(model, field) for field in ONLY_HERE}
    end = _token_id(eos_token, tokenizer, model.vocab) if tokenizer else None
    tokens = {f"{role}_token_id": end for role in ("bos", "eos", "pad")}
    config.update(tokens)
    with _appearing(out) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", tokens if tokenizer else {})
        for code in table.CODE:
            shutil.copyfile(Path(__file__).parent / code, folder / code)
        if tokenizer:
            _write_tokenizer(folder, tokenizer, eos_token, max_seq_len)
        _write_weights(folder, read, list(table.rows(model)), table.defaults(model), dtype, shard_bytes)


def load(folder: Path) -> tuple[StableLM | BTLM, Mup | None, Read]:
    """The model of a Hugging Face folder, its muP section, and a reader of its tensors by our names.

    Names and shapes of all tensors are checked here; values are read, as stored, when asked for.
    Raises: UserError for a folder that is damaged, incomplete, or not of one of the two families.
    """
    folder = Path(folder)
    given = _read_json(folder / "config.json")
    model, mup = _section(folder, given)
    table = TABLES[model.family]
    files, defaults = _open(folder), table.defaults(model)
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


def _write_weights(
    folder: Path,
    read: Read,
    rows: list[Row],
    defaults: dict[str, torch.Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    shards = _shards(rows, dtype.itemsize, shard_bytes)
    written: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        tensors: dict[str, torch.Tensor] = {}
        for row in shard:
            ours = read(row.ours)
            assert tuple(ours.shape) == row.shape, f"{row.ours}: {tuple(ours.shape)} is not {row.shape}"
            for piece in row.pieces:
                part = cut(row, piece, ours)
                tensors[piece.theirs] = part.to(dtype, memory_format=torch.contiguous_format, copy=True)
        if number == len(shards):
            tensors |= {name: value for name, value in defaults.items() if name not in tensors | written}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        written |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": written})


def _shards(rows: list[Row], itemsize: int, shard_bytes: int) -> list[list[Row]]:
    """The rows in order, in runs of at most `shard_bytes` (a larger row is alone)."""
    shards: list[list[Row]] = [[]]
    used = 0
    for row in rows:
        size = math.prod(row.shape) * itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(row)
        used += size
    return shards


def _write_tokenizer(folder: Path, tokenizer: Path, eos_token: str, max_seq_len: int) -> None:
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    special = {f"{role}_token": eos_token for role in ("bos", "eos", "pad", "unk")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)


def _token_id(token: str, tokenizer: Path, vocab: int) -> int:
    tree = _read_json(Path(tokenizer))
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
    known = {"config.json", "generation_config.json", INDEX, *TOKENIZER_FILES, *btlm.CODE}
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        others = {name for name in names - known if not (name.startswith("model") and name.endswith(".safetensors"))}
        if not names or (not others and "config.json" in names and MARK in _read_json(out / "config.json")):
            return
    raise UserError(f"{out}: holds files that no export wrote; nothing is overwritten; name a new folder")


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or is gone after an error."""
    folder, old = (out.with_name(f".{out.name}.{os.getpid()}.{state}") for state in ("partial", "old"))
    folder.mkdir(parents=True)
    try:
        yield folder
        if out.exists():
            out.rename(old)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _open(folder: Path) -> dict[str, Any]:
    """Every tensor's name in the folder, with the open file that holds it."""
    if (folder / INDEX).is_file():
        wanted = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values() or [None]):
            raise UserError(f"{folder / INDEX}: has no weight_map; it names the file of every tensor; copy it again")
    elif (folder / WEIGHTS).is_file():
        wanted = {}
    else:
        raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; weights are read from safetensors; add them")
    held: dict[str, Any] = {}
    for name in sorted(set(wanted.values())) if wanted else [WEIGHTS]:
        try:
            file = safe_open(folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: cannot be read: {error}; copy the file again") from None
        held |= dict.fromkeys(file.keys(), file)
    lost = [name for name in wanted if name not in held]
    if lost:
        raise UserError(
            f"{folder / INDEX}: {lost[0]} is not in {wanted[lost[0]]}; index and files differ; copy them again"
        )
    return held


def _check_names(folder: Path, rows: Iterable[Row], files: dict[str, Any], defaults: dict[str, torch.Tensor]) -> None:
    expected = {piece.theirs: piece.shape for row in rows for piece in row.pieces}
    for name, shape in expected.items():
        if name not in files and name not in defaults:
            raise UserError(f"{folder}: {name} is missing; config.json asks for it; complete the folder")
        if name in files and tuple(files[name].get_slice(name).get_shape()) != shape:
            found = tuple(files[name].get_slice(name).get_shape())
            raise UserError(f"{folder}: {name} has shape {found}; config.json makes it {shape}; correct one of them")
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; it must be a JSON file; add or correct it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}; must be a JSON object; correct it")
    return tree


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
