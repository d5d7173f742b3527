"""All compared ways to save write the same tensors, and each part of a save's cost is counted in its place."""

import json
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as torchs

from tandem.trainer.checkpoint.layout import model_metadata, step_folder_name
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.startup import build_engine
from tests import ranks, tiny_configs
from tests.rivals.trainer import checkpoint_save
from tests.rivals.trainer.checkpoint_save import (
    METHOD_NAMES,
    HostMemorySampler,
    SaveMethod,
    build_save_methods,
    measure_save,
    state_tensors,
)

CONFIG = str(Path(__file__).parents[3] / "configs" / "demo-btlm.yaml")
SMALL = [
    CONFIG,
    "parallel.tp_size=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=170",
    "--parameters",
    "400000",
    "--global-batch-size",
    "2",
    "--micro-batch-size",
    "2",
    "--saves",
    "2",
    "--every",
    "3",
    "--warmup-steps",
    "1",
]
STEP = 7


def saved_in_all_ways(folder: Path) -> dict[str, list[str]]:
    """Return for each way the names of this rank's tensors that differ on disk from those in memory."""
    config = tiny_configs.make_config("btlm")
    with mesh_context(1) as mesh:
        engine = build_engine(config, mesh, None)
        engine.allocate_moments(0)
        generator = torch.Generator().manual_seed(mesh.rank)
        live = state_tensors(engine, mesh)
        for tensor in live.values():
            tensor.normal_(generator=generator)
        wanted = {name: tensor.clone() for name, tensor in live.items()}
        found = build_save_methods(
            engine, mesh, folder, {**model_metadata(config.model, config.mup), "cursor": {}, "num_ledger_lines": 0}
        )
        differing = {}
        for name, way in found.items():
            way.remove_previous()
            way.start_save(STEP)
            way.wait_for_save()
            read = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
            if name.startswith("ours"):
                read = load_file(folder / "ours" / step_folder_name(STEP) / f"rank-{mesh.rank:05d}.safetensors")
            else:
                kept = folder / ("torch-async" if "async" in name else "torch") / step_folder_name(STEP)
                torchs.load(read, checkpoint_id=kept)
            torch.distributed.barrier()  # the next way may overwrite these files
            wrong = [key for key in wanted if not torch.equal(wanted[key], read[key])]
            differing[name] = wrong if set(read) == set(wanted) else sorted(set(read) ^ set(wanted))
    return differing


@pytest.mark.dist
def test_all_ways_save_the_same_tensors_of_two_ranks(tmp_path):
    assert ranks.run(saved_in_all_ways, 2, tmp_path, tmp_path / "saved") == [{name: [] for name in METHOD_NAMES}] * 2


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[dict[str, Any], tuple[checkpoint_save.SaveCost, checkpoint_save.SaveCost]]:
    """The command's line, and the costs of the two saves of `measure_known_saves`."""
    [(output, costs)] = ranks.run(on_one_rank, 1, tmp_path_factory.mktemp("saves"), tmp_path_factory.mktemp("saved"))
    return json.loads(output), costs


@pytest.fixture(scope="module")
def line(one_rank) -> dict[str, Any]:
    return one_rank[0]


def on_one_rank(folder: Path) -> tuple[str, tuple[checkpoint_save.SaveCost, checkpoint_save.SaveCost]]:
    costs = measure_known_saves()
    with redirect_stdout(StringIO()) as output:
        assert checkpoint_save.main([*SMALL, "--folder", str(folder)]) == 0
    return output.getvalue(), costs


def test_a_line_has_the_cost_of_every_way(line):
    assert list(line["methods"]) == list(METHOD_NAMES)
    assert abs(line["num_parameters"] - 400_000) < 25_000, "half a layer"
    assert line["state_bytes"] >= 12 * line["num_parameters"]
    assert line["peak_state_ratio"] >= line["peak_state_ratio_without_saves"]
    for name, cost in line["methods"].items():
        assert 0 < cost["stall_seconds_p50"] <= cost["stall_seconds_p99"]
        assert cost["stall_of_step_p50"] == pytest.approx(cost["stall_seconds_p50"] / line["step_seconds"])
        waits = name in ("ours blocking", "torch save")
        assert (cost["overlapping_steps"] == 0) == (cost["overlapping_slowdown"] is None)
        assert not (waits and cost["overlapping_steps"])


def test_every_step_is_beside_a_save_or_alone(line):
    beside = sum(cost["overlapping_steps"] for cost in line["methods"].values()) * line["num_saves"]
    assert line["undisturbed_steps"] + beside == len(METHOD_NAMES) * line["num_saves"] * line["every_steps"]


def measure_known_saves() -> tuple[checkpoint_save.SaveCost, checkpoint_save.SaveCost]:
    """Measure a save that keeps 64 MiB and one that never ends.

    The call of the first takes 50 ms, every step waits 0.25 s for it, it ends after two steps, and the next save waits 30 ms.
    """
    kept: list[numpy.ndarray] = []
    asked = iter([False, False, True])

    def begin(step: int) -> None:
        kept.append(numpy.ones(1 << 23))
        time.sleep(0.05)

    memory = HostMemorySampler()
    way = SaveMethod(begin, lambda: next(asked), lambda: time.sleep(0.03), lambda: 0.25 if len(kept) else 0.0)
    ending = measure_save(way, lambda: 1.0, 1, 5, memory, 0)
    endless = measure_save(SaveMethod(lambda step: None, lambda: False, lambda: None), lambda: 1.0, 1, 3, memory, 0)
    memory.close()
    return ending, endless


def test_a_save_costs_its_call_its_waits_and_its_memory(one_rank):
    _, (ending, endless) = one_rank
    assert (ending.overlapping_step_seconds, ending.undisturbed_step_seconds) == ([0.75, 0.75], [0.75, 0.75, 0.75])
    assert 0.05 + 5 * 0.25 + 0.03 <= ending.stall_seconds < 5
    assert 1 << 26 <= ending.extra_bytes < 5 << 24, "64 MiB, and no more than a quarter for whatever else Python did"
    assert (endless.overlapping_step_seconds, endless.undisturbed_step_seconds) == ([1.0] * 3, [])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--saves", "0"], ["--saves: 0 is less than 1", "use 1 or more"]),
        (["--global-batch-size", "12"], ["--global-batch-size: 12", "a multiple of 8"]),
        (["model.num_heads=3"], ["model.num_heads"]),
    ],
)
def test_a_mistake_is_one_line(words, expected, capfd):
    assert checkpoint_save.main([CONFIG, "parallel.tp_size=1", *words]) == 2
    [one] = capfd.readouterr().err.splitlines()
    assert one.startswith("tests.rivals.trainer.checkpoint_save: ")
    assert [part for part in expected if part not in one] == []
