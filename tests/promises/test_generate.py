"""Generation with the cache equals recomputation and transformers on the export. No row affects another."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from tandem.trainer.__main__ import CLOSED_PIPE_EXIT_CODE, main
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models.kv_cache import KVCache
from tandem.trainer.models.sampling import SamplingConfig, generate_tokens, left_pad, sample_tokens
from tandem.trainer.tools.generate import stream_text
from tests import ranks
from tests.decoding import (
    DECODER_VARIANTS,
    LONG_PROMPT_LENGTHS,
    NUM_STEPS,
    PROMPT_LENGTHS,
    TP2_VARIANTS,
    build_decoder,
    cached_logits,
    decode_on_two_ranks,
    logits_and_samples,
    prompts_and_continuations,
    uncached_logits,
)
from tests.promises.test_hf import loaded
from tests.reference.offline import offline
from tests.reference.variants import NOT_IN_TRANSFORMERS, VARIANTS, random_tokens, reference_module

__all__ = ["offline"]

NOISE = 4
"""Two fp32 evaluations differ from fp64 by about the same amount. This leaves room for another order of sums."""
every_case = pytest.mark.parametrize("variant", DECODER_VARIANTS)
every_exported_case = pytest.mark.parametrize(
    "variant", [variant for variant in DECODER_VARIANTS if variant not in NOT_IN_TRANSFORMERS]
)


def through_transformers(theirs: PreTrainedModel, prompts: list[list[int]], followed_by: Tensor) -> Tensor:
    """The same through the cache of transformers, padded on the left."""
    read = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], batch_first=True, padding_side="left").long()
    cache, logits = DynamicCache(config=theirs.config), []
    with torch.no_grad():
        for step in range(NUM_STEPS):
            places = {} if theirs.config.model_type == "btlm" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            places = {name: value[:, -read.shape[1] :] for name, value in places.items()}
            logits.append(theirs(read, attention_mask=mask, past_key_values=cache, **places).logits[:, -1])
            read = followed_by[:, step : step + 1]
            mask = torch.cat((mask, torch.ones_like(read)), dim=1)
    return torch.stack(logits, dim=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], PreTrainedModel]:
    """exported(variant): what transformers loads from its export, once for all tests."""

    @cache
    def load(variant: str) -> PreTrainedModel:
        (model, mup), out = DECODER_VARIANTS[variant], tmp_path_factory.mktemp("export") / "out"
        tensors = reference_module(model).random_tensors(model, seed=3)
        options = {"tokenizer": None, "max_seq_len": 64, "dtype": torch.float32}
        export_folder(tensors.__getitem__, model, mup, out, **options)
        return loaded(out).eval()

    return load


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


@every_exported_case
@pytest.mark.parametrize("lengths", [PROMPT_LENGTHS, LONG_PROMPT_LENGTHS], ids=["short", "long"])
def test_reading_on_is_transformers_reading_on_and_reading_from_scratch(variant, lengths, mesh, exported):
    """Of every logit at every step, each row beside longer ones. Beyond the length that dynamic interpolation begins at,
    reading from scratch is another function; its first logits, all read at once, are still the same.
    """
    ours, (prompts, followed_by) = build_decoder(variant, mesh), prompts_and_continuations(variant, lengths)
    theirs = exported(variant)
    through = through_transformers(theirs, prompts, followed_by)
    exact = through_transformers(deepcopy(theirs).double(), prompts, followed_by)
    noise = NOISE * (through - exact).abs().max()
    assert (cached_logits(ours, prompts, followed_by) - exact).abs().max() <= noise
    scratch = (uncached_logits(ours, prompts, followed_by) - exact).abs()
    if variant != "btlm_dynamic" or lengths == PROMPT_LENGTHS:
        assert scratch.max() <= noise
    else:
        assert scratch[:, 0].max() <= noise
        assert scratch[0, -1].max() > 100 * noise
        assert scratch[2].max() <= noise, "a short row beside long ones is read as if alone"


@every_exported_case
def test_the_likeliest_tokens_are_those_of_transformers_generate(variant, mesh, exported):
    ours, (prompts, _) = build_decoder(variant, mesh), prompts_and_continuations(variant, PROMPT_LENGTHS)
    read, documents = left_pad(prompts, 1)
    settings = GenerationConfig(max_new_tokens=NUM_STEPS, do_sample=False, pad_token_id=0)
    theirs = exported(variant)
    found = theirs.generate(read, attention_mask=(documents >= 0).long(), generation_config=settings)
    steps = list(generate_tokens(ours, prompts, NUM_STEPS, SamplingConfig(), eos_token_id=None))
    assert torch.tensor(steps).t().tolist() == found[:, read.shape[1] :].tolist()


@every_case
def test_documents_are_read_on_as_they_are_read_at_once(variant, mesh):
    """The parts end inside documents and at their ends."""
    ours, batch = build_decoder(variant, mesh), random_tokens(DECODER_VARIANTS[variant][0], num_rows=2, seq_len=20)
    documents = torch.tensor([[0] * 6 + [1] * 9 + [2] * 5, [0] * 1 + [1] * 19]).int()
    whole, cache = ours.logits(batch, documents), KVCache()
    for start, end in ((0, 4), (4, 6), (6, 7), (7, 16), (16, 20)):
        part = slice(start, end)
        found = ours.next_token_logits(batch[:, part], documents[:, part], cache)
        # A few roundings of the largest logit.
        assert (found - whole[:, end - 1]).abs().max() <= 2**-19 * whole.abs().max()


@pytest.mark.dist
def test_two_tensor_parallel_ranks_read_on_as_one_does(mesh, tmp_path):
    first, second = ranks.run(decode_on_two_ranks, 2, tmp_path)
    for variant in TP2_VARIANTS:
        logits, drawn = logits_and_samples(variant, mesh)
        assert (first[variant][0] - logits).abs().max() <= 2**-19 * logits.abs().max()
        assert first[variant][1] == second[variant][1] == drawn


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(1.5, seed=3)], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("variant", ["stablelm_12b", "btlm_dynamic"])
def test_a_text_does_not_depend_on_the_prompts_beside_it(variant, sampling, mesh):
    ours, (prompts, _) = build_decoder(variant, mesh), prompts_and_continuations(variant, LONG_PROMPT_LENGTHS)

    def together(chosen: list[list[int]], **options) -> list[tuple[int, ...]]:
        return list(zip(*generate_tokens(ours, chosen, NUM_STEPS, sampling, eos_token_id=None, **options), strict=True))

    alone = [together([prompt])[0] for prompt in prompts]
    assert together(prompts) == alone
    assert together(prompts[::-1]) == alone[::-1]
    assert len(set(alone)) == len(alone)
    again = together([prompts[0], prompts[1], prompts[0]])
    assert again[:2] == alone[:2]
    assert (again[2] == alone[0]) == (sampling.temperature == 0), "a prompt given twice is drawn twice"
    if variant == "stablelm_12b":
        assert together(prompts, use_cache=False) == alone


def test_the_seed_fixes_the_text(mesh):
    ours, (prompts, _) = build_decoder("btlm_mup", mesh), prompts_and_continuations("btlm_mup", PROMPT_LENGTHS)
    first, again, other = (
        list(generate_tokens(ours, prompts, NUM_STEPS, SamplingConfig(9.0, seed=seed), eos_token_id=None))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert all(one != two for one, two in zip(zip(*first, strict=True), zip(*other, strict=True), strict=True))


def test_all_rows_end_before_the_steps_do(mesh):
    """Each text ends at its own EOS. The loop continues until the last one has ended."""
    ours, (prompts, _) = build_decoder("stablelm_12b", mesh), prompts_and_continuations("stablelm_12b", PROMPT_LENGTHS)
    unended = list(generate_tokens(ours, prompts, NUM_STEPS, SamplingConfig(3.0), eos_token_id=None))
    assert len(unended) == NUM_STEPS
    for end in (unended[0][0], unended[4][1], unended[-1][2]):
        last = [row.index(end) + 1 if end in row else NUM_STEPS for row in zip(*unended, strict=True)]
        assert (
            list(generate_tokens(ours, prompts, NUM_STEPS, SamplingConfig(3.0), eos_token_id=end))
            == unended[: max(last)]
        )


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def shares(sampling: SamplingConfig, probabilities: list[float], draws: int = 4_000) -> Tensor:
    """Count how often each token is drawn."""
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    drawn = sample_tokens(logits, sampling, generators(draws))
    return torch.bincount(torch.tensor(drawn), minlength=len(probabilities)) / draws


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (SamplingConfig(1.0), [0.4, 0.3, 0.2, 0.1]),
        (SamplingConfig(0.5), [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),
        (SamplingConfig(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (SamplingConfig(1.0, top_p=0.69), [4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(1.0, top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (SamplingConfig(1.0, top_p=0.01), [1, 0, 0, 0]),
        # Of the two likeliest, the first alone has 4/7 > 0.5.
        (SamplingConfig(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
        (SamplingConfig(1e-40), [1, 0, 0, 0]),
        (SamplingConfig(1e-60), [1, 0, 0, 0]),
        (SamplingConfig(), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_the_settings_say(sampling, wanted):
    found = shares(sampling, [0.4, 0.3, 0.2, 0.1])
    expected = torch.tensor(wanted)
    # Five standard errors of a share of 4,000 draws.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 4_000).sqrt()).all(), found


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An export with a byte tokenizer, so that random weights generate many incomplete characters."""
    root = tmp_path_factory.mktemp("generate")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 280, "special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    made.train_from_iterator(["the house and a cat"], trainers.BpeTrainer(**settings, show_progress=False))
    made.save(str(root / "tokenizer.json"))
    model, mup = VARIANTS["btlm_untied"]
    model = replace(model, vocab_size=280)
    tensors = reference_module(model).random_tensors(model, seed=3)
    export_folder(
        tensors.__getitem__, model, mup, root / "out", tokenizer=root / "tokenizer.json", max_seq_len=64,
        dtype=torch.float32,
    )  # fmt: skip
    return root / "out"


