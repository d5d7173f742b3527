"""Build a proxy, which is the user's config at another width, and train it with the functions that train a real run.

A proxy keeps the number of heads, so head_dim grows with the width. Otherwise attention's factor 1 / head_dim would not show.
ffn_hidden_size keeps its ratio to the width; depth, data and schedule stay the same. A proxy is one replica on its
tensor-parallel ranks, without recomputation.
"""

from collections.abc import Iterator
from dataclasses import replace

from tandem.trainer import config as configuration
from tandem.trainer.config import LRConfig, MupConfig, TrainConfig, UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.train import forward_backward


def require_mup(config: TrainConfig) -> MupConfig:
    """Return the config's muP section. Raises: UserError if it has none."""
    if config.mup is None:
        raise UserError("mup: null has no width rules to check; use a config with muP, for example mup-check")
    return config.mup


def proxy_config(config: TrainConfig, width: int, *, tp_size: int = 1, seed: int | None = None) -> TrainConfig:
    """Return the config at another width. Raises: UserError if the width does not fit the rest of the config."""
    ffn_hidden_size = max(1, config.model.ffn_hidden_size * width // config.model.hidden_size)
    proxy = replace(
        config,
        run=replace(config.run, seed=config.run.seed if seed is None else seed),
        model=replace(config.model, hidden_size=width, ffn_hidden_size=ffn_hidden_size),
        parallel=replace(config.parallel, tp_size=tp_size, recompute="none"),
        data=replace(config.data, prefetch_steps=0),
    )
    try:
        configuration.check_config(proxy)
        configuration.check_world_size(proxy, tp_size)
    except UserError as error:
        raise UserError(f"--widths {width}: {error}") from None
    return proxy


def with_lr(config: TrainConfig, lr: LRConfig) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, lr=lr))


def build_loader(config: TrainConfig) -> Loader:
    """Open the config's corpus for one replica."""
    return Loader(
        config.data, config.schedule, seed=config.run.seed, vocab_size=config.model.vocab_size, dp_rank=0, dp_size=1
    )


def train_steps(config: TrainConfig, engine: Engine, mesh: Mesh) -> Iterator[float]:
    """Make the run's updates one by one and yield each step's loss in nats."""
    timeline = Timeline(config.schedule)
    for step, batch in enumerate(build_loader(config).batches(0, None)):
        loss = forward_backward(engine, batch, timeline.phase_span_at(step).phase.micro_batch_size, mesh)
        engine.update(timeline.lr_at(step))
        yield float(loss)
