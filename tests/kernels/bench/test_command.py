"""python -m kernels.bench."""

import json

import pytest
import torch

from kernels.bench.__main__ import main
from kernels.bench.compare import Row


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_without_a_gpu_one_line_names_what_works(capsys):
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--resources" in told
    assert "--device cpu --tokens N" in told


def test_rows_are_printed_and_kept(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    command = [
        "swiglu",
        "--device",
        "cpu",
        "--tokens",
        "4",
        "--shape",
        "mup-check tp1",
        "--rival",
        "ours",
        "--json",
        str(file),
    ]
    assert main(command) == 0
    assert main(command) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["op"] for line in lines] == ["ceilings", "swiglu", "swiglu", "swiglu"] * 2
    assert all(list(line) == [*Row.__dataclass_fields__] for line in lines[1:4])
    assert capsys.readouterr().out.count("mup-check tp1") == 6


def test_an_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["swigloo"])
    assert "invalid choice: 'swigloo'" in capsys.readouterr().err
