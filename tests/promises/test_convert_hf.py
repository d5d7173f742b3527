"""Import and export at any tensor-parallel size keep every bit, and training continues from an import."""

import dataclasses
import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.hf import convert, description
from tandem.trainer.checkpoint.hf.export import ExportedText, export_folder
from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, WEIGHTS_FILE
from tandem.trainer.checkpoint.hf.pretrained import load_pretrained
from tandem.trainer.checkpoint.hf.tensor_conversion import default_tensors, to_hf_tensor
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.read import Checkpoint, open_checkpoint
from tandem.trainer.config import (
    AlibiScalingConfig,
    BTLMConfig,
    MupConfig,
    StableLMConfig,
    TrainConfig,
    UserError,
    parse_dataclass,
)
from tandem.trainer.data.loader import Batch, Loader
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.startup import build_engine, open_initial_weights
from tests import ranks, steps, tiny_configs
from tests.promises.conftest import read_step_records, two_phase_config
from tests.promises.test_resume import run_all
from tests.reference.offline import offline
from tests.reference.variants import EXPORTED_VARIANTS, reference_module
from tests.sharded import joined, save_checkpoint

__all__ = ["offline"]

Case = tuple[StableLMConfig | BTLMConfig, MupConfig | None]
TP_SIZES = (1, 2, 4)
HEADS = {"stablelm_12b": {"hidden_size": 128, "num_heads": 8, "num_kv_heads": 4}, "stablelm_tied": {"num_kv_heads": 6}}
"""Changes to variants whose heads cannot be divided over the ranks."""
CASES: dict[str, Case] = {
    name: (dataclasses.replace(model, ffn_hidden_size=151, vocab_size=301, **HEADS.get(name, {})), mup)
    for name, (model, mup) in EXPORTED_VARIANTS.items()
}
"""With these sizes, each of four ranks has a full, a partial or a padding-only part."""
LAYOUTS = [
    (name, tp_size) for name, (model, _) in CASES.items() for tp_size in TP_SIZES
    if model.num_kv_heads % tp_size == 0 and model.num_heads % tp_size == 0
]  # fmt: skip
IN_BF16 = [("stablelm_1_6b", 1), ("stablelm_12b", 2), ("btlm_mup", 4)]
every_layout = pytest.mark.parametrize(("name", "tp_size"), LAYOUTS)


def config(name: str, tp_size: int, folder: Path, precision: str = "fp32") -> TrainConfig:
    model, mup = CASES[name]
    run = {"init_from": str(folder / name / "import"), "precision": precision}
    found = tiny_configs.make_config("btlm", run=run, parallel={"tp_size": tp_size})
    return dataclasses.replace(found, model=model, mup=mup)


def through_all(folder: Path, runs: list[TrainConfig]) -> dict[tuple[str, int], dict[str, dict[str, Tensor]]]:
    """Run `through` for every layout, in one world of four ranks that changes its groups, then the runs."""
    found = {}
    for tp_size in TP_SIZES:
        with mesh_context(tp_size) as mesh:
            for name in [name for name, size in LAYOUTS if size == tp_size]:
                found[name, tp_size] = through(name, folder, mesh)
    assert run_all(runs) == [0] * len(runs)
    return found


