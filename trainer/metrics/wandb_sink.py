"""The run's curves in wandb; the only door to it.

One wandb run per run folder: its id is kept there, so a resumed run continues the curve, and every curve is
drawn over our own step, so steps that are written again, after a crash or a rollback, are no trouble: wandb's
own counter goes on, both rows are kept, and where a chart gathers them it draws the last and shades the range.
Training outlives wandb: when its service dies, a warning says so once and the run goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from tandem.trainer.config import TrainConfig, UserError

CURVE_NAMES = {
    "step": {
        "tokens": "train/tokens",
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "train/grad_norm",
        "skipped": "train/skipped",
        "seq_len": "schedule/seq_len",
        "global_batch_size": "schedule/global_batch_size",
        "step_seconds": "speed/step_seconds",
        "data_seconds": "speed/data_seconds",
        "tokens_per_second": "speed/tokens_per_second",
        "mfu": "speed/mfu",
        "mfu_causal": "speed/mfu_causal",
        "memory_gib": "speed/memory_gib",
    },
    "validation": {"loss": "validation/loss", "perplexity": "validation/perplexity"},
    "checkpoint": {
        "seconds": "checkpoint/seconds",
        "stall_seconds": "checkpoint/stall_seconds",
        "bytes": "checkpoint/bytes",
    },
    "rollback": {"from_step": "train/rollback_from_step"},
}
"""Name in wandb of each field that is a curve, by kind of record."""

log = logging.getLogger(__name__)


class WandbSink:
    def __init__(self, folder: Path, config: TrainConfig) -> None:
        """Raises: UserError for a malformed key, or where log.wandb is online and the server is not there."""
        # wandb 0.31 sends telemetry in offline mode too, unless this is set before it is imported.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self._has_ended = False
        self._run: Any = None
        mode: str = config.log.wandb
        try:
            wandb.setup(settings=wandb.Settings(silent=True))
            if mode == "auto":
                # False without a key, and where WANDB_MODE says offline, as on a node without a way out.
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            self._run = _init_run(mode, folder, config)
        except Exception as error:
            reason = _format_error(error)
            if config.log.wandb != "auto" or mode != "online":
                online = "check key and network or set log.wandb=offline"
                remedy = online if mode == "online" else "set log.wandb=disabled"
                raise UserError(f"log.wandb: {mode}: {reason}; {remedy}") from None
            log.warning("wandb: %s; offline into the run folder instead", reason)
            wandb.teardown()  # its service holds on to the id of the run that failed
            mode, self._run = "offline", _init_run("offline", folder, config)
        self._run.define_metric("step")
        for name in (name for names in CURVE_NAMES.values() for name in names.values()):
            self._run.define_metric(name, step_metric="step")
        if mode == "online":
            log.info("wandb: %s", self._run.url)

    def write(self, record: dict[str, Any]) -> None:
        self._has_ended |= record["kind"] == "end"
        names = CURVE_NAMES.get(record["kind"], {})
        # wandb draws numbers; a bool is none to it.
        values = {
            name: int(value) if isinstance(value := record[field], bool) else value for field, name in names.items()
        }
        curves = {name: value for name, value in values.items() if value is not None}
        if curves and self._run:
            try:
                self._run.log({"step": record["step"], **curves})
            except Exception as error:
                self._disable(error)

    def close(self) -> None:
        """What was written is in wandb's file or on its server. Without an `end` record wandb shows the run as crashed."""
        import wandb

        if self._run:
            try:
                self._run.finish(exit_code=0 if self._has_ended else 1)
            except Exception as error:
                self._disable(error)
        # What is finished is not yet on disk, and a process that leaves for a requeue waits for nobody.
        try:
            wandb.teardown()
        except (Exception, SystemExit) as error:  # it ends the process with the code of its service
            if self._run:
                self._disable(error)

    def _disable(self, error: BaseException) -> None:
        """Whatever went wrong: what wandb raises when its service is gone is of many kinds, some of them internal."""
        log.warning("wandb: lost (%s); the run goes on, metrics.jsonl has every step", _format_error(error))
        self._run = None


def _format_error(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _init_run(mode: Any, folder: Path, config: TrainConfig) -> Any:
    import wandb

    return wandb.init(
        mode=mode,
        dir=folder,
        id=_load_run_id(folder / "wandb" / "run_id"),
        resume="allow" if mode == "online" else None,
        project=config.log.wandb_project,
        name=config.run.name,
        config=dataclasses.asdict(config),
        allow_val_change=True,
        settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
    )


def _load_run_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