def said(capsys, *arguments: object) -> str:
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


DRAWN = ("--temperature", 2, "--seed", 4, "--max-new-tokens", 30)


def test_the_command_prints_one_text_or_numbers_several(folder, capsys, tmp_path):
    single = said(capsys, folder, "--prompt", "the house", *DRAWN)
    assert single.startswith("the house")
    assert said(capsys, folder, "--prompt", "the house", *DRAWN, "--no-cache") == single
    assert said(capsys, folder, "--prompt", "the house", *DRAWN, "--alibi-scaling", "factor=8") != single
    (tmp_path / "prompts.txt").write_text("a cat\nthe\n")
    several = said(capsys, folder, "--prompt", "the house", "--prompts", tmp_path / "prompts.txt", *DRAWN)
    assert several.startswith(f"[0] {single}[1] a cat")
    assert "\n[2] the" in several


def test_a_text_ends_with_its_document_unless_asked_to_go_on(folder, capsys):
    """The temperature makes all 280 tokens equally likely, so about a third of the rows end within 100 tokens."""
    end = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|endoftext|>")
    prompts = ["a", "cat", "and", "the", "house", "in", "it"]
    options = [each for prompt in prompts for each in ("--prompt", prompt)]
    options += ["--temperature", 1e6, "--max-new-tokens", 100, "--json"]
    ended = [json.loads(line) for line in said(capsys, folder, *options).splitlines()]
    unended = [json.loads(line) for line in said(capsys, folder, *options, "--ignore-eos").splitlines()]
    assert [each["prompt"] for each in ended] == prompts
    assert all(each["text"].startswith(each["prompt"]) for each in ended)
    assert any(end in each["tokens"] for each in ended)
    for short, long in zip(ended, unended, strict=True):
        assert short["tokens"] == long["tokens"][: len(short["tokens"])]
        assert (short["tokens"] + [end]).index(end) == len(short["tokens"]) - (end in short["tokens"])
        assert len(long["tokens"]) == 100
        assert len(short["tokens"]) == 100 or short["tokens"][-1] == end


