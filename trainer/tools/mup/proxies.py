"""The config of one proxy and its training: the user's config at another width, through the pieces that train the real run.

Heads stay and head_dim grows, because attention's 1 / head_dim shows in nothing else; ffn_hidden_size keeps its ratio to the
width; depth, data and schedule stay. A proxy is one replica on its tensor-parallel ranks, without recomputation.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from tandem.trainer.config import (
    LinearLRConfig,
    LRConfig,
    MupConfig,
    TrainConfig,
    UserError,
    check_config,
    check_world_size,
)
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.train import forward_backward


def require_mup(config: TrainConfig) -> MupConfig:
    """The config's muP section. Raises: UserError for a config without one."""
    if config.mup is None:
        raise UserError(
            "mup: null; there are no width rules to check; name a config with muP, as configs/mup-check.yaml"
        )
    return config.mup


def proxy_config(config: TrainConfig, width: int, *, tp_size: int = 1, seed: int | None = None) -> TrainConfig:
    """The config at another width, checked. Raises: UserError for a width that does not fit the rest of the config."""
    model = replace(
        config.model,
        hidden_size=width,
        ffn_hidden_size=max(1, config.model.ffn_hidden_size * width // config.model.hidden_size),
    )
    found = replace(
        config,
        run=replace(config.run, seed=config.run.seed if seed is None else seed),
        model=model,
        parallel=replace(config.parallel, tp_size=tp_size, recompute="none"),
        data=replace(config.data, prefetch_steps=0),
    )
    try:
        check_config(found)
        check_world_size(found, tp_size)
    except UserError as error:
        raise UserError(f"--widths {width}: {error}") from None
    return found


def without_width_rules(config: TrainConfig) -> TrainConfig:
    """The same config with its own width as base width: the multiplier is 1, so nothing scales with width.

    At the base width it is the config itself. Multipliers and attention's 1 / head_dim stay.
    """
    return replace(config, mup=replace(require_mup(config), base_hidden_size=config.model.hidden_size))


def with_precision(config: TrainConfig, precision: Literal["fp32", "bf16"]) -> TrainConfig:
    """The config in fp32 or bf16."""
    return replace(config, run=replace(config.run, precision=precision))


def with_peak_lr(config: TrainConfig, lr: float) -> TrainConfig:
    """The config whose schedule peaks at `lr`, its final learning rate in proportion."""
    line = config.schedule.lr
    return with_lr(config, replace(line, peak=lr, final=line.final * lr / line.peak))


def with_constant_lr(config: TrainConfig, lr: float) -> TrainConfig:
    """The config with every update at `lr`: the first moves the weights as far as any other."""
    return with_lr(config, LinearLRConfig("linear", lr, lr, 0, None))


def with_lr(config: TrainConfig, lr: LRConfig) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, lr=lr))


def build_loader(config: TrainConfig) -> Loader:
    """The corpus of the config, read by one replica."""
    return Loader(
        config.data, config.schedule, seed=config.run.seed, vocab_size=config.model.vocab_size, dp_rank=0, dp_size=1
    )


def train_steps(config: TrainConfig, engine: Engine, mesh: Mesh) -> Iterator[float]:
    """Makes the run's updates one by one; yields each step's loss in nats."""
    timeline: Timeline = Timeline(config.schedule)
    for step, batch in enumerate(build_loader(config).batches(0, None)):
        loss = forward_backward(engine, batch, timeline.phase_span_at(step).phase.micro_batch_size, mesh)
        engine.update(timeline.lr_at(step))
        yield float(loss)
