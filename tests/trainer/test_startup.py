"""A start creates each weight once in every layout, copies it to the model and the fp32 master weights, and copies the
corpora's tokenizer into the run folder."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.read import Checkpoint, open_checkpoint
from tandem.trainer.checkpoint.weight_source import describe_weights
from tandem.trainer.checkpoint.write import commit
from tandem.trainer.config import DataConfig, ShardCacheConfig, TrainConfig, UserError, dump_config
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.distributed.sharding import slice_local
from tandem.trainer.models import init
from tandem.trainer.models.init import initial_values
from tandem.trainer.models.mup import parameter_rules
from tandem.trainer.runtime.signals import StopSignal
from tandem.trainer.startup import build_engine, copy_tokenizer, open_folder, warn_of_unused_ids
from tests import ranks, tiny_configs
from tests.data_prep.corpus_writer import rewrite_manifest, write_corpus
from tests.sharded import save_checkpoint

LAYOUTS = [(1, 1), (1, 2), (2, 4)]
"""(tensor-parallel size, number of ranks)"""
KINDS = {"zero0": ("fp32", 0), "zero1": ("fp32", 1), "bf16": ("bf16", 1)}
"""DeepSpeed uses a different optimizer for each."""
IMPORTED_SEED = 77


def config(kind: str, tp_size: int, seed: int = 1) -> TrainConfig:
    precision, zero_stage = KINDS[kind]
    parallel = {"tp_size": tp_size, "zero_stage": zero_stage}
    return tiny_configs.make_config("btlm", run={"precision": precision, "seed": seed}, parallel=parallel)


@contextmanager
def counted(owner: Any, function: str) -> Iterator[Counter[str]]:
    """Count the calls of the function within the block, by the name of the tensor that it returns."""
    original = getattr(owner, function)
    calls: Counter[str] = Counter()

    def counting(*given: Any, **named: Any) -> Tensor:
        calls[next(argument for argument in given if isinstance(argument, str))] += 1
        return original(*given, **named)

    setattr(owner, function, counting)
    try:
        yield calls
    finally:
        setattr(owner, function, original)


def wrong(engine: Engine, given: TrainConfig, seed: int, mesh: Mesh) -> list[str]:
    """Return the weights and masters that are not bitwise this rank's part of the initial values of `seed`."""
    parameters, found = dict(engine.model.named_parameters()), []
    table, sigmas = parameter_rules(given.model, given.mup), given.model.init_truncation_sigmas
    value = initial_values(engine.model, table, seed=seed, truncation_sigmas=sigmas)
    parts = {name: slice_local(p.sharding, value(name), mesh.tp_rank, mesh.tp_size) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        if not torch.equal(parameter.detach(), parts[name].reshape(parameter.shape).to(parameter.dtype)):
            found.append(name)
    for one in engine.optimizer_fragments():
        if not torch.equal(one.master, parts[one.name].reshape(-1)[one.start : one.start + len(one.master)]):
            found.append(f"master of {one.name}")
    return found


def starts(tp_size: int, folder: Path) -> dict[str, Any]:
    """For each optimizer and source of weights, return the wrong tensors and how often each was created."""
    found: dict[str, Any] = {}
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, so that a weight that is never set is noticed
    with mesh_context(tp_size) as mesh:
        other = config("zero1", tp_size, IMPORTED_SEED)
        facts = model_metadata(other.model, other.mup)
        save_checkpoint(folder, 0, build_engine(other, mesh, None), mesh, metadata=facts)
        for kind in KINDS:
            given = config(kind, tp_size)
            with counted(init, "initial_value") as drawn:
                engine = build_engine(given, mesh, None)
            found[f"{kind} drawn"] = wrong(engine, given, 1, mesh), drawn, mesh.tp_rank
            with counted(init, "initial_value") as drawn, counted(Checkpoint, "read_weight") as read:
                engine = build_engine(given, mesh, None, open_checkpoint(folder, mesh))
            assert not drawn
            found[f"{kind} imported"] = wrong(engine, given, IMPORTED_SEED, mesh), read, mesh.tp_rank
        found["names"] = [name for name, _ in engine.model.named_parameters()]
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("tp_size", "num_ranks"), LAYOUTS)
def test_a_start_makes_each_weight_once(tmp_path: Path, tp_size: int, num_ranks: int) -> None:
    """One replica creates each weight. Masters are unrounded and weights are rounded, on every rank."""
    world = ranks.run(starts, num_ranks, tmp_path, tp_size, tmp_path / "imported")
    names = world[0].pop("names")
    for case in world[0]:
        assert [rank[case][0] for rank in world] == [[]] * num_ranks, case
        for tp_rank in range(tp_size):
            replicas = [calls for _, calls, of in (rank[case] for rank in world) if of == tp_rank]
            assert len(replicas) == num_ranks // tp_size
            assert sum(replicas, Counter()) == Counter(names), case


