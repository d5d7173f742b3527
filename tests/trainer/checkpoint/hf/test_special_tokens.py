"""The tokenizer files of a Hugging Face folder agree, and no special token or id is lost in an import."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import GPT2TokenizerFast

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.hf import description, special_tokens
from tandem.trainer.checkpoint.hf.pretrained import load_pretrained_tokenizer
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.config import UserError
from tests.promises.test_hf import export, write_tokenizer
from tests.trainer.checkpoint.hf.test_import import edit

END = "<|endoftext|>"
TEXTS = (
    "",
    "the house and a cat",
    " don't  I'LL\n\n 12 x",
    "é 漢字 \U0001f469\u200d\U0001f467",
    f"a {END} b",
    "<pad>the",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write_tokenizer(root / "tokenizer.json", vocab=97)
    export("btlm_mup", root / "folder", tokenizer=root / "tokenizer.json")
    return root / "folder"


@pytest.fixture
def folder(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "folder")


def to_gpt2_files(folder: Path, **settings: object) -> None:
    """Replace tokenizer.json by GPT-2's two files, as in the published BTLM."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(tree["model"]["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tree["model"]["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(merges))
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", **settings)
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("prefix_space", [False, True])
def test_gpt2s_two_files_become_a_tokenizer_that_encodes_the_same(folder, tmp_path, prefix_space):
    given = json.loads((folder / "tokenizer.json").read_text())
    to_gpt2_files(
        folder, add_prefix_space=prefix_space, pad_token="<pad>", added_tokens_decoder={"98": {"content": "<pad>"}}
    )
    (folder / "special_tokens_map.json").unlink()
    edit(folder, "generation_config.json", pad_token_id=98)
    assert main(["import-hf", str(folder), str(tmp_path / "in")]) == 0
    ours = Tokenizer.from_file(str(tmp_path / "in" / "tokenizer.json"))
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    if hasattr(GPT2TokenizerFast, "slow_tokenizer_class"):  # transformers 4
        theirs = GPT2TokenizerFast(vocab, merges, add_prefix_space=prefix_space, pad_token="<pad>")
    else:
        pairs = [tuple(pair) for pair in given["model"]["merges"]]
        theirs = GPT2TokenizerFast(given["model"]["vocab"], pairs, add_prefix_space=prefix_space)
        theirs.add_special_tokens({"pad_token": "<pad>"})
    shift = {theirs.convert_tokens_to_ids("<pad>"): 98}
    for text in TEXTS:
        assert ours.encode(text).ids == [shift.get(index, index) for index in theirs(text)["input_ids"]], text


def test_special_tokens_and_ids_are_kept(folder, tmp_path):
    edit(folder, bos_token_id=3, pad_token_id=5, eos_token_id=[0, 7])
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder, file, bos_token="drop", pad_token="drop", unk_token={"content": "a"}, chat_template="{{ é }}")
    (folder / "generation_config.json").unlink()
    names = {
        index: token for token, index in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].items()
    }
    unk_id = next(index for index, token in names.items() if token == "a")
    assert main(["import-hf", str(folder), str(tmp_path / "in")]) == 0
    manifest = open_checkpoint(tmp_path / "in").manifest
    assert manifest["special_tokens"] == {
        "bos_token": names[3], "eos_token": END, "pad_token": names[5], "unk_token": "a",
    }  # fmt: skip
    assert manifest["token_ids"] == {
        "bos_token_id": 3,
        "eos_token_id": [0, 7],
        "pad_token_id": 5,
        "unk_token_id": unk_id,
    }
    assert manifest["eos_token"] == END
    assert main(["export-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 3, "eos_token_id": [0, 7], "pad_token_id": 5,
    }  # fmt: skip
    assert description.read_special_tokens(tmp_path / "out") == (manifest["special_tokens"], manifest["token_ids"])
    assert (tmp_path / "in" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ é }}"


def test_eos_is_found_by_its_id_if_no_file_names_it(folder):
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink()
    assert description.read_text_settings(folder)[0] == END
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / file).unlink()
    assert description.read_special_tokens(folder) == ({}, {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})


