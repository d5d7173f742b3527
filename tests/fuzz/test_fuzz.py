"""Thousands of damaged files: each is refused in one line that names it, or read as a simple reader reads it.

The simple readers here are `json.loads`, `yaml.safe_load` and the tensors in their files. Half of the damage to a sealed file
(a fingerprint, hashes, check sums) is sealed again, so that what is behind the seal is tried as well. The seed is fixed;
FUZZ_SEED sets another, and `-m chaos` tries twenty times as many files.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tandem.trainer import crash_loop
from tandem.trainer.checkpoint import layout
from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec, write_safetensors
from tandem.trainer.checkpoint.write import commit
from tandem.trainer.config import (
    BTLMConfig,
    MupConfig,
    StableLMConfig,
    UserError,
    dump_config,
    load_config,
    parse_dataclass,
)
from tandem.trainer.data import ledger, manifest
from tandem.trainer.data.digests import Digests
from tandem.trainer.metrics.history import read_history
from tandem.trainer.metrics.records import JsonLinesSink, Sinks, StepRecord
from tandem.trainer.tools.audit.ledger_lines import parse_line
from tandem.trainer.tools.convert_hf.conversion import tensor_shapes
from tests.fuzz.mutations import AWKWARD, mutate_bytes, mutate_tree
from tests.tiny_configs import BTLM, MUP, STABLELM, config_tree

SEED = int(os.environ.get("FUZZ_SEED", "0"))
LIMIT_SECONDS = 5.0
COUNTS = {"manifest": 600, "checkpoint": 420, "config": 240, "hf": 340, "attempts": 200, "metrics": 140, "ledger": 100}
"""Inputs of each kind."""
MORE = [1, pytest.param(20, marks=pytest.mark.chaos)]


class Hang(BaseException):
    """An input took longer than LIMIT_SECONDS."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_inputs(
    kind: str, more: int, make: Callable[[random.Random], Any], read: Callable[[Any], Any], check: Callable[[Any, Any], object],
    names: str,
) -> None:  # fmt: skip
    """Make damaged inputs and read them. `check` compares an accepted result with the input; a refusal must match `names`."""
    accepted = 0
    for number in range(COUNTS[kind] * more):
        rng = random.Random(f"{SEED} {kind} {number}")
        given = make(rng)
        place = f"{kind} {number} (FUZZ_SEED={SEED}): {str(given)[-3000:]}"
        try:
            with time_limit():
                found, refusal = read(given), None
        except UserError as error:
            refusal = str(error)
        except (Hang, Exception) as error:
            raise AssertionError(place) from error
        if refusal is None:
            accepted += 1
            check(found, given)
        else:
            assert "\n" not in refusal, place
            assert re.search(names, refusal), f"{place}: {refusal}"
    assert accepted > 0, "nothing was accepted"