def test_a_run_of_a_version_with_other_names_is_refused_before_anything_is_written(tmp_path):
    given = tiny_configs.make_config("btlm")
    before = dump_config(given).replace("hidden_size:", "width:")
    (tmp_path / "config.yaml").write_text(before)
    message = r"config.yaml: does not load in this version \(model\.width: .*\); .*another run\.name$"
    mesh = Mesh(0, 1, 0, 0, 1, 0, 1, torch.device("cpu"))
    with closing(StopSignal()) as stop_signal, pytest.raises(UserError, match=message):
        open_folder(tmp_path, given, {}, None, Coordinator(mesh, stop_signal))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("config.yaml", before)]


@pytest.mark.parametrize("content", [b'{"a":\r\n1}\n', b"\xff\x00"], ids=["line ends", "no text"])
def test_the_run_folder_has_the_very_bytes_of_the_tokenizer(tmp_path, content):
    folder = tmp_path / "corpus"
    made = write_corpus(folder, ["a text"])
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"corpus/tokenizer.json: has sha256 .*, but manifest.json states .*restore it"):
        copy_tokenizer(tmp_path, DataConfig({"corpus": str(folder)}), made)
    assert not (tmp_path / "tokenizer.json").exists()
    made = rewrite_manifest(folder, made, tokenizer_sha256=hashlib.sha256(content).hexdigest())
    copy_tokenizer(tmp_path, DataConfig({"corpus": str(folder)}), made)
    assert (tmp_path / "tokenizer.json").read_bytes() == content


def test_ids_that_no_corpus_has_are_told(tmp_path, caplog):
    corpora = {"a": write_corpus(tmp_path / "a", ["a text"])}
    tiny = tiny_configs.make_config("btlm")
    for vocab_size in (300, 558):
        warn_of_unused_ids(
            dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=vocab_size)), corpora
        )
        assert not caplog.messages
    used = corpora["a"].vocab
    warn_of_unused_ids(dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=3000)), corpora)
    unused = (3000 - used) * tiny.model.hidden_size * (1 if tiny.model.tie_word_embeddings else 2)
    assert f"model.vocab_size: 3,000, but the corpora have {used} ids: {unused:,} parameters" in caplog.messages[0]


@pytest.mark.parametrize("corpus", ["nothing-there", "http://127.0.0.1:9/corpus"])
def test_a_corpus_without_tokenizer_costs_a_run_one_line(tmp_path, caplog, monkeypatch, corpus):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = write_corpus(tmp_path / "made", ["a text"])
    data = DataConfig({"corpus": corpus}, cache=ShardCacheConfig(max_attempts=1, timeout_seconds=0.5))
    copy_tokenizer(tmp_path, data, made)
    [said] = caplog.records
    assert f"{corpus}/tokenizer.json: cannot be read (" in said.getMessage()
    assert "\n" not in said.getMessage()
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_config_of_another_model_than_the_checkpoint_is_refused_before_anything_is_written(tmp_path):
    given = tiny_configs.make_config("btlm")
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    facts = model_metadata(given.model, given.mup)
    commit(folder, [], {"step": 2, "tp_size": 1, "dp_size": 1, **facts})
    layers = f"num_layers: {given.model.num_layers}"
    (tmp_path / "config.yaml").write_text(dump_config(given).replace(layers, "num_layers: 7"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = rf"^{tmp_path}/config.yaml: model.num_layers: 7 differs from {given.model.num_layers} in {folder}/manifest.json; "
    mesh = Mesh(0, 1, 0, 0, 1, 0, 1, torch.device("cpu"))
    with closing(StopSignal()) as stop_signal, pytest.raises(UserError, match=message):
        open_folder(tmp_path, given, {}, Checkpoint(folder), Coordinator(mesh, stop_signal))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_weights_of_a_run_folder_are_those_of_the_checkpoint_alone(tmp_path):
    """`evaluate`, `generate` and `export-hf` open them here, and read no config.yaml."""
    given = tiny_configs.make_config("btlm")
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    commit(folder, [], {"step": 2, "tp_size": 1, "dp_size": 1, **model_metadata(given.model, given.mup)})
    layers = f"num_layers: {given.model.num_layers}"
    (tmp_path / "config.yaml").write_text(dump_config(given).replace(layers, "num_layers: 7"))
    found = describe_weights(tmp_path)
    assert (found.model, found.mup) == (given.model, given.mup)
