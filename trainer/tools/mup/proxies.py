"""Build the config of a proxy, which is the user's config at another width. Nothing here needs torch.

A proxy keeps the number of heads, so head_dim grows with the width. Otherwise attention's factor 1 / head_dim would not show.
ffn_hidden_size keeps its ratio to the width; depth, data and schedule stay the same. A proxy is one replica on its
tensor-parallel ranks, without recomputation.
"""

from dataclasses import replace

from tandem.trainer import config as configuration
from tandem.trainer.config import LRConfig, MupConfig, TrainConfig, UserError


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