def dump(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def damage_json(original: bytes, rng: random.Random, seal: Callable[[Any], Any] = lambda tree: tree) -> bytes:
    """Damage the values and seal the result, or damage the bytes, or give a key twice."""
    choice = rng.randrange(8)
    if choice < 5:
        changed = mutate_tree(json.loads(original), rng)
        return dump(seal(changed) if choice < 4 else changed)
    if choice == 5:
        text = original.decode()
        keys = list(re.finditer(r'"[^"\\]+": ?', text))
        at = rng.choice(keys)
        return (text[: at.start()] + at[0] + rng.choice(("1", '"a"', "null")) + ", " + text[at.start() :]).encode()
    return mutate_bytes(original, rng)


# Corpus manifests.


def manifest_content(tree: Any) -> Any:
    return {key: value for key, value in tree.items() if key not in ("format", "version", "fingerprint")}


def seal_manifest(tree: Any) -> Any:
    if isinstance(tree, dict) and "fingerprint" in tree:
        text = json.dumps(manifest_content(tree), sort_keys=True)
        return tree | {"fingerprint": hashlib.sha256(text.encode()).hexdigest()}
    return tree


@pytest.mark.parametrize("more", MORE)
def test_manifests(more, tmp_path):
    shards = [manifest.Shard(f"train-{n:06d}.tar", 10240, 900 + n, 9, f"{n}" * 64, f"{n}" * 32) for n in range(3)]
    splits = [manifest.CorpusSplit(2703, 27, shards), manifest.CorpusSplit(0, 0, [])]
    corpus = manifest.CorpusManifest(
        "uint16",
        512,
        500,
        "<eos>",
        0,
        "1" * 64,
        5.5,
        {"tokens": 2703},
        {"seed": 1},
        *splits,
        groups={"web": {"tokens": 9}},
    )
    original, path = manifest.dump_manifest(corpus).encode(), tmp_path / "manifest.json"

    def check(found: manifest.CorpusManifest, given: bytes) -> None:
        plain = json.loads(given)
        content = manifest_content(plain)
        assert json.dumps({"groups": {}} | content, sort_keys=True) == json.dumps(
            dataclasses.asdict(found), sort_keys=True
        )
        text = json.dumps(content, sort_keys=True).encode()
        assert found.fingerprint == plain["fingerprint"] == hashlib.sha256(text).hexdigest()
        for shard in found.shards:
            assert 0 <= shard.tokens * 2 <= shard.bytes
            assert (tmp_path / shard.file).parent == tmp_path

    def make(rng: random.Random) -> bytes:
        return damage_json(original, rng, seal_manifest)

    try_inputs(
        "manifest", more, make, lambda given: manifest.parse_manifest(given, path), check, f"^{re.escape(str(path))}: "
    )


# Checkpoints: the table, and the header of a file of tensors.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "step-00000003"
    folder.mkdir()
    tables = []
    for tp_rank in range(2):
        entries = []
        sharded = {"shape": [7, 5], "dim": 0, "padded_size": 8}
        for start, numel in ((0, 12), (12, 8)):
            entries.append({"name": "matrix", "sharding": sharded, "tp_rank": tp_rank, "start": start, "numel": numel})
        if tp_rank == 0:
            whole = {"shape": [6], "dim": None, "padded_size": 0}
            entries.append({"name": "norm", "sharding": whole, "tp_rank": 0, "start": 0, "numel": 6})
        entries = [each | {"kinds": ["master"]} for each in entries]
        keys = {layout.fragment_key("master", each["name"], each["start"]): each["numel"] for each in entries}
        specs = {key: TensorSpec(torch.float32, (numel,)) for key, numel in keys.items()}
        values = (torch.arange(numel, dtype=torch.float32) + 100 * tp_rank for numel in keys.values())
        file = f"rank-{tp_rank:05d}.safetensors"
        size = write_safetensors(folder / file, specs, values)
        info = {"bytes": size, "sha256": layout.file_sha256(folder / file)}
        tables.append({"file": file, "file_info": info, "entries": entries})
    model = parse_dataclass(StableLMConfig, STABLELM, "model")
    facts = {"step": 3, "tp_size": 2, "dp_size": 1, **model_metadata(model, None), "cursor": {"web": 9}, "tokens": 96}
    commit(folder, tables, facts | {"guard": {"losses": [1.5]}, "fingerprints": {"web": "a" * 64}})
    return folder


def read_all(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    opened = open_checkpoint(folder)
    try:
        opened.model_configs()
        return opened.manifest, {name: opened.read_weight(name) for name in opened.parameter_names}
    finally:
        opened.close()


def read_plainly(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors, none of which is sharded in another dim than the first."""
    tree = json.loads((folder / layout.MANIFEST_FILE).read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for name in {each["name"] for each in tree["fragments"]}:
        fragments = [each for each in tree["fragments"] if each["name"] == name]
        fragments.sort(key=lambda each: (each["tp_rank"], each["start"]))
        parts = [load_file(folder / each["file"])[f"master/{name}/{each['start']}"] for each in fragments]
        shape = fragments[0]["sharding"]["shape"]
        tensors[name] = torch.cat(parts)[: math.prod(shape)].view(shape)
    return tensors


@pytest.mark.parametrize("more", MORE)
def test_checkpoint_tables(more, checkpoint):
    path, marker = checkpoint / layout.MANIFEST_FILE, checkpoint / layout.COMMIT_MARKER
    file = checkpoint / "rank-00000.safetensors"
    saved = {each: each.read_bytes() for each in (path, marker, file)}

    def make(rng: random.Random) -> dict[Path, bytes]:
        choice = rng.randrange(10)
        if choice == 0:
            return {rng.choice([path, marker, file]): mutate_bytes(b"1234567890", rng)}
        if choice < 3:  # the header of a file of tensors, whose hash fits
            size = int.from_bytes(saved[file][:8], "little")
            header = damage_json(saved[file][8 : 8 + size], rng)
            content = len(header).to_bytes(8, "little") + header + saved[file][8 + size :]
            tree = json.loads(saved[path])
            tree["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            return {file: content} | sealed(dump(tree))
        changed = damage_json(saved[path], rng)
        return sealed(changed) if choice < 9 else {path: changed}

    def sealed(content: bytes) -> dict[Path, bytes]:
        return {path: content, marker: hashlib.sha256(content).hexdigest().encode()}

    def read(given: dict[Path, bytes]) -> Any:
        for each, content in (saved | given).items():
            each.write_bytes(content)
        return read_all(checkpoint)

    def check(found: Any, given: dict[Path, bytes]) -> None:
        tree, tensors = found
        assert repr(tree) == repr(json.loads(path.read_bytes()))
        assert f"step-{tree['step']:08d}" == checkpoint.name
        expected = read_plainly(checkpoint)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    try:
        try_inputs("checkpoint", more, make, read, check, re.escape(str(checkpoint)))
    finally:
        read({})


# Configs.


def expected_leaf(value: Any, found: Any) -> bool:
    """Whether the config's value is what the YAML says."""
    if isinstance(found, dict):
        return (
            isinstance(value, dict)
            and {str(key) for key in value} <= set(found)
            and all(expected_leaf(each, found[str(key)]) for key, each in value.items())
        )
    if isinstance(found, list):
        return isinstance(value, list) and len(value) == len(found) and all(map(expected_leaf, value, found))
    if isinstance(found, float) and isinstance(value, str):  # YAML 1.1 takes 1e5 for a text
        return float(value) == found
    return value == found and isinstance(value, bool) == isinstance(found, bool)


@pytest.mark.parametrize("more", MORE)
def test_configs(more, tmp_path):
    original = config_tree("btlm", data={"sources": {"corpus": "here"}})
    for phase in original["schedule"]["phases"]:
        phase["mixture"] = {"corpus": 1.0}
    path = tmp_path / "config.yaml"
    leaves = [
        ("optim.beta1", 0.5),
        ("run.seed", 3),
        ("run.name", "a b"),
        ("log.every_steps", 7),
        ("schedule.lr.peak", 1e-3),
    ]
    text = yaml.safe_dump(original)

    def make(rng: random.Random) -> tuple[bytes, list[str]]:
        key, value = rng.choice(leaves)
        match rng.randrange(4):
            case 0:
                return mutate_bytes(text.encode(), rng), []
            case 1:
                awkward = rng.choice(AWKWARD)
                return text.encode(), [f"{key}={awkward}", f"{key}={value}"][: rng.randrange(1, 3)]
            case 2:
                return text.encode(), [mutate_bytes(f"{key}={value}".encode(), rng).decode(errors="surrogateescape")]
        return yaml.safe_dump(mutate_tree(original, rng)).encode(), []

    def read(given: tuple[bytes, list[str]]) -> Any:
        path.write_bytes(given[0])
        return load_config(path, given[1])

    def check(found: Any, given: tuple[bytes, list[str]]) -> None:
        tree = dataclasses.asdict(found)
        plain = yaml.safe_load(given[0])
        for override in given[1]:
            key, _, value = override.partition("=")
            *parents, name = key.split(".")
            section = plain
            for parent in parents:
                section = section[parent]
            section[name] = yaml.safe_load(value)
            if name == "name":  # a text is what was typed, not what YAML makes of it
                section[name] = tree["run"]["name"]
                assert tree["run"]["name"] in given[1][-1]
        assert expected_leaf(plain, tree), (given, tree)
        path.write_text(dump_config(found))
        assert load_config(path) == found

    try_inputs("config", more, make, read, check, r"config\.yaml|^override|^\S[^:]*: ")


# Hugging Face configs.

HF_FIELDS = {
    "stablelm": {
        "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size", "vocab_size": "vocab_size",
        "layer_norm_eps": "norm_eps", "tie_word_embeddings": "tie_word_embeddings", "use_qkv_bias": "qkv_bias",
        "qk_layernorm": "qk_layernorm", "use_parallel_residual": "parallel_residual", "initializer_range": "init_std",
        "partial_rotary_factor": "partial_rotary_factor", "rope_theta": "rotary_base",
    },
    "btlm": {
        "n_embd": "hidden_size", "n_layer": "num_layers", "n_head": "num_heads", "n_inner": "ffn_hidden_size",
        "vocab_size": "vocab_size", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_word_embeddings",
    },
}  # fmt: skip
"""Published key -> our field."""


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    models = {
        "stablelm": (parse_dataclass(StableLMConfig, STABLELM | {"num_layers": 1}, ""), None),
        "btlm": (parse_dataclass(BTLMConfig, BTLM | {"num_layers": 1}, ""), parse_dataclass(MupConfig, MUP, "")),
    }
    for name, (model, mup) in models.items():
        tensors = {tensor: torch.full(shape, 0.5) for tensor, shape in tensor_shapes(model).items()}
        read = tensors.__getitem__
        export_folder(read, model, mup, root / name, tokenizer=None, max_seq_len=64, dtype=torch.float32)
    return {name: root / name for name in models}


@pytest.mark.parametrize("more", MORE)
def test_hugging_face_configs(more, hf_folders):
    originals = {name: (folder / "config.json").read_bytes() for name, folder in hf_folders.items()}

    def make(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(list(originals))
        return name, damage_json(originals[name], rng)

    def read(given: tuple[str, bytes]) -> Any:
        (hf_folders[given[0]] / "config.json").write_bytes(given[1])
        return convert.open_folder(hf_folders[given[0]])

    def check(found: Any, given: tuple[str, bytes]) -> None:
        plain, model = json.loads(given[1]), found[0]
        assert plain["model_type"] in (given[0], f"{given[0]}_epoch")
        for key, field in HF_FIELDS[given[0]].items():
            if plain.get(key) is not None:
                assert plain[key] == getattr(model, field), (key, given)

    folders = "|".join(re.escape(str(folder)) for folder in hf_folders.values())
    try_inputs("hf", more, make, read, check, folders)


# Journals.


def damage_lines(content: bytes, rng: random.Random, seal: Callable[[Any], bytes] = dump) -> bytes:
    """Damage the values of one line and seal it, or damage the bytes of all."""
    if rng.random() < 0.5:
        return mutate_bytes(content, rng)
    lines = content.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = seal(mutate_tree(json.loads(lines[index]), rng))
    return b"\n".join(lines) + b"\n"


def plain_records(content: bytes) -> list[Any]:
    found = []
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found


@pytest.mark.parametrize("more", MORE)
def test_journals_of_starts(more, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for _ in range(2):
        with contextlib.suppress(RuntimeError), crash_loop.record_start(tmp_path, 9):
            raise RuntimeError
    with crash_loop.record_start(tmp_path, 9):
        pass
    path = tmp_path / crash_loop.STARTS_FILE
    original = path.read_bytes()

    def seal(tree: Any) -> bytes:
        if not isinstance(tree, dict):
            return dump(tree)
        body = dump({key: value for key, value in tree.items() if key != "check"})[:-1]
        return body + b', "check": "%08x"}' % crc32(body)

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        with crash_loop.record_start(tmp_path, 3):
            return list(crash_loop._read_attempts(path))

    def check(found: Any, given: bytes) -> None:
        known = plain_records(original) + plain_records(given)
        known = [
            {key: value for key, value in each.items() if key != "check"} for each in known if isinstance(each, dict)
        ]
        for record in found[:-1]:
            assert (record.id, record.time) == ("", math.inf) or dataclasses.asdict(record) in known, record
        assert (found[-1].kind, found[-1].reached) == ("start", 0), "its own"

    try_inputs(
        "attempts", more, lambda rng: damage_lines(original, rng, seal), read, check, r"run\.max_repeat_failures: "
    )


@pytest.mark.parametrize("more", MORE)
def test_metrics(more, tmp_path):
    path = tmp_path / "metrics.jsonl"
    sinks = Sinks([JsonLinesSink(path)], 0)
    sinks.write_start(
        tokens=0, world_size=1, tp_size=1, dp_size=1, total_steps=4, total_tokens=40, start_seconds={"a": 1.0}
    )
    for step in (1, 2):
        sinks.write_step(StepRecord(step, 10 * step, "a", 5, 2, 1.5, 0.1, 2.5, 0.1, 0.1, 9.0, 0.5, 0.4, None, 1.0))
    sinks.write_validation(2, 20, 1.25)
    sinks.write_checkpoint(2, 0.5, 99)
    sinks.write_rollback(1, 2, "spike")
    sinks.write_end(1, "done")
    sinks.close()
    original = path.read_bytes()

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        return read_history(tmp_path)

    def check(found: Any, given: bytes) -> None:
        known = plain_records(given)
        ends = [found.end_record] if found.end_record else []
        for record in [*found.steps, *found.validations, *found.checkpoints, *found.starts, *found.rollbacks, *ends]:
            assert any(isinstance(each, dict) and each.items() <= record.items() for each in known), record
            assert type(record["step"]) is int
            assert record["step"] >= 0

    try_inputs("metrics", more, lambda rng: damage_lines(original, rng), read, check, "metrics.jsonl")


@pytest.mark.parametrize("more", MORE)
def test_ledgers(more, tmp_path):
    written = ledger.Ledger(tmp_path)
    common = {
        "shuffle_settings": {"run.seed": 1, "data.shuffle_block_tokens": 64, "data.shuffle_window_tokens": 640},
        "phases": config_tree("btlm")["schedule"]["phases"], "fingerprints": {"a": "f" * 64}, "dp_size": 2,
    }  # fmt: skip
    written.write_start(0, {"a": 0}, skipped_shards={}, **common)
    written.write_step(1, {"a": 32}, Digests(1, 2))
    written.write_bad_step(1, 9.0, 1.0, "spike", "rollback")
    ranges = {"a": (0, 32)}
    written.write_start(
        0, {"a": 32}, skipped_shards={"a": ["x.tar"]}, skipped_ranges=ranges, is_rollback=True, **common
    )
    written.write_skipped_shard(1, "a", "y.tar")
    written.close()
    path = tmp_path / ledger.LEDGER_FILE
    original = path.read_bytes()

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        return [parse_line(n, line) for n, line in enumerate(given.split(b"\n"), 1)], ledger.read_rollbacks(
            tmp_path, 0, 0
        )

    def check(found: Any, given: bytes) -> None:
        history = found[1]
        rollbacks = [
            each for each in plain_records(given) if isinstance(each, dict) and each.get("is_rollback") is True
        ]
        if history.num_rollbacks:
            assert (history.cursor, history.skipped_shards) in [
                (each["cursor"], each["skipped_shards"]) for each in rollbacks
            ]
            assert all(type(end) is int and end >= 0 for end in history.cursor.values())

    try_inputs("ledger", more, lambda rng: damage_lines(original, rng), read, check, "ledger.jsonl")


def test_there_are_enough_inputs():
    assert sum(COUNTS.values()) >= 2_000
