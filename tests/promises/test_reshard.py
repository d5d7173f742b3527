"""From every layout to every layout: what was saved is what is loaded, bit by bit, and training goes on as it would have."""

from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.read import Checkpoint, open_checkpoint
from tandem.trainer.config import TrainConfig
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.distributed.sharding import slice_local
from tandem.trainer.startup import build_engine
from tests import ranks, steps, tiny_configs
from tests.promises.test_parallel import EPSILON
from tests.sharded import save_checkpoint

BEFORE, AFTER = 3, 5
"""Steps before the save, and after it."""
MOVES_OF_A_WORLD = 24
"""Each mesh makes all groups anew, and leaves some of gloo's threads and connections behind: a hundred are too many."""
LR = 1e-2
OVERRIDES = {"btlm": {}, "stablelm": {"model": tiny_configs.STABLELM | {"num_kv_heads": 4}}}


class Layout(NamedTuple):
    tp_size: int
    dp_size: int
    zero_stage: int

    @property
    def world_size(self) -> int:
        return self.tp_size * self.dp_size


LAYOUTS = [
    Layout(tp_size, dp_size, zero_stage)
    for tp_size in (1, 2, 4) for dp_size in (1, 2, 4) if tp_size * dp_size <= 4 for zero_stage in (0, 1)
]  # fmt: skip
WORLDS = (1, 2, 4)
PAIRS = [(family, one, other) for family in OVERRIDES for one in LAYOUTS for other in LAYOUTS]
FEW = [pair for index, pair in enumerate(PAIRS) if pair[1] == pair[2] or index % 11 == 0]
"""Each layout as it is, and every eleventh move: 11 does not divide 12, so there are moves from all and to all."""


def config(family: str, layout: Layout) -> TrainConfig:
    optim = {"beta1": 0.9, "beta2": 0.95, "eps": EPSILON, "weight_decay": 0.1, "max_grad_norm": 1.0}
    parallel = {"tp_size": layout.tp_size, "zero_stage": layout.zero_stage}
    return tiny_configs.make_config(family, optim=optim, parallel=parallel, **OVERRIDES[family])


def folder_of(root: Path, family: str, layout: Layout) -> Path:
    return root / f"{family}-tp{layout.tp_size}-dp{layout.dp_size}-zero{layout.zero_stage}"


def stepped(config: TrainConfig, engine: Engine, mesh: Mesh, numbers: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    stepper = steps.steady(config, mesh, engine, lr=LR, micro_batch_size=tiny_configs.GLOBAL_BATCH_SIZE)
    return [steps.step(stepper, number) for number in numbers]


def save_all(root: Path, wanted: list[tuple[str, Layout]]) -> None:
    """A checkpoint of each, some steps after its start."""
    for family, layout in wanted:
        with mesh_context(layout.tp_size) as mesh:
            given = config(family, layout)
            engine = build_engine(given, mesh, None)
            stepped(given, engine, mesh, range(BEFORE))
            facts = {**model_metadata(given.model, given.mup), "num_updates": engine.num_updates}
            save_checkpoint(folder_of(root, family, layout), BEFORE, engine, mesh, metadata=facts)


def go_on(root: Path, wanted: list[tuple[str, Layout, Layout]]) -> list[tuple[list[str], list[tuple[float, float]]]]:
    """For each, what of this rank's state is not the saved bits, and the steps after it."""
    found = []
    for tp_size, moves in groupby(wanted, key=lambda move: move[2].tp_size):
        with mesh_context(tp_size) as mesh:
            for family, one, other in moves:
                snapshot = open_checkpoint(folder_of(root, family, one))
                given = config(family, other)
                engine = build_engine(given, mesh, snapshot)
                lost = changed(engine, snapshot, mesh)
                found.append((lost, stepped(given, engine, mesh, range(BEFORE, BEFORE + AFTER))))
    return found


def changed(engine: Engine, snapshot: Checkpoint, mesh: Mesh) -> list[str]:
    """Cut here from whole tensors, which `restore` never makes."""
    found = [] if engine.num_updates == BEFORE else [f"{engine.num_updates} updates"]
    locals_ = {}
    for name, parameter in engine.model.named_parameters():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            part = slice_local(sharding_of(parameter), snapshot.read_tensor(kind, name), mesh.tp_rank, mesh.tp_size)
            locals_[kind, name] = part.reshape(-1)
        if not torch.equal(parameter.detach().view(-1), locals_["master", name]):
            found.append(name)
    owned = 0
    for fragment in engine.optimizer_fragments():
        for kind, tensor in {"master": fragment.master, **fragment.moments}.items():
            saved = locals_[kind, fragment.name][fragment.start : fragment.start + tensor.numel()]
            if not torch.equal(tensor, saved):
                found.append(f"{kind} {fragment.name}")
            owned += 1
    return found if owned else ["no state"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Checkpoints of both families from every layout."""
    root = tmp_path_factory.mktemp("reshard")
    for world_size in WORLDS:
        wanted = [(family, each) for family in OVERRIDES for each in LAYOUTS if each.world_size == world_size]
        ranks.run(save_all, world_size, root, root, wanted)
    return root


def check(root: Path, pairs: list[tuple[str, Layout, Layout]], timeout_seconds: float) -> None:
    straight, moved = {}, {}
    for world_size in WORLDS:
        wanted = sorted((pair for pair in pairs if pair[2].world_size == world_size), key=lambda pair: pair[2].tp_size)
        answers: list[list[Any]] = [[] for _ in range(world_size)]
        for first in range(0, len(wanted), MOVES_OF_A_WORLD):
            some = wanted[first : first + MOVES_OF_A_WORLD]
            for rank, found in enumerate(
                ranks.run(go_on, world_size, root, root, some, timeout_seconds=timeout_seconds)
            ):
                answers[rank] += found
        for pair, *said in zip(wanted, *answers, strict=True):
            assert [differing for differing, _ in said] == [[]] * world_size, pair
            assert all(steps == said[0][1] for _, steps in said), "all ranks say the same"
            (straight if pair[1] == pair[2] else moved)[pair] = said[0][1]
    assert len(moved) > 10
    for (family, one, other), made in moved.items():
        expected = straight[family, one, one]
        for step, (found, there) in enumerate(zip(made, expected, strict=True)):
            assert found[0] == pytest.approx(there[0], rel=1e-6), (family, one, other, step)
            assert found[1] == pytest.approx(there[1], rel=1e-5), (family, one, other, step)


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_moves_between_layouts(root):
    check(root, FEW, 120)


@pytest.mark.dist
@pytest.mark.chaos
def test_a_run_moves_from_every_layout_to_every_layout(root):
    check(root, PAIRS, 180)
    print(f"{len(PAIRS)} moves: {len(LAYOUTS)} layouts to {len(LAYOUTS)}, {len(OVERRIDES)} families")
