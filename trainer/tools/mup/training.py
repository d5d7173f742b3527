"""Train a proxy with the functions that train a real run."""

from collections.abc import Iterator

from tandem.trainer.config import TrainConfig
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.train import forward_backward


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
