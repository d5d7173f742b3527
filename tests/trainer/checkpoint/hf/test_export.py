"""An export encodes as its corpus was encoded, in transformers 4.57 and 5, and says only what is true."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tandem.data_prep.tokenizers import encoding
from tandem.trainer.checkpoint.hf import configuration_btlm, modeling_btlm
from tandem.trainer.checkpoint.hf.export import ExportedText, export_folder
from tandem.trainer.checkpoint.hf.folder import read_json
from tandem.trainer.checkpoint.hf.pretrained import load_pretrained_tokenizer
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.weight_source import WeightSource, describe_weights
from tandem.trainer.checkpoint.weights import OpenWeights
from tandem.trainer.checkpoint.write import save_imported_weights
from tandem.trainer.config import UserError
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit, dump_manifest
from tandem.trainer.data.tokenizer_file import corpus_form, file_sha256, read_tokenizer, same_encoding
from tandem.trainer.tools import evaluate, generate
from tandem.trainer.tools.convert_hf import export_check
from tandem.trainer.tools.convert_hf.export_check import CHECKED_TEXTS, find_different_text
from tests.promises.test_hf import export
from tests.reference.offline import offline
from tests.reference.use_export import use_export
from tests.reference.variants import VARIANTS, reference_module

__all__ = ["offline"]

EOS = "<|endoftext|>"
OTHER_VERSIONS = "TANDEM_TEST_TRANSFORMERS"
"""Environment variable with site folders of other versions of transformers (`pip install --target`), separated as PATH."""
NAMES_IN_BOTH = {
    "transformers": {"DynamicCache", "GenerationMixin", "PreTrainedModel", "PretrainedConfig"},
    "transformers.modeling_layers": {"GradientCheckpointingLayer"},
    "transformers.modeling_outputs": {"BaseModelOutputWithPast", "CausalLMOutputWithPast"},
    "transformers.pytorch_utils": {"Conv1D"},
    "transformers.utils": {"can_return_tuple"},
}
"""What the shipped code may import: names of transformers 4.57.6, 5.0.0 and 5.23.0."""


def bpe(special: list[str], **parts: Any) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name, part in parts.items():
        setattr(made, name, part)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["the house and a cat, the def of 12 and 345"], trainer)
    return made


def template(single: str, **ids: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=[*ids.items()])


def edited(made: Tokenizer, **sections: Any) -> Tokenizer:
    tree = json.loads(made.to_str())
    return Tokenizer.from_str(json.dumps(tree | {name: change(tree[name]) for name, change in sections.items()}))


def cutting_and_padding() -> Tokenizer:
    made = bpe([EOS])
    made.enable_truncation(5)
    made.enable_padding(length=12, pad_token=EOS, direction="left")
    return made


def llama() -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", EOS, *(f"<0x{value:02X}>" for value in range(256))]
    made.train_from_iterator(
        ["the house"], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    made.post_processor = template("<s> $A", **{"<s>": 1})
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", EOS]
    trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    made.train_from_iterator(["the house and a cat"], trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


SPLIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\p{N}|[^\p{N}]+"), "isolated"), pre_tokenizers.ByteLevel(True, use_regex=False)]
)
KINDS = {
    "plain": (lambda: bpe([EOS]), []),
    "template": (lambda: bpe(["<s>", EOS], post_processor=template("<s> $A", **{"<s>": 0})), ["post_processor"]),
    "roberta": (
        lambda: bpe(["<s>", "</s>", EOS], post_processor=processors.RobertaProcessing(("</s>", 1), ("<s>", 0))),
        ["post_processor"],
    ),
    "sequence": (
        lambda: bpe(
            ["<s>", EOS],
            post_processor=processors.Sequence([processors.ByteLevel(), template("<s> $A", **{"<s>": 0})]),
        ),
        ["post_processor"],
    ),
    "cutting_and_padding": (cutting_and_padding, ["truncation", "padding"]),
    "prefix_space": (lambda: bpe([EOS], pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), []),
    "normalizer": (lambda: bpe([EOS], normalizer=normalizers.Lowercase()), []),
    "split": (lambda: bpe([EOS], pre_tokenizer=SPLIT), []),
    "eos_in_vocabulary_only": (lambda: edited(bpe([EOS]), added_tokens=lambda _: []), ["added_tokens"]),
    "eos_not_special": (
        lambda: edited(bpe([EOS]), added_tokens=lambda tokens: [token | {"special": False} for token in tokens]),
        ["added_tokens"],
    ),
    "word_piece": (word_piece, ["post_processor"]),
    "llama": (llama, ["post_processor"]),
}  # fmt: skip


def export_with(file: Path, out: Path, variant: str = "btlm_mup", **options: Any) -> list[str]:
    model, mup = VARIANTS[variant]
    model = dataclasses.replace(model, vocab_size=600)
    read = reference_module(model).random_tensors(model, seed=3).__getitem__
    options = {"max_seq_len": 4096, "dtype": torch.bfloat16} | options
    return export_folder(read, model, mup, out, tokenizer=file, eos_token=EOS, **options)


def source(file: Path, **text: Any) -> WeightSource:
    model, mup = VARIANTS["btlm_mup"]
    return WeightSource(file.parent, model, mup, file, EOS, 64, ExportedText(**text))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_encodes_as_prepare_encodes(kind: str, tmp_path: Path) -> None:
    build, changed_sections = KINDS[kind]
    given = build()
    given.save(str(tmp_path / "tokenizer.json"))
    assert export_with(tmp_path / "tokenizer.json", tmp_path / "out") == changed_sections
    texts = [text.replace("EOS", EOS) for text in CHECKED_TEXTS]
    encode = encoding.select_encoder(given.to_str(), EOS, kind, library="tokenizers").load()
    theirs = load_pretrained_tokenizer(tmp_path / "out")
    special = [token.content for token in theirs.added_tokens_decoder.values() if token.special]
    for text in texts:
        (*expected, end), _ = encode([text])
        assert end == theirs.eos_token_id
        assert theirs(text, split_special_tokens=True).input_ids == expected, text
        assert any(token in text for token in special) or theirs(text).input_ids == expected, text
    assert theirs(f"a{EOS}").input_ids[-1] == theirs.eos_token_id
    assert find_different_text(source(tmp_path / "tokenizer.json"), tmp_path / "out") is None
    tree = read_tokenizer(tmp_path / "tokenizer.json")
    assert same_encoding(tree, read_tokenizer(tmp_path / "out" / "tokenizer.json"), EOS)
    assert corpus_form(corpus_form(tree, EOS), EOS) == corpus_form(tree, EOS)


def test_the_check_finds_a_tokenizer_that_adds_a_token_or_a_prefix_space(tmp_path: Path) -> None:
    bpe([EOS]).save(str(tmp_path / "tokenizer.json"))
    export_with(tmp_path / "tokenizer.json", tmp_path / "out")
    for made in (KINDS["template"][0](), KINDS["prefix_space"][0]()):
        made.save(str(tmp_path / "out" / "tokenizer.json"))
        assert find_different_text(source(tmp_path / "tokenizer.json"), tmp_path / "out") is not None


def test_an_imported_tokenizer_is_exported_as_it_is(tmp_path: Path) -> None:
    KINDS["template"][0]().save(str(tmp_path / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "pad_token": "<s>", "unk_token": None}
    text = ExportedText(
        tokens, chat_templates={"default": "{{ messages }}"}, is_corpus_tokenizer=False, license="apache-2.0"
    )
    assert export_with(tmp_path / "tokenizer.json", tmp_path / "out", text=text) == []
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    theirs, config = load_pretrained_tokenizer(tmp_path / "out"), read_json(tmp_path / "out" / "config.json")
    assert theirs("the").input_ids[0] == theirs.bos_token_id == 0
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.chat_template) == (1, 0, "{{ messages }}")
    wanted = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    assert {role: config[role] for role in wanted} == wanted
    assert read_json(tmp_path / "out" / "generation_config.json") == wanted
    assert find_different_text(source(tmp_path / "tokenizer.json", is_corpus_tokenizer=False), tmp_path / "out") is None
    assert "\nlicense: apache-2.0\n" in (tmp_path / "out" / "README.md").read_text()


def test_token_ids_of_an_import_without_tokenizer_are_kept(tmp_path: Path) -> None:
    ids = {"bos_token_id": 3, "eos_token_id": 5, "pad_token_id": None}
    export("stablelm_12b", tmp_path / "out", text=ExportedText(token_ids=ids))
    config = read_json(tmp_path / "out" / "config.json")
    assert {role: config[role] for role in ids} == ids
    assert read_json(tmp_path / "out" / "generation_config.json") == {"bos_token_id": 3, "eos_token_id": 5}


@pytest.mark.parametrize("kind", ["plain", "split"])
def test_vocab_and_merges_are_written_if_they_define_the_same_ids(kind: str, tmp_path: Path) -> None:
    from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer

    KINDS[kind][0]().save(str(tmp_path / "tokenizer.json"))
    export_with(tmp_path / "tokenizer.json", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").exists() == (tmp_path / "out" / "merges.txt").exists() == (kind == "plain")
    if kind == "plain":
        (tmp_path / "out" / "tokenizer.json").unlink()
        found, ours = (
            GPT2Tokenizer.from_pretrained(tmp_path / "out"),
            Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        )
        for text in ("the house", " and  a\n\ncat 345 é漢", "don't"):
            assert found(text).input_ids == ours.encode(text).ids


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_a_weight_that_is_not_finite_in_the_export_is_refused_by_name(value: float, tmp_path: Path) -> None:
    """The largest fp32 values are infinite in bf16."""
    model, mup = VARIANTS["btlm_mup"]
    tensors = reference_module(model).random_tensors(model, seed=3)
    tensors["layers.1.ffn.down.bias"][-1] = value
    with pytest.raises(
        UserError, match=r"^layers\.1\.ffn\.down\.bias: contains NaN or infinite weights as torch\.bfloat16"
    ):
        export_folder(
            tensors.__getitem__, model, mup, tmp_path / "out", tokenizer=None, max_seq_len=64, dtype=torch.bfloat16
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "is_refused"), [(float("nan"), True), (float("inf"), True), (1e-4, True), (1e-6, False)]
)
def test_the_check_passes_only_a_small_error(error: float, is_refused: bool, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_check, "max_logit_error", lambda *_: error)
    opened = OpenWeights(dataclasses.replace(source(tmp_path), tokenizer_file=None), {}.__getitem__)
    if not is_refused:
        return export_check.check_export(opened, tmp_path, torch.float32)
    with pytest.raises(UserError, match="logits differ from the run's by"):
        export_check.check_export(opened, tmp_path, torch.float32)


def test_equal_logits_without_range_have_no_error(tmp_path: Path) -> None:
    model, mup = VARIANTS["btlm_untied"]
    tensors = reference_module(model).random_tensors(model, seed=3)
    tensors["head.weight"].zero_()
    options = {"tokenizer": None, "max_seq_len": 64, "dtype": torch.float32}
    export_folder(tensors.__getitem__, model, mup, tmp_path / "out", **options)
    weight_source = WeightSource(tmp_path, model, mup, None, EOS, 64, ExportedText())
    opened = OpenWeights(weight_source, tensors.__getitem__)
    assert export_check.max_logit_error(opened, tmp_path / "out", torch.float32) == 0.0


def test_the_card_states_facts_and_no_path_and_is_replaced_unless_edited(tmp_path: Path) -> None:
    bpe([EOS]).save(str(tmp_path / "tokenizer.json"))
    text = ExportedText(num_training_tokens=123_456, validation_loss=2.5)
    export_with(tmp_path / "tokenizer.json", tmp_path / "out", text=text)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "123,456",
        "2.5000 nats",
        "4,096 tokens",
        "bfloat16",
        "4.57 and 5",
        "trust_remote_code=True",
        "custom_code",
    ):
        assert part in card
    assert str(tmp_path) not in card
    assert "license" not in card
    export_with(tmp_path / "tokenizer.json", tmp_path / "out", text=text)
    (tmp_path / "out" / "README.md").write_text(card.replace("# BTLM", "# My BTLM"))
    with pytest.raises(UserError, match="name a new folder"):
        export_with(tmp_path / "tokenizer.json", tmp_path / "out", text=text)


@pytest.mark.parametrize("variant", ["btlm_untied", "btlm_mup", "stablelm_12b"])
def test_an_export_is_the_same_in_every_version_of_transformers(variant: str, tmp_path: Path) -> None:
    bpe([EOS]).save(str(tmp_path / "tokenizer.json"))
    export_with(tmp_path / "tokenizer.json", tmp_path / "out", variant, dtype=torch.float32)
    ours = use_export(str(tmp_path / "out"))
    assert ours["token_ids"] == [[0, 0]] * 3
    assert (ours["pad"], ours["length"], ours["tokens"][2][0]) == ([0, 0], 4096, 0)
    script = Path(__file__).parents[3] / "reference" / "use_export.py"
    for site in filter(None, os.environ.get(OTHER_VERSIONS, "").split(os.pathsep)):
        environment = os.environ | {"PYTHONPATH": site, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(script), str(tmp_path / "out")]
        theirs = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        assert theirs.pop("version") != ours["version"]
        assert theirs == {key: value for key, value in ours.items() if key != "version"}


@pytest.mark.parametrize("module", [configuration_btlm, modeling_btlm])
def test_shipped_code_imports_only_names_of_both_versions(module: Any) -> None:
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            assert {alias.name for alias in node.names} <= NAMES_IN_BOTH[node.module or ""]


def test_the_same_tokenizer_written_otherwise_is_accepted_and_another_refused(tmp_path: Path, caplog: Any) -> None:
    """By generate --tokenizer and evaluate --data: what does not affect the ids of a corpus may differ."""
    own, same, other = (tmp_path / name / "tokenizer.json" for name in ("own", "same", "other"))
    for path, kind in ((own, "plain"), (same, "cutting_and_padding"), (other, "prefix_space")):
        path.parent.mkdir()
        KINDS[kind][0]().save(str(path), pretty=path != own)
    tree = json.loads(same.read_text())
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    same.write_text(json.dumps(tree))
    weight_source = source(own)
    generate.check_same_tokenizer(weight_source, same)
    with pytest.raises(UserError, match=r"^--tokenizer: .* encodes otherwise than .*own.*leave the option out$"):
        generate.check_same_tokenizer(weight_source, other)
    for path, is_same in ((same, True), (other, False)):
        empty = CorpusSplit(0, 0, [])
        corpus = CorpusManifest(
            "uint16", 256, weight_source.model.vocab_size, EOS, 0, file_sha256(path), 0.0, {}, {}, empty, empty
        )
        (path.parent / "manifest.json").write_text(dump_manifest(corpus))
        # The first check after that of the tokenizer is that of the rows, of which this corpus has none.
        expected = "--rows: 1 rows" if is_same else "--data .*other: .* has sha256 .*; choose a corpus"
        with pytest.raises(UserError, match=expected):
            evaluate.check_corpus(str(path.parent), weight_source, 1, 1)
    without_file = dataclasses.replace(weight_source, tokenizer_file=None, tokenizer_sha256=file_sha256(own))
    generate.check_same_tokenizer(without_file, own)
    assert caplog.messages == []
    generate.check_same_tokenizer(without_file, other)
    assert "the weights were trained with a tokenizer whose sha256 is" in caplog.messages[0]


def test_a_tokenizer_beside_weights_that_is_not_theirs_is_refused(tmp_path: Path) -> None:
    model, mup = VARIANTS["btlm_mup"]
    tensors, file = reference_module(model).random_tensors(model, seed=3), tmp_path / "tokenizer.json"
    bpe([EOS]).save(str(file))
    metadata = model_metadata(model, mup) | {"tokenizer_sha256": file_sha256(file)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    save_imported_weights(tmp_path, tensors.__getitem__, shapes, metadata=metadata)
    assert describe_weights(tmp_path).tokenizer_file == file
    bpe(["<s>", EOS]).save(str(file))
    with pytest.raises(UserError, match=r"tokenizer.json: has sha256 .* restore that file, or remove this one$"):
        describe_weights(tmp_path)
