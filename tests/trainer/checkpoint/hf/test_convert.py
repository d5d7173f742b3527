"""An export is atomic. An import refuses a bad folder with one line."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.trainer.checkpoint.hf import convert, description
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, WEIGHTS_FILE, atomic_folder
from tandem.trainer.checkpoint.hf.tensor_conversion import to_hf_tensor
from tandem.trainer.config import MupConfig, UserError
from tests.promises.test_hf import export, write_tokenizer
from tests.reference.variants import VARIANTS

QUERY = "model.layers.0.self_attn.q_proj.weight"


def edit(path: Path, **fields: object) -> None:
    tree = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in tree.items() if value != "drop"}))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add, or (None) remove tensors of a folder with one file."""
    held = load_file(folder / WEIGHTS_FILE) | tensors
    save_file({name: value for name, value in held.items() if value is not None}, folder / WEIGHTS_FILE)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*"))[1]


@pytest.mark.parametrize(
    ("variant", "shard_bytes", "damage", "message"),
    [
        ("btlm_mup", 10**9, lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        ("btlm_mup", 10**9, lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", model_type="gpt2"), "model_type 'gpt2'"),
        (
            "btlm_mup",
            10**9,
            lambda f: edit(f / "config.json", n_embd="drop"),
            "n_embd: is missing; correct config.json",
        ),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", n_embd="wide"), "n_embd: 'wide' is of type str"),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", n_head=0), "n_head: 0 is not a finite number at least 1"),
        (
            "btlm_mup",
            10**9,
            lambda f: edit(f / "config.json", n_head=5),
            "n_embd is 48, which is not a multiple of n_head 5",
        ),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", n_inner=55), "has shape"),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", n_layer=1), "is not a tensor of the model"),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", n_layer=3), "is missing"),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", n_layer=10_000), "but the files contain .* values"),
        (
            "btlm_mup",
            10**9,
            lambda f: edit(f / "config.json", n_embd=1 << 20, n_head=4),
            "but the files contain .* val",
        ),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", alibi_scaling={}), "alibi_scaling"),
        ("btlm_mup", 10**9, lambda f: edit(f / "config.json", tandem=3), "tandem: 3 is not a section"),
        (
            "btlm_mup",
            10**9,
            lambda f: edit(f / "config.json", output_logits_scale=0.2),
            "output_logits_scale is 0.2, a field that is not known",
        ),
        ("btlm_mup", 10**9, lambda f: (f / WEIGHTS_FILE).unlink(), "has neither"),
        ("btlm_mup", 10**9, lambda f: cut_short(f / WEIGHTS_FILE), "copy the file again"),
        ("btlm_mup", 10**9, lambda f: change(f, **{"transformer.ln_f.bias": None}), "ln_f.bias, which is missing"),
        (
            "btlm_mup",
            10**9,
            lambda f: change(f, **{"transformer.relative_pe.slopes": torch.ones(4)}),
            "ALiBi",
        ),
        (
            "btlm_mup",
            10**9,
            lambda f: change(f, **{"lm_head.weight": torch.ones(101, 48)}),
            "tie_word_embeddings in config.json is true, but lm_head.weight differs",
        ),
        ("stablelm_12b", 10**9, lambda f: change(f, **{"model.norm.bias": torch.ones(4)}), "has shape"),
        (
            "stablelm_12b",
            10**9,
            lambda f: change(f, **{QUERY: load_file(f / WEIGHTS_FILE)[QUERY].to(torch.float8_e4m3fn)}),
            f"{QUERY} has dtype F8_E4M3, not one of F64, F32, F16, BF16; convert",
        ),
        (
            "stablelm_12b",
            10**9,
            lambda f: change(f, **{QUERY: load_file(f / WEIGHTS_FILE)[QUERY].to(torch.int8)}),
            f"{QUERY} has dtype I8",
        ),
        ("stablelm_12b", 10**9, lambda f: edit(f / "config.json", hidden_act="gelu"), "hidden_act"),
        (
            "stablelm_12b",
            10**9,
            lambda f: edit(f / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0}),
            "rope_parameters.rope_type is not default",
        ),
        ("stablelm_12b", 30_000, lambda f: (f / INDEX_FILE).unlink(), "has neither"),
        ("stablelm_12b", 30_000, lambda f: (f / INDEX_FILE).write_text("[]"), "instead of a JSON object"),
        ("stablelm_12b", 30_000, lambda f: edit(f / INDEX_FILE, weight_map={}), "has no weight_map"),
        (
            "stablelm_12b",
            30_000,
            lambda f: edit(f / INDEX_FILE, weight_map={"a": 3}),
            "weight_map.a: 3 is of type int; co",
        ),
        ("stablelm_12b", 30_000, lambda f: shard(f).unlink(), "copy the file again"),
        ("stablelm_12b", 30_000, lambda f: cut_short(shard(f)), "copy the file again"),
        (
            "stablelm_12b",
            30_000,
            lambda f: save_file({"x": torch.ones(1)}, shard(f)),
            "contains x, but model.safetensors.index.json does not list it",
        ),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(
    variant: str, shard_bytes: int, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    export(variant, tmp_path / "out", shard_bytes=shard_bytes)
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        convert.open_folder(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_published_folders_extras_are_accepted(tmp_path: Path) -> None:
    """Causal-mask buffers, a stored tied head, slopes in 16 bits and one dim, or absent."""
    tensors = export("btlm_6_heads", tmp_path / "out")
    held = load_file(tmp_path / "out" / WEIGHTS_FILE)
    change(
        tmp_path / "out",
        **{
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).bool(),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": tensors["embedding.weight"].clone(),
            "transformer.relative_pe.slopes": held["transformer.relative_pe.slopes"].flatten().bfloat16(),
        },
    )
    edit(tmp_path / "out" / "config.json", tie_word_embeddings="drop")
    model, mup, read = convert.open_folder(tmp_path / "out")
    assert (model, mup) == VARIANTS["btlm_6_heads"]
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())
    change(tmp_path / "out", **{"transformer.relative_pe.slopes": None})
    assert convert.open_folder(tmp_path / "out")[0] == model


