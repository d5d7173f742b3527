"""That the ways to save that are measured beside one another save the same, and what of a save is counted where."""

import json
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as torchs

from tandem.trainer.checkpoint.layout import folder_name, rank_file
from tandem.trainer.checkpoint.write import model_facts
from tandem.trainer.distributed.mesh import started
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.bench import checkpoint_save
from tandem.trainer.tools.bench.checkpoint_save import NAMES, Memory, Way, one_save, state, ways
from tests import ranks, tiny_configs

CONFIG = str(Path(__file__).parents[4] / "configs" / "demo-btlm.yaml")
SMALL = [
    CONFIG, "parallel.tp_size=1", "model.width=64", "model.ffn_width=170", "--parameters", "400000", "--rows", "2",
    "--micro-rows", "2", "--saves", "2", "--every", "3", "--warmup-steps", "1",
]  # fmt: skip
STEP = 7


def saved_in_all_ways(folder: Path) -> dict[str, list[str]]:
    """By way: the tensors of this rank that are not on disk as they were in memory."""
    config = tiny_configs.config("btlm")
    with started(1) as mesh:
        engine = build_engine(config, mesh, None)
        engine.allocate_moments(0)
        generator = torch.Generator().manual_seed(mesh.rank)
        live = state(engine, mesh)
        for tensor in live.values():
            tensor.normal_(generator=generator)
        wanted = {name: tensor.clone() for name, tensor in live.items()}
        found = ways(engine, mesh, folder, {**model_facts(config.model, config.mup), "cursor": {}, "ledger_lines": 0})
        differing = {}
        for name, way in found.items():
            way.make_room()
            way.begin(STEP)
            way.settle()
            read = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
            if name.startswith("ours"):
                read = load_file(folder / "ours" / folder_name(STEP) / rank_file(mesh.rank))
            else:
                kept = folder / ("torch-async" if "async" in name else "torch") / folder_name(STEP)
                torchs.load(read, checkpoint_id=kept)
            torch.distributed.barrier()  # the next way may write where this one has
            wrong = [key for key in wanted if not torch.equal(wanted[key], read[key])]
            differing[name] = wrong if set(read) == set(wanted) else sorted(set(read) ^ set(wanted))
    return differing


@pytest.mark.dist
def test_all_ways_save_the_same_tensors_of_two_ranks(tmp_path):
    assert ranks.run(saved_in_all_ways, 2, tmp_path, tmp_path / "saved") == [{name: [] for name in NAMES}] * 2


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> dict[str, Any]:
    [said] = ranks.run(printed, 1, tmp_path_factory.mktemp("saves"), tmp_path_factory.mktemp("saved"))
    found: dict[str, Any] = json.loads(said)
    return found


def printed(folder: Path) -> str:
    """What the command says on standard output."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert checkpoint_save.main([*SMALL, "--folder", str(folder)]) == 0
    return out.getvalue()


def test_a_line_says_what_every_way_costs(line):
    assert list(line["ways"]) == list(NAMES)
    assert abs(line["parameters"] - 400_000) < 25_000, "half a layer"
    assert line["state_bytes"] >= 12 * line["parameters"]
    assert line["peak_of_state"] >= line["peak_of_state_without_saves"]
    for name, cost in line["ways"].items():
        assert 0 < cost["stall_seconds_p50"] <= cost["stall_seconds_p99"]
        assert cost["stall_of_step_p50"] == pytest.approx(cost["stall_seconds_p50"] / line["step_seconds"])
        waits = name in ("ours at once", "torch save")
        assert (cost["steps_beside"] == 0) == (cost["slowdown_beside"] is None)
        assert not (waits and cost["steps_beside"])


def test_every_step_is_beside_a_save_or_alone(line):
    beside = sum(cost["steps_beside"] for cost in line["ways"].values()) * line["saves"]
    assert line["steps_alone"] + beside == len(NAMES) * line["saves"] * line["every_steps"]


def costed(tmp_path: Path) -> tuple[checkpoint_save.Cost, checkpoint_save.Cost]:
    """Of a save that keeps 64 MiB, calls for 50 ms, is beside two steps that wait 0.25 s each and is waited for 30 ms, and of
    one that never ends by itself.
    """
    kept: list[numpy.ndarray] = []
    asked = iter([False, False, True])

    def begin(step: int) -> None:
        kept.append(numpy.ones(1 << 23))
        time.sleep(0.05)

    memory = Memory()
    way = Way(begin, lambda: next(asked), lambda: time.sleep(0.03), lambda: 0.25 if len(kept) else 0.0)
    ending = one_save(way, lambda: 1.0, 1, 5, memory, 0)
    endless = one_save(Way(lambda step: None, lambda: False, lambda: None), lambda: 1.0, 1, 3, memory, 0)
    memory.close()
    return ending, endless


def test_a_save_costs_its_call_its_waits_and_its_memory(tmp_path):
    [(ending, endless)] = ranks.run(costed, 1, tmp_path, tmp_path)
    assert (ending.beside_seconds, ending.alone_seconds) == ([0.75, 0.75], [0.75, 0.75, 0.75])
    assert 0.05 + 5 * 0.25 + 0.03 <= ending.stall_seconds < 5
    assert 1 << 26 <= ending.extra_bytes < 5 << 24, "64 MiB, and no more than a quarter for whatever else Python did"
    assert (endless.beside_seconds, endless.alone_seconds) == ([1.0] * 3, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--saves", "0"], ["--saves: 0", "at least 1"]),
        (["--rows", "12"], ["--rows: 12", "a multiple of 8"]),
        (["model.heads=3"], ["model.heads"]),
    ],
)
def test_a_mistake_is_one_line(words, said, capfd):
    assert checkpoint_save.main([CONFIG, "parallel.tp_size=1", *words]) == 2
    [one] = capfd.readouterr().err.splitlines()
    assert one.startswith("tandem.trainer.tools.bench.checkpoint_save: ")
    assert [part for part in said if part not in one] == []