def other_vocabulary(folder: Path, **words: int) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    to_gpt2_files(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    edit(folder, "vocab.json", **words)


def other_merges(folder: Path) -> None:
    other_vocabulary(folder)
    lines = (folder / "merges.txt").read_text().split("\n")
    (folder / "merges.txt").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (
            lambda f: edit(f, "special_tokens_map.json", eos_token="a"),
            ["special_tokens_map.json has the eos_token 'a'", END],
        ),
        (lambda f: edit(f, "tokenizer_config.json", eos_token=3), ["eos_token is 3, which is not a text"]),
        (
            lambda f: edit(f, eos_token_id=4),
            ["the id of eos_token '<|endoftext|>' is 0", "eos_token_id of config.json is 4"],
        ),
        (lambda f: edit(f, eos_token_id=[4, 5]), ["eos_token_id of config.json is 4 or 5"]),
        (lambda f: edit(f, bos_token_id=4), ["bos_token_id of config.json is 4"]),
        (
            lambda f: edit(f, "generation_config.json", eos_token_id=4),
            ["config.json is 0", "generation_config.json is 4"],
        ),
        (lambda f: edit(f, "generation_config.json", eos_token_id="x"), ["eos_token_id is 'x', but an id"]),
        (lambda f: edit(f, eos_token_id=[]), ["eos_token_id is []"]),
        (lambda f: edit(f, bos_token_id=[0]), ["bos_token_id is [0]"]),
        (
            lambda f: edit(f, eos_token_id=[0, 101]),
            ["eos_token_id of config.json is 101, but vocab_size in config.json is 101"],
        ),
        (
            lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder={"7": {"content": END}}),
            ["added_tokens_decoder", "7", "0"],
        ),
        (
            lambda f: edit(f, "tokenizer_config.json", pad_token="<p>") or (f / "special_tokens_map.json").unlink(),
            ["'<p>', but the tokenizer has no such token"],
        ),
        (
            lambda f: edit(f, "tokenizer.json", added_tokens=[{"id": 200, "content": "<x>"}]),
            ["'<x>'", "200", "vocab_size"],
        ),
        (lambda f: edit(f, "tokenizer.json", model=3), ["is not a tokenizer.json"]),
        (lambda f: other_vocabulary(f, a=90), ["vocab.json gives 'a' the id 90, but tokenizer.json"]),
        (lambda f: other_merges(f), ["merges.txt and tokenizer.json have different merges"]),
        (
            lambda f: to_gpt2_files(f) or edit(f, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer"),
            ["'Qwen2Tokenizer'", "save tokenizer.json"],
        ),
        (lambda f: to_gpt2_files(f, add_bos_token=True), ["add_bos_token is true"]),
        (lambda f: to_gpt2_files(f) or (f / "merges.txt").write_text("a b c\n"), ["'a b c' is not two tokens"]),
        (lambda f: to_gpt2_files(f) or edit(f, "vocab.json", a="x"), ["vocab.json", "'a'", "'x'"]),
        (lambda f: to_gpt2_files(f) or (f / "merges.txt").write_bytes(b"\xff\xfe"), ["merges.txt"]),
    ],
)
def test_tokenizer_files_that_contradict_one_another_are_refused(folder, damage, parts, tmp_path, capsys):
    damage(folder)
    with pytest.raises(UserError) as caught:
        description.read_text_settings(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in (str(folder), *parts) if part not in message] == [], message


def test_what_is_refused_leaves_nothing(folder, tmp_path, capsys):
    edit(folder, eos_token_id=4)
    assert main(["import-hf", str(folder), str(tmp_path / "in")]) == 2
    assert "eos_token_id of config.json is 4" in capsys.readouterr().err
    assert not (tmp_path / "in").exists()
    assert special_tokens.ROLES == ("bos", "eos", "pad", "unk")


def test_gpt2s_two_files_are_the_tokenizer_of_every_command(folder, tmp_path, capsys):
    to_gpt2_files(folder)
    assert main(["export-hf", str(folder), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1"]) == 0


TEMPLATES = {"default": "{{ messages }}\r\n", "tool_use": "{{ é }}", "rag": "{{ documents }}"}


def test_all_chat_templates_are_kept(folder, tmp_path):
    entries = [{"name": name, "template": template} for name, template in TEMPLATES.items() if name != "rag"]
    edit(folder, "tokenizer_config.json", chat_template=entries)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_bytes(TEMPLATES["rag"].encode())
    assert main(["import-hf", str(folder), str(tmp_path / "in")]) == 0
    for _ in range(2):  # the second replaces the first
        assert main(["export-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    kept = {name: template.replace("\r\n", "\n") for name, template in TEMPLATES.items()}
    assert special_tokens.read_chat_templates(tmp_path / "out") == kept
    theirs = load_pretrained_tokenizer(tmp_path / "out").chat_template
    assert {name: template.replace("\r\n", "\n") for name, template in theirs.items()} == kept


@pytest.mark.parametrize(
    ("files", "setting", "parts"),
    [
        ({"chat_template.jinja": b"one"}, "two", ["another chat template 'default' than chat_template.jinja"]),
        (
            {"additional_chat_templates/rag.jinja": b"one"},
            [{"name": "rag", "template": "two"}],
            ["tokenizer_config.json has another chat template 'rag' than additional_chat_templates/rag.jinja"],
        ),
        ({}, [{"name": "a", "template": "1"}, {"name": "a", "template": "2"}], ["gives a name twice"]),
        ({}, [{"name": "../a", "template": "1"}], ["chat_template[0].name: '../a' is not"]),
        ({}, [{"name": "a"}], ["chat_template[0].template: is missing"]),
        ({}, 7, ["chat_template: 7 is not a list"]),
        ({"chat_template.jinja": b"\xff"}, None, ["chat_template.jinja: cannot be read as UTF-8 text"]),
    ],
)
def test_chat_templates_that_contradict_one_another_are_refused(folder, tmp_path, capsys, files, setting, parts):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    edit(folder, "tokenizer_config.json", chat_template=setting)
    assert main(["import-hf", str(folder), str(tmp_path / "in")]) == 2
    line = capsys.readouterr().err
    assert [part for part in parts if part not in line] == [], line
    assert not (tmp_path / "in").exists()