def test_a_tensor_of_pieces_in_several_dtypes_is_not_rounded(tmp_path: Path) -> None:
    """The first part has a narrower dtype than the others, and neither 16-bit dtype can represent the other."""
    tensors = export("stablelm_12b", tmp_path / "out")
    held, name = load_file(tmp_path / "out" / WEIGHTS_FILE), "layers.0.attention.qkv.weight"
    for changed in ({QUERY: torch.bfloat16}, {QUERY: torch.bfloat16, QUERY.replace("q_", "k_"): torch.float16}):
        given = {key: held[key].to(dtype) for key, dtype in changed.items()}
        change(tmp_path / "out", **held | given)
        found = {key: value.float() for key, value in given.items()}
        read = convert.open_folder(tmp_path / "out")[2]
        row = next(
            row
            for row in description.FAMILY_MODULES["stablelm"].tensor_mappings(VARIANTS["stablelm_12b"][0])
            if row.name == name
        )
        assert read(name).dtype == torch.float32
        for piece in row.hf_tensors:
            wanted = found.get(piece.hf_name, held[piece.hf_name])
            assert torch.equal(to_hf_tensor(row, piece, read(name)), wanted), piece.hf_name
    assert not torch.equal(read(name), tensors[name])


def test_earlier_names_of_fields_are_read(tmp_path: Path) -> None:
    """Rotary fields at the top level, as before transformers 5, and with the names of the first revisions."""
    export("stablelm_1_6b", tmp_path / "out")
    config, (wanted, _) = tmp_path / "out" / "config.json", VARIANTS["stablelm_1_6b"]
    edit(config, rope_parameters="drop")
    assert convert.open_folder(tmp_path / "out")[0] == wanted
    edit(config, partial_rotary_factor="drop", rope_pct=0.5, layer_norm_eps="drop", norm_eps=wanted.norm_eps)
    assert convert.open_folder(tmp_path / "out")[0] == wanted


def test_absent_norm_biases_are_zero_and_one_that_is_not_zero_decides(tmp_path: Path) -> None:
    export("stablelm_12b", tmp_path / "out")
    change(tmp_path / "out", **{f"model.layers.{index}.input_layernorm.bias": None for index in range(2)})
    model, _, _ = convert.open_folder(tmp_path / "out")
    assert not model.norm_bias
    change(tmp_path / "out", **{"model.norm.bias": torch.arange(96.0)})
    model, _, read = convert.open_folder(tmp_path / "out")
    assert model.norm_bias
    assert torch.equal(read("final_norm.bias"), torch.arange(96.0))
    assert torch.equal(read("layers.1.attention_norm.bias"), torch.zeros(96))


def test_the_published_fields_of_btlm_are_read() -> None:
    """Values of cerebras/btlm-3b-8k-base, whose config.json omits GPT-2's defaults."""
    published = {
        "activation_function": "swiglu", "attn_pdrop": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0,
        "eos_token_id": 50256, "initializer_range": 0.073, "layer_norm_epsilon": 1e-05, "model_type": "btlm",
        "n_embd": 2560, "n_head": 32, "n_inner": 6826, "n_layer": 32, "n_positions": 8192,
        "mup_width_scale": 0.1, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.2200000000000003,
        "mup_scale_qk_dot_by_d": True, "position_embedding_type": "alibi", "resid_pdrop": 0.0,
        "vocab_size": 50257,
    }  # fmt: skip
    model, mup = description.parse_model(Path("folder"), published)
    assert (model.hidden_size, model.num_layers, model.ffn_hidden_size, model.vocab_size) == (2560, 32, 6826, 50_257)
    assert model.tie_word_embeddings
    assert mup == MupConfig(256, 14.6, 2.2200000000000003)