def through(name: str, folder: Path, mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    """Gather the weights as loaded and after one saved update; load them in bf16 too and save the masters."""
    given, found = config(name, mesh.tp_size, folder), {}
    engine = build_engine(given, mesh, None, open_initial_weights(given, mesh))
    found["loaded"] = gathered(engine)
    stepper = steps.steady(given, mesh, engine, lr=1e-2, micro_batch_size=tiny_configs.GLOBAL_BATCH_SIZE)
    steps.step(stepper, 0, tiny_configs.global_batch(0, vocab_size=given.model.vocab_size))
    found["trained"] = gathered(engine)
    save_checkpoint(
        folder / name / f"tp{mesh.tp_size}", 1, engine, mesh, metadata=model_metadata(given.model, given.mup)
    )
    if (name, mesh.tp_size) in IN_BF16:
        in_bf16 = config(name, mesh.tp_size, folder, "bf16")
        rounded = build_engine(in_bf16, mesh, None, open_initial_weights(in_bf16, mesh))
        found["rounded"] = gathered(rounded)
        metadata = model_metadata(in_bf16.model, in_bf16.mup)
        save_checkpoint(folder / name / f"bf16-tp{mesh.tp_size}", 1, rounded, mesh, metadata=metadata)
    return found


def gathered(engine: Engine) -> dict[str, Tensor]:
    parameters = dict(engine.model.named_parameters())
    parts = ranks.all_gather_objects({name: parameter.detach() for name, parameter in parameters.items()})
    first_replica = parts[: engine.model.mesh.tp_size]
    return {name: joined(p.sharding, [part[name] for part in first_replica]) for name, p in parameters.items()}


def tensors(name: str) -> dict[str, Tensor]:
    model, _ = CASES[name]
    found: dict[str, Tensor] = reference_module(model).random_tensors(model, seed=3)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a Hugging Face folder with a tokenizer to `source` for each case, and its import to `import`."""
    from tests.promises.test_hf import write_tokenizer  # not at the top: each rank would wait for transformers

    root = tmp_path_factory.mktemp("exchange")
    write_tokenizer(root / "tokenizer.json", vocab=97)
    for name, (model, mup) in CASES.items():
        export_folder(
            tensors(name).__getitem__, model, mup, root / name / "source", tokenizer=root / "tokenizer.json",
            max_seq_len=77, dtype=torch.float32, shard_bytes=60_000, text=ExportedText(is_corpus_tokenizer=False),
        )  # fmt: skip
        assert main(["import-hf", str(root / name / "source"), str(root / name / "import")]) == 0
    return root


@pytest.fixture(scope="module")
def world(folder, runs) -> dict[tuple[str, int], dict[str, dict[str, Tensor]]]:
    found: dict = ranks.run(through_all, 4, folder, folder, list(runs.values()))[0]
    return found


def differing(found: dict[str, Tensor] | Callable[[str], Tensor], expected: dict[str, Tensor]) -> list[str]:
    read = found.__getitem__ if isinstance(found, dict) else found
    return [name for name, tensor in expected.items() if not torch.equal(read(name), tensor)]


@pytest.mark.dist
@every_layout
def test_an_import_is_the_same_bits_at_every_tp_size(world, name, tp_size):
    assert differing(world[name, tp_size]["loaded"], tensors(name)) == []


@pytest.mark.dist
@every_layout
def test_an_export_is_the_gathered_weights_at_every_tp_size(world, folder, name, tp_size, tmp_path):
    trained, (model, _) = world[name, tp_size]["trained"], CASES[name]
    assert len(differing(trained, tensors(name))) > len(trained) / 2
    run = folder / name / f"tp{tp_size}"
    assert main(["export-hf", str(run), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    found = load_file(tmp_path / "out" / WEIGHTS_FILE)
    expected = {
        hf_tensor.hf_name: to_hf_tensor(mapping, hf_tensor, trained[mapping.name])
        for mapping in description.FAMILY_MODULES[model.family].tensor_mappings(model) for hf_tensor in mapping.hf_tensors
    }  # fmt: skip
    assert differing(found, expected) == []
    assert found.keys() == expected.keys() | default_tensors(model).keys()


@pytest.mark.dist
@pytest.mark.parametrize(("name", "tp_size"), IN_BF16)
def test_a_bf16_run_starts_from_the_unrounded_weights(world, folder, name, tp_size):
    """The masters equal the import; the weights are rounded masters."""
    given = tensors(name)
    assert differing(Checkpoint(folder / name / f"bf16-tp{tp_size}" / "step-00000001").read_weight, given) == []
    rounded = world[name, tp_size]["rounded"]
    assert differing(rounded, {key: tensor.bfloat16() for key, tensor in given.items()}) == []
    assert differing({key: tensor.float() for key, tensor in rounded.items()}, given) != []


@pytest.mark.parametrize("variant", ["btlm", "stablelm"])
def test_a_fresh_bf16_run_starts_from_the_unrounded_initial_values(variant):
    with mesh_context(1) as mesh:
        bf16, fp32 = (
            build_engine(tiny_configs.make_config(variant, run={"precision": p}), mesh, None) for p in ("bf16", "fp32")
        )
        exact, rounded = (dict(engine.model.named_parameters()) for engine in (fp32, bf16))
        for fragment in bf16.optimizer_fragments():
            assert torch.equal(fragment.master, exact[fragment.name].detach().flatten()), fragment.name
        assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


@pytest.mark.parametrize("name", CASES)
def test_an_export_of_an_import_is_the_folder_it_came_from(folder, name, tmp_path):
    """Compare every file bit by bit, except shards, which have the default size."""
    assert main(["export-hf", str(folder / name / "import"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    ours, theirs = (
        {path.name: path for path in place.iterdir()} for place in (tmp_path / "out", folder / name / "source")
    )
    shards = [path for path in theirs.values() if path.suffix == ".safetensors"]
    assert len(shards) > 1
    weights = {key: tensor for path in shards for key, tensor in load_file(path).items()}
    found = load_file(ours[WEIGHTS_FILE])
    assert found.keys() == weights.keys()
    assert differing(found, weights) == []
    others = theirs.keys() - {path.name for path in shards} - {INDEX_FILE}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"} <= others
    assert ours.keys() == others | {WEIGHTS_FILE}
    assert [file for file in others if ours[file].read_bytes() != theirs[file].read_bytes()] == []


def test_a_16_bit_folder_is_imported_without_loss(folder, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        source = shutil.copytree(folder / "btlm_mup" / "source", tmp_path / f"{dtype}")
        for path in source.glob("*.safetensors"):
            path.unlink()
        (source / INDEX_FILE).unlink()
        given = {
            hf_tensor.hf_name: to_hf_tensor(mapping, hf_tensor, tensors("btlm_mup")[mapping.name]).to(dtype)
            for mapping in description.FAMILY_MODULES["btlm"].tensor_mappings(CASES["btlm_mup"][0])
            for hf_tensor in mapping.hf_tensors
        }  # fmt: skip
        save_file({key: tensor.contiguous() for key, tensor in given.items()}, source / WEIGHTS_FILE)
        assert main(["import-hf", str(source), str(tmp_path / f"{dtype}-in")]) == 0
        read = open_checkpoint(tmp_path / f"{dtype}-in").read_weight
        assert differing(read, {key: tensor.to(dtype).float() for key, tensor in tensors("btlm_mup").items()}) == []


# --- what may change when training goes on from given weights


def asked(folder: Path, name: str, **changes: object) -> Checkpoint | None:
    given = config(name, 1, folder)
    mup = changes.pop("mup", given.mup)
    with mesh_context(1) as mesh:
        return open_initial_weights(
            dataclasses.replace(given, model=dataclasses.replace(given.model, **changes), mup=mup), mesh
        )


@pytest.mark.parametrize("name", ["stablelm_12b", "btlm_mup"])
def test_what_is_no_property_of_the_weights_may_differ_from_the_imports(folder, name):
    masking = not CASES[name][0].document_masking
    assert asked(folder, name, init_std=0.5, init_truncation_sigmas=0.0, document_masking=masking) is not None


def test_what_the_weights_compute_otherwise_than_in_the_import_is_told_once(folder, caplog):
    asked(folder, "btlm_mup", init_std=0.5)
    assert caplog.messages == []
    masking, scaling = CASES["btlm_mup"][0].document_masking, AlibiScalingConfig("linear", factor=2.0)
    asked(folder, "btlm_mup", document_masking=not masking, alibi_scaling=scaling)
    (said,) = caplog.messages
    assert f"model.document_masking {masking} instead of {not masking}" in said
    assert f"model.alibi_scaling None instead of {dataclasses.asdict(scaling)}" in said


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stablelm_12b", {"norm_eps": 1e-6}),
        ("stablelm_12b", {"rotary_base": 1000.0}),
        ("stablelm_12b", {"partial_rotary_factor": 0.5}),
        ("stablelm_12b", {"parallel_residual": False}),
        ("stablelm_12b", {"tie_word_embeddings": True}),
        ("btlm_mup", {"mup": None}),
        ("btlm_mup", {"mup": MupConfig(16, 14.6, 2.220001)}),
        ("btlm_mup", {"mup": MupConfig(32, 14.6, 2.22)}),
    ],
)
def test_what_changes_what_the_weights_compute_is_refused(folder, name, changes):
    field = next(iter(changes))
    with pytest.raises(
        UserError, match=rf"^{'mup' if field == 'mup' else f'model.{field}'}.*run.init_from.*use the value"
    ):
        asked(folder, name, **changes)


# --- training goes on at the imported model's loss


def made_elsewhere(family: str, folder: Path) -> None:
    """A folder without our own fields: Stable LM written by transformers, BTLM as published."""
    if family == "stablelm":
        from transformers import StableLmConfig, StableLmForCausalLM

        settings = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_layernorm": True, "use_qkv_bias": True}
        torch.manual_seed(5)
        made = StableLmForCausalLM(StableLmConfig(**settings, **heads, initializer_range=0.1, layer_norm_eps=1e-4))
        made.save_pretrained(folder)
        return
    model = dataclasses.replace(CASES["btlm_mup"][0], vocab_size=500)
    read = reference_module(model).random_tensors(model, seed=5).__getitem__
    export_folder(read, model, CASES["btlm_mup"][1], folder, tokenizer=None, max_seq_len=64, dtype=torch.float32)
    fields = json.loads((folder / "config.json").read_text())
    del fields[description.EXTRA_FIELDS_KEY]
    (folder / "config.json").write_text(json.dumps(fields))


def starting(family: str, tp_size: int, corpus: Path, root: Path) -> TrainConfig:
    """Make one step from the import. Stable LM masks documents, which its folder does not record."""
    weights = str(root / f"{family}-in")
    run = {"name": f"{family}-tp{tp_size}", "precision": "fp32", "stop_step": 1, "init_from": weights}
    tree = two_phase_config(family, corpus, root, run=run, parallel={"tp_size": tp_size})
    phase = {
        "name": "one",
        "tokens": 4096,
        "seq_len": 256,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "mixture": {"corpus": 1.0},
    }
    tree["schedule"] |= {"tokens_per_step": 1024, "phases": [phase]}
    model, mup, _ = convert.open_folder(root / family)
    model = dataclasses.replace(model, document_masking=family == "stablelm", init_std=0.3)
    found = dataclasses.replace(parse_dataclass(TrainConfig, tree, ""), model=model, mup=mup)
    seeds = (dataclasses.replace(found, run=dataclasses.replace(found.run, seed=seed)) for seed in range(1000))
    return next(config for config in seeds if first_batch(config).document_ids.any())


def first_batch(given: TrainConfig) -> Batch:
    loader = Loader(
        given.data, given.schedule, seed=given.run.seed, vocab_size=given.model.vocab_size, dp_rank=0, dp_size=1
    )
    return next(loader.batches(0, None))


def loss_by_transformers(folder: Path, given: TrainConfig) -> float:
    """Average over the first global batch, which has ends of documents. Read each document alone if the run masks them."""
    batch, theirs, losses = first_batch(given), load_pretrained(folder), []
    for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.document_ids, strict=True):
        apart = documents if given.model.document_masking else torch.zeros_like(documents)
        for document in apart.unique():
            inside = apart == document
            with torch.no_grad():
                logits = theirs(tokens[None, inside]).logits[0]
            losses.append(cross_entropy(logits, targets[inside], reduction="none"))
    return float(torch.cat(losses).double().mean())


RUNS = [("stablelm", 1), ("stablelm", 2), ("btlm", 1), ("btlm", 2), ("btlm", 4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus) -> dict[tuple[str, int], TrainConfig]:
    root = tmp_path_factory.mktemp("starting")
    for family in ("stablelm", "btlm"):
        made_elsewhere(family, root / family)
        assert main(["import-hf", str(root / family), str(root / f"{family}-in")]) == 0
    return {(family, tp_size): starting(family, tp_size, corpus, root) for family, tp_size in RUNS}


@pytest.mark.dist
@pytest.mark.parametrize(("family", "tp_size"), RUNS)
def test_a_run_starts_at_the_loss_of_the_model_it_imported(world, runs, family, tp_size):
    given = runs[family, tp_size]
    root = Path(given.run.root)
    loss = read_step_records(root / given.run.name)[1]["loss"]
    assert loss == pytest.approx(loss_by_transformers(root / family, given), rel=1e-6)


@pytest.mark.dist
def test_a_run_is_exported_by_its_folder_by_a_step_and_by_a_checkpoints_folder_alike(world, runs, tmp_path):
    given = runs["stablelm", 1]
    run = Path(given.run.root) / given.run.name
    kept = run / "checkpoints" / "step-00000001"
    for name, arguments in {"newest": [run], "step": [run, "--step", 1], "checkpoint": [kept]}.items():
        assert main(["export-hf", *map(str, arguments), "--dtype", "fp32", str(tmp_path / name)]) == 0
    names = sorted(path.name for path in (tmp_path / "newest").iterdir())
    for other in ("step", "checkpoint"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == names
        assert filecmp.cmpfiles(tmp_path / "newest", tmp_path / other, names, shallow=False) == (names, [], [])
    corpus = Path(next(iter(given.data.sources.values())))
    assert filecmp.cmp(tmp_path / "newest" / "tokenizer.json", corpus / "tokenizer.json", shallow=False)
    assert description.read_text_settings(tmp_path / "newest") == ("<|endoftext|>", 256)


@pytest.mark.dist
def test_a_run_needs_no_corpus_to_be_exported_and_one_without_tokenizer_tells_what_it_lacks(
    world, runs, tmp_path, caplog
):
    given, moved = runs["stablelm", 1], tmp_path / "moved"
    shutil.copytree(Path(given.run.root) / given.run.name, moved)
    somewhere_else = (moved / "config.yaml").read_text().replace(next(iter(given.data.sources.values())), "gone")
    (moved / "config.yaml").write_text(somewhere_else)
    assert main(["export-hf", str(moved), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert caplog.messages == []
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    (moved / "tokenizer.json").unlink()
    assert main(["export-hf", str(moved), str(tmp_path / "bare"), "--dtype", "fp32"]) == 0
    (said,) = caplog.messages
    assert said.startswith(f"exported without a tokenizer: {moved / 'tokenizer.json'} is missing")
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


@pytest.mark.dist
def test_a_step_that_was_not_kept_is_refused(world, runs, tmp_path, capsys):
    run = Path(runs["stablelm", 1].run.root) / "stablelm-tp1"
    assert main(["export-hf", str(run), str(tmp_path / "out"), "--step", "7"]) == 2
    assert f"--step: {run} has no checkpoint of step 7; name a step that has one: 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
