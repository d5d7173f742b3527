"""The command `python -m tests.rivals.kernels`."""

import pytest
import torch
import triton

import tests.rivals.kernels.__main__ as command_line
from tandem.kernels.bench.shapes import MODELS
from tests.kernels.bench.square import CEILINGS
from tests.rivals.kernels.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_one_line_names_what_works(capsys):
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--resources" in told
    assert "--device cpu --tokens N" in told


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("swigloo", ["op 'swigloo'", "residual_norm"]),
        ("swiglu --shape nosuch --resources", ["--shape 'nosuch'", "btlm-3b-8k tp1"]),
        ("swiglu --rival nosuch", ["--rival 'nosuch'", "liger fused buffer"]),
        ("--rival nosuch --resources", ["--rival nosuch", "--shape and --json"]),
        ("--tokens 8 --resources", ["--tokens 8", "--shape and --json"]),
        ("residual_norm --resources", ["op 'residual_norm'", "swiglu, swiglu_linear"]),
        ("swiglu residual_norm --resources", ["op 'residual_norm'"]),
        ("--production --resources", ["--production", "--shape and --json"]),
        ("--seconds 9 --resources", ["--seconds 9", "--shape and --json"]),
        ("--errors --rival ours", ["--rival ours", "--errors takes only ops, --shape"]),
        ("residual_norm --errors", ["op 'residual_norm'", "swiglu, swiglu_linear"]),
        ("--errors --activations", ["--errors", "--activations", "ask for one"]),
        ("--activations --resources", ["--resources", "--activations", "ask for one"]),
        ("swiglu --activations", ["op swiglu", "--activations takes only --json"]),
        ("--activations --shape tp2", ["--shape tp2", "--activations takes only --json"]),
        ("--activations", ["--activations", "TRITON_INTERPRET"]),
        ("--resources", ["--resources", "TRITON_INTERPRET"]),
    ],
)
def test_bad_usage_is_one_line(command, named, capsys, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", "TRITON_INTERPRET" in named)
    assert main(command.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert all(words in told.err for words in named)


def test_slow_compilation_at_published_shapes_is_left_out_unless_asked_for_by_name(monkeypatch):
    found = []
    monkeypatch.setattr(command_line.command, "measure_ceilings", lambda device: CEILINGS)

    def record(op, shape, device, limits, wanted, deadline):
        found.append((shape.model_name, [rival.name for rival in op.rivals if wanted(rival.name)]))
        return ()

    monkeypatch.setattr(command_line, "measure_rivals", record)

    def compiled(command: str) -> set[str]:
        found.clear()
        assert main(["--device", "cpu", *command.split()]) == 0
        return {model for model, rivals in found if {"torch.compile", "flex"} & set(rivals)}

    models = {model.name for model in MODELS}
    assert compiled("") == models
    assert compiled("--rival flex") == models | {"flash"}
    assert compiled("swiglu --shape liger") == {"liger"}


@pytest.mark.parametrize(("known", "code"), [(True, 0), (False, 1)])
def test_a_spill_that_nobody_knew_is_an_error(known, code, capsys, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(command_line, "kernel_resources", lambda operations, wanted: [])
    monkeypatch.setattr(command_line, "describe_spills", lambda found: [("one known", True), ("another", known)])
    assert main(["--resources"]) == code
    assert capsys.readouterr().err == "one known\nanother\n"