def test_no_shard_is_larger_than_asked_and_the_index_is_complete(tmp_path: Path) -> None:
    export("stablelm_12b", tmp_path / "out", shard_bytes=80_000)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    sizes = {}
    for path in (tmp_path / "out").glob("model-*"):
        held = load_file(path)
        sizes[path.name] = sum(value.nbytes for value in held.values())
        assert all(index["weight_map"][name] == path.name for name in held)
    assert len(sizes) > 3
    assert max(sizes.values()) <= 80_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]


def test_weights_are_read_once_and_one_at_a_time(tmp_path: Path) -> None:
    model, mup = VARIANTS["stablelm_12b"]
    tensors, asked = export("stablelm_12b", tmp_path / "first"), []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    export_folder(read, model, mup, tmp_path / "out", tokenizer=None, max_seq_len=64, dtype=torch.bfloat16)
    assert sorted(asked) == sorted(tensors)


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    export("stablelm_12b", tmp_path / "out", shard_bytes=30_000)
    export("btlm_mup", tmp_path / "out")
    assert convert.open_folder(tmp_path / "out")[0].family == "btlm"
    assert not list((tmp_path / "out").glob("model-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["notes.txt", "config.json"])
def test_a_foreign_folder_is_left_alone(file: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("{}")
    with pytest.raises(UserError, match="name a new folder"):
        export("btlm_mup", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", file]


def test_a_file_of_the_users_inside_an_export_protects_it(tmp_path: Path) -> None:
    export("btlm_mup", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="name a new folder"):
        export("btlm_mup", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_failed_export_leaves_what_was_there(tmp_path: Path) -> None:
    tensors = export("btlm_mup", tmp_path / "out")
    model, mup = VARIANTS["btlm_mup"]

    def read(name: str) -> torch.Tensor:
        if name == "final_norm.bias":
            raise OSError("the disk is gone")
        return tensors[name]

    for out in ("out", "new"):
        with pytest.raises(OSError, match="the disk is gone"):
            export_folder(read, model, mup, tmp_path / out, tokenizer=None, max_seq_len=64, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(convert.open_folder(tmp_path / "out")[2]("embedding.weight"), tensors["embedding.weight"])


@pytest.mark.parametrize("out", [".", "/proc"])
def test_what_cannot_be_replaced_is_refused_before_anything_is_written(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder, because a shell would stay in the removed one, and a mount point."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with (
        pytest.raises(
            UserError, match=r"is (the current folder|a mount point) and cannot be replaced; name a new folder$"
        ),
        atomic_folder(Path(out)),
    ):
        raise AssertionError("something can be written")
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    left = [f".out.{gone.pid}.partial", f".out.{os.getpid()}.partial"]
    kept = [f".out.{os.getppid()}.partial", f".other.{gone.pid}.partial", f".out.{gone.pid}.old", ".out.notes.partial"]
    for name in left + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS_FILE).touch()
    with atomic_folder(tmp_path / "out") as folder:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, folder.name])
        assert not list(folder.iterdir())
    with atomic_folder(tmp_path / "out"):
        assert not (tmp_path / f".out.{gone.pid}.old").exists()


def test_a_folder_that_cannot_take_its_place_leaves_the_earlier_one_there(tmp_path: Path) -> None:
    export("btlm_mup", tmp_path / "out")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out") as folder:
        shutil.rmtree(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert convert.open_folder(tmp_path / "out")[0].family == "btlm"


def test_stablelm_with_mup_is_not_published(tmp_path: Path) -> None:
    model, _ = VARIANTS["stablelm_12b"]
    with pytest.raises(UserError, match="mup: is set"):
        export_folder(
            lambda name: torch.zeros(0), model, MupConfig(16, 1.0, 1.0), tmp_path / "out",
            tokenizer=None, max_seq_len=64, dtype=torch.float32,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vocab", "special", "message"),
    [(97, "<end>", r"has no token <\|endoftext\|>, which ends"), (200, "<|endoftext|>", "model.vocab_size is 20")],
)
def test_a_tokenizer_that_does_not_fit_is_refused(vocab: int, special: str, message: str, tmp_path: Path) -> None:
    import dataclasses

    model = dataclasses.replace(VARIANTS["btlm_mup"][0], vocab_size=20)
    write_tokenizer(tmp_path / "tokenizer.json", vocab, special)
    with pytest.raises(UserError, match=message):
        export_folder(
            lambda name: torch.zeros(0), model, None, tmp_path / "out",
            tokenizer=tmp_path / "tokenizer.json", max_seq_len=64, dtype=torch.float32,
        )  # fmt: skip


def test_a_known_name_beside_an_export_cannot_be_taken(tmp_path):
    """Another user who can write beside the target cannot block an export, and links there are not followed."""
    (tmp_path / "elsewhere").mkdir()
    for state in ("partial", "old"):
        (tmp_path / f".out.{os.getpid()}.{state}").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("export")
    assert (tmp_path / "out" / "file").read_text() == "export"
    assert not list((tmp_path / "elsewhere").iterdir())