def test_a_text_begins_with_its_prompt_whatever_stands_there(folder, capsys, tmp_path):
    """Special tokens between documents, and characters that some programs treat as ends of lines."""
    (tmp_path / "prompts.txt").write_text("the<|endoftext|>a\na cat\fand\u2028the house\n")
    lines = said(capsys, folder, "--prompts", tmp_path / "prompts.txt", "--json", *DRAWN).splitlines()
    found = [json.loads(line) for line in lines]
    assert [each["prompt"] for each in found] == ["the<|endoftext|>a", "a cat\fand\u2028the house"]
    assert all(each["text"].startswith(each["prompt"]) for each in found)


@pytest.mark.parametrize(("num_tokens", "warned"), [(62, False), (64, True)])
def test_texts_beyond_the_trained_length_are_remarked_upon(folder, capsys, caplog, num_tokens, warned):
    said(capsys, folder, "--prompt", "a", "--max-new-tokens", num_tokens)
    assert (
        "the weights were trained on rows of 64; consider --alibi-scaling train_seq_len=64" in caplog.text
    ) == warned


def test_text_appears_with_its_tokens_in_whole_characters(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "the é house 😀 and €"
    ids, parts, written = tokenizer.encode(text).ids, [], StringIO()

    def steps() -> Iterator[int]:
        for token in ids[3:]:
            yield token
            parts.append(written.getvalue())

    with redirect_stdout(written):
        stream_text(steps(), ids[:3], tokenizer)
    assert written.getvalue() == text + "\n"
    assert len(ids) > len(text.split()) + 5, "characters of several tokens"
    assert all(text.startswith(part) for part in parts)
    assert len(set(parts)) > 5


@pytest.mark.dist
def test_a_reader_who_has_enough_ends_the_command_quietly(folder):
    """Test `tandem generate ... | head -c 1`."""
    command = [
        sys.executable,
        "-m",
        "tandem.trainer",
        "generate",
        folder,
        "--prompt",
        "the",
        "--ignore-eos",
        "--max-new-tokens",
        "2000",
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.read(1) == "t"
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == CLOSED_PIPE_EXIT_CODE
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("", ["--prompt: is missing", "--prompts FILE"]),
        ("--prompts {}/none.txt", ["--prompts: ", "none.txt cannot be read", "give a text file"]),
        ("--prompts {}/gap.txt", ["--prompt: a text (or a line of --prompts) has no tokens", "give some text"]),
        ("--prompt a --temperature -1", ["--temperature: -1.0 is out of range; use 0 or more"]),
        ("--prompt a --temperature nan", ["--temperature: nan is out of range; use 0 or more"]),
        ("--prompt a --temperature 1 --top-p 0", ["--top-p: 0.0 is out of range; use more than 0"]),
        ("--prompt a --temperature 1 --top-k -2", ["--top-k: -2 is negative"]),
        ("--prompt a --top-k 5", ["--temperature: 0 takes the most likely", "use a higher temperature"]),
        ("--prompt a --max-new-tokens 0", ["--max-new-tokens: 0 is less than 1"]),
        ("--prompt a --alibi-scaling factor=1", ["--alibi-scaling.factor: 1.0 is not a finite number above 1"]),
        ("--prompt a --tokenizer {}/gap.txt", ["--tokenizer: ", "gap.txt cannot be read", "give a tokenizer.json"]),
        (
            "--prompt a --tokenizer {}/endless.json",
            ["endless.json (sha256 ", "encodes otherwise", "leave the option out"],
        ),
        (
            "--prompt a --alibi-scaling 4.0",
            ["--alibi-scaling", "no such field", "the fields are type, factor, train_seq_len"],
        ),
    ],
)
def test_a_mistake_is_one_line(options, parts, folder, capsys, tmp_path):
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    endless = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|pause|>")
    (tmp_path / "endless.json").write_text(endless)
    assert main(["generate", str(folder), *options.format(tmp_path).split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert [part for part in parts if part not in captured.err] == [], captured.err
