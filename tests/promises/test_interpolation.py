"""Position interpolation from the config to the export: its effect, its settings, and values that are refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.config import AlibiScalingConfig, UserError
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models.btlm import interpolate_slopes
from tests.decoding import build_decoder
from tests.promises.conftest import fork_tandem, read_step_records, two_phase_config, wait_for_exit
from tests.promises.test_hf import export
from tests.reference.offline import offline
from tests.reference.variants import VARIANTS, random_tokens

__all__ = ["offline"]

SLOPES = torch.tensor([0.5, 0.25, 0.125])


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


@pytest.mark.parametrize(
    ("scaling", "keys", "divisors"),
    [
        (None, 10_000, 1.0),
        (AlibiScalingConfig("linear", factor=4.0), 10, 4.0),
        (AlibiScalingConfig("linear", factor=4.0), 10_000, 4.0),
        (AlibiScalingConfig("linear", train_seq_len=8192), 8192, 1.0),
        (AlibiScalingConfig("linear", train_seq_len=8192), 10, 1.0),
        (AlibiScalingConfig("linear", train_seq_len=8192), 12_288, 1.5),
        (AlibiScalingConfig("linear", train_seq_len=8), [4, 8, 20], [[1.0], [1.0], [2.5]]),
    ],
)
def test_slopes_are_divided_by_the_factor_or_by_how_much_longer_than_trained_a_row_is(scaling, keys, divisors):
    assert torch.equal(interpolate_slopes(SLOPES, scaling, torch.tensor(keys)), SLOPES / torch.tensor(divisors))


def test_dynamic_interpolation_leaves_rows_of_the_trained_length_as_they_were(mesh):
    """Equal bit by bit. Longer rows equal fixed interpolation by their length divided by the trained length."""
    dynamic, model = build_decoder("btlm_dynamic", mesh), VARIANTS["btlm_dynamic"][0]
    plain, fixed = build_decoder("btlm_dynamic", mesh), build_decoder("btlm_dynamic", mesh)
    plain.config = replace(model, alibi_scaling=None)
    fixed.config = replace(model, alibi_scaling=AlibiScalingConfig("linear", factor=1.5))
    for length, same, other in ((24, plain, fixed), (36, fixed, plain)):
        batch = random_tokens(model, seq_len=length)
        documents = torch.zeros_like(batch).int()
        found = dynamic.logits(batch, documents)
        assert torch.equal(found, same.logits(batch, documents))
        assert not torch.equal(found, other.logits(batch, documents))


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> Path:
    """A run without interpolation, and `long`, which continues its training interpolated with longer rows."""
    root = tmp_path_factory.mktemp("interpolation")
    (root / "config.yaml").write_text(yaml.safe_dump(two_phase_config("btlm", corpus, root / "runs")))
    scaled = "model.alibi_scaling={type: linear, train_seq_len: 32}"
    longer = ["run.name=long", "run.stop_step=7", f"run.init_from={root}/runs/tiny", scaled]
    commands = (["train", root / "config.yaml", *overrides] for overrides in (["run.stop_step=2"], longer))
    assert wait_for_exit(fork_tandem(*commands)) == 0
    return root / "runs" / "tiny"


def loss(capsys, *arguments: object) -> float:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["loss"]


@pytest.mark.dist
def test_a_run_goes_on_interpolated_from_weights_that_were_not(run):
    """The models have the same weights. Step 7 is the first with rows longer than 32."""
    steps = read_step_records(run.parent / "long")
    assert steps[1]["loss"] < read_step_records(run)[1]["loss"]
    assert max(steps) == 7


@pytest.mark.dist
def test_evaluation_interpolates_when_asked_and_as_the_run_did_when_not(run, corpus, capsys):
    rows = ("--data", corpus, "--seq-len", 96, "--rows", 3)
    long = run.parent / "long"
    plain, dynamic, fixed = (
        loss(capsys, long, *rows, "--alibi-scaling", each) for each in ("none", "train_seq_len=32", "factor=3")
    )
    assert dynamic == loss(capsys, long, *rows) == fixed
    assert dynamic != plain
    short = ("--data", corpus, "--seq-len", 32, "--rows", 3)
    assert loss(capsys, long, *short) == loss(capsys, long, *short, "--alibi-scaling", "none")
    assert loss(capsys, run, *rows) == loss(capsys, run, *rows, "--alibi-scaling", "none")


@pytest.mark.dist
def test_an_export_carries_the_interpolation_and_comes_back_with_it(run, capsys, tmp_path):
    """`--check` compares with transformers on rows of 64, longer than 32."""
    for source, asked, wanted in (
        (run.parent / "long", [], {"type": "linear", "train_seq_len": 32}),
        (run, ["--alibi-scaling", "factor=4", "--max-seq-len", "256"], {"type": "linear", "factor": 4.0}),
        (run, [], None),
    ):
        out = tmp_path / f"{source.name}{len(asked)}"
        assert main(["export-hf", str(source), str(out), "--dtype", "fp32", "--check", *asked]) == 0
        config = json.loads((out / "config.json").read_text())
        assert config["alibi_scaling"] == wanted
        assert (config["n_positions"] == 256) == bool(asked)
        scaling = convert.open_folder(out)[0].alibi_scaling
        assert scaling == (AlibiScalingConfig(**wanted) if wanted else None)
    assert main(["import-hf", str(tmp_path / "long0"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "back"), "--prompt", "def ", "--max-new-tokens", "3"]) == 0


@pytest.mark.dist
def test_a_run_keeps_its_interpolation(run, capsys):
    config = str(run.parents[1] / "config.yaml")
    scaled = ["model.alibi_scaling.type=linear", "model.alibi_scaling.factor=2.0"]
    assert main(["train", config, *scaled]) == 2
    assert "model.alibi_scaling: {'type': 'linear', 'factor': 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (4.0, "config.json: alibi_scaling: 4.0 is not a section"),
        ({"type": "linear"}, "config.json: alibi_scaling: factor is None and train_seq_len is None; set exactly one"),
        (
            {"type": "dynamic", "factor": 2.0},
            "config.json: alibi_scaling.type: 'dynamic' is not valid; it must be one of linear",
        ),
        ({"type": "linear", "factor": 0.5}, "config.json: alibi_scaling.factor: 0.5 is not a finite number above 1"),
        (
            {"type": "linear", "factor": 2.0, "power": 2},
            "config.json: alibi_scaling.power: 2 is given, but there is no such field",
        ),
    ],
)
def test_a_folder_with_a_mistaken_interpolation_is_not_imported(scaling, message, tmp_path):
    export("btlm_mup", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"alibi_scaling": scaling}))
    with pytest.raises(UserError) as caught:
        convert.open_folder(tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        (
            "stablelm_12b",
            "factor=4.0",
            "--alibi-scaling: factor=4.0 cannot be used with a stablelm model, which has no ALiBi",
        ),
        ("btlm_mup", "factor=1", "--alibi-scaling.factor: 1.0 is not a finite number above 1"),
        (
            "btlm_mup",
            "train_seq_len=8.5",
            "--alibi-scaling.train_seq_len: 8.5 is of type float; write a value of type int",
        ),
        ("btlm_mup", "train_seq_len", "--alibi-scaling.train_seq_len: '' is of type str; write a value of type int"),
        (
            "btlm_mup",
            "dynamic",
            "--alibi-scaling.dynamic: '' is given, but there is no such field; the fields are type, factor, train_seq_len",
        ),
    ],
)
def test_a_mistaken_option_is_one_line(variant, given, message, tmp_path, capsys):
    export(variant, tmp_path / "out")
    rows = ["--data", str(tmp_path), "--seq-len", "8"]
    assert main(["evaluate", str(tmp_path / "out"), *rows, "--alibi-scaling", given]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
