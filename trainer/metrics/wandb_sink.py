"""Send the run's curves to wandb.

A run folder has one wandb run, whose id it stores, so a resumed run continues its curves. All curves are drawn over our own
step instead of wandb's counter. So steps can be repeated after a crash or a rollback: wandb keeps both rows, and a chart that
aggregates them draws the last and shades the range. If wandb's service dies, training logs one warning and continues.
"""

import dataclasses
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.config.addresses import hide_secrets_in_tree
from tandem.trainer.config.outside import read_text
from tandem.trainer.disk import atomic_write

CURVE_NAMES = {
    "step": {
        "tokens": "train/tokens", "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm",
        "skipped": "train/skipped", "seq_len": "schedule/seq_len", "global_batch_size": "schedule/global_batch_size",
        "step_seconds": "speed/step_seconds", "data_seconds": "speed/data_seconds",
        "tokens_per_second": "speed/tokens_per_second", "mfu": "speed/mfu", "mfu_causal": "speed/mfu_causal",
        "memory_gib": "speed/memory_gib",
    },
    "validation": {"loss": "validation/loss", "perplexity": "validation/perplexity"},
    "checkpoint": {name: f"checkpoint/{name}" for name in ("seconds", "stall_seconds", "bytes")},
    "rollback": {"from_step": "train/rollback_from_step"},
}  # fmt: skip
"""Kind of record -> field -> name of its curve in wandb."""

log = logging.getLogger(__name__)


class WandbSink:
    def __init__(self, folder: Path, config: TrainConfig) -> None:
        """Raises: UserError if the key is malformed, or if log.wandb is online and the server does not answer."""
        # wandb 0.31 sends telemetry in offline mode too, unless this is set before it is imported.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self._has_ended = False
        self._run: Any = None
        mode: str = config.log.wandb
        try:
            wandb.setup(settings=wandb.Settings(silent=True))
            if mode == "auto":
                # False without a key, and if WANDB_MODE is offline, as on a node without internet access.
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            self._run = _init_run(mode, folder, config)
        except Exception as error:
            reason = _format_error(error)
            if config.log.wandb != "auto" or mode != "online":
                online_remedy = "check the key and the network, or set log.wandb=offline"
                remedy = online_remedy if mode == "online" else "set log.wandb=disabled"
                raise UserError(f"log.wandb: {mode} mode failed ({reason}); {remedy}") from None
            log.warning("wandb: %s; writing offline into the run folder instead", reason)
            wandb.teardown()  # its service reserves the id of the failed run
            mode, self._run = "offline", _init_run("offline", folder, config)
        self._run.define_metric("step")
        for names in CURVE_NAMES.values():
            for name in names.values():
                self._run.define_metric(name, step_metric="step")
        if mode == "online":
            log.info("wandb: %s", self._run.url)

    def write(self, record: dict[str, Any]) -> None:
        self._has_ended |= record["kind"] == "end"
        names = CURVE_NAMES.get(record["kind"], {})
        # wandb draws numbers, and a bool is not a number to it.
        values = {name: record[field] for field, name in names.items() if record[field] is not None}
        curves = {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}
        if curves and self._run:
            try:
                self._run.log({"step": record["step"], **curves})
            except Exception as error:
                self._disable(error)

    def close(self) -> None:
        """Flush all curves to wandb's file or server. Without an `end` record wandb shows the run as crashed."""
        import wandb

        if self._run:
            try:
                self._run.finish(exit_code=0 if self._has_ended else 1)
            except Exception as error:
                self._disable(error)
        # A finished run is not on disk yet, and a process that exits to be requeued does not wait for wandb's service.
        try:
            wandb.teardown()
        except (Exception, SystemExit) as error:  # teardown exits with the code of the service
            if self._run:
                self._disable(error)

    def _disable(self, error: BaseException) -> None:
        """Stop writing to wandb after any error: a dead service raises many kinds of exceptions, some of them internal."""
        message = "wandb: failed (%s); training continues without it, and metrics.jsonl has every step"
        log.warning(message, _format_error(error))
        self._run = None


def _format_error(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _init_run(mode: Any, folder: Path, config: TrainConfig) -> Any:
    import wandb

    id_file = folder / "wandb" / "run_id"
    if not id_file.exists():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(id_file, secrets.token_hex(4) + "\n")
    return wandb.init(
        mode=mode, dir=folder, id=read_text(id_file).strip(), resume="allow" if mode == "online" else None,
        project=config.log.wandb_project, name=config.run.name, allow_val_change=True,
        config=hide_secrets_in_tree(dataclasses.asdict(config)),
        settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
    )  # fmt: skip
