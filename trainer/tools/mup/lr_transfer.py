"""The transfer check: find the best learning rate of every width, under muP and without its width rules.

A trial is a whole run of the config's schedule at another width and peak learning rate. Trials take minutes to hours, so each
result is stored as soon as it exists, under a key that covers everything that determines the loss. A sweep that was killed
continues with the missing trials. At the base width both parametrisations are the same config and share a trial.
"""

import hashlib
import json
import time
from dataclasses import dataclass, replace
from math import inf, isfinite, log2, nan
from pathlib import Path
from statistics import fmean

import torch

import tandem.kernels
import tandem.trainer
from tandem.trainer import journal
from tandem.trainer.config import TrainConfig, dump_config
from tandem.trainer.config.flops import flops_per_token
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.mup.measurement import Measurement
from tandem.trainer.tools.mup.progress_report import report_progress
from tandem.trainer.tools.mup.proxies import proxy_config, require_mup, with_lr
from tandem.trainer.tools.mup.training import build_loader, train_steps

MUP, WITHOUT_WIDTH_RULES = "muP", "without width rules"
TAIL_FRACTION = 1 / 8
"""Fraction of a trial's steps, at its end, over which the loss is averaged."""
MAX_SPREAD_OCTAVES = 1.0
"""Largest allowed move of the optimum under muP, in grid steps of 2x."""


@dataclass(frozen=True)
class Trial:
    parametrisation: str
    lr: float
    config: TrainConfig

    @property
    def width(self) -> int:
        return self.config.model.hidden_size

    @property
    def flops(self) -> float:
        schedule, model = self.config.schedule, self.config.model
        return float(Timeline(schedule).total_tokens * flops_per_token(model, schedule.phases[0].seq_len, causal=False))


Losses = dict[str, dict[int, dict[float, float]]]
"""Parametrisation -> width -> peak learning rate -> loss in nats, infinite if the run diverged."""


def build_trials(config: TrainConfig, widths: list[int], octaves: int) -> list[Trial]:
    """List all trials, narrow models first. Peaks range from the config's peak / 2^octaves to the config's peak * 2^octaves."""
    schedule, trials = config.schedule.lr, []
    peaks = [schedule.peak * 2.0**step for step in range(-octaves, octaves + 1)]
    lrs = [replace(schedule, peak=peak, final=schedule.final * peak / schedule.peak) for peak in peaks]
    for width in widths:
        under_mup = proxy_config(config, width)
        # If the base width is the proxy's own width, the width multiplier is 1. The other multipliers and attention's
        # 1 / head_dim stay.
        without_rules = replace(under_mup, mup=replace(require_mup(config), base_hidden_size=width))
        for name, base in ((MUP, under_mup), (WITHOUT_WIDTH_RULES, without_rules)):
            trials += [Trial(name, lr.peak, with_lr(base, lr)) for lr in lrs]
    return trials


def run_sweep(trials: list[Trial], results_file: Path, mesh: Mesh) -> Losses:
    """Run every trial whose result is not in the file yet, append the new results to it, and return all losses."""
    code = _code_digest()
    stored = {record["key"]: record["loss"] for record in journal.read_records(results_file)}
    losses_by_key = {key: inf if loss is None else loss for key, loss in stored.items()}
    keys = [_trial_key(trial.config, code) for trial in trials]
    missing: dict[str, Trial] = {}
    for key, trial in zip(keys, trials, strict=True):
        if key not in losses_by_key:
            missing.setdefault(key, trial)
    with report_progress("transfer", sum(trial.flops for trial in missing.values())) as advance:
        for key, trial in missing.items():
            start_time = time.perf_counter()
            loss = tail_mean(train_proxy(trial.config, mesh), Timeline(trial.config.schedule).total_steps)
            seconds = time.perf_counter() - start_time
            record = {
                "key": key, "parametrisation": trial.parametrisation, "width": trial.width, "lr": trial.lr,
                "seed": trial.config.run.seed, "loss": loss if isfinite(loss) else None, "seconds": round(seconds, 1),
            }  # fmt: skip
            with journal.open_journal(results_file) as file:
                journal.append_record(file, record)
            losses_by_key[key] = loss
            description = f"width {trial.width}, lr {trial.lr:.3g}, {trial.parametrisation}"
            advance(trial.flops, f"{description}: loss {loss:.4f}, {seconds:.0f} s")
    losses: Losses = {}
    for key, trial in zip(keys, trials, strict=True):
        losses.setdefault(trial.parametrisation, {}).setdefault(trial.width, {})[trial.lr] = losses_by_key[key]
    return losses


def train_proxy(config: TrainConfig, mesh: Mesh) -> list[float]:
    """Train the proxy and return the loss of every step, up to the first that is not finite."""
    losses = []
    for loss in train_steps(config, build_engine(config, mesh, None), mesh):
        losses.append(loss)
        if not isfinite(loss):
            break
    return losses


def tail_mean(losses: list[float], total_steps: int) -> float:
    """Return the mean of the last steps, or infinity if the run diverged."""
    if len(losses) < total_steps or not isfinite(losses[-1]):
        return inf
    tail = losses[-max(1, round(total_steps * TAIL_FRACTION)) :]
    return sum(tail) / len(tail)


def best_lr(losses_by_lr: dict[float, float]) -> float:
    """Return the learning rate with the lowest loss, or NaN if every run diverged."""
    best = min(losses_by_lr, key=lambda lr: losses_by_lr[lr])
    return best if isfinite(losses_by_lr[best]) else nan


def log2_best_lrs(losses_by_width: dict[int, dict[float, float]]) -> list[float]:
    return [log2(best_lr(by_lr)) for by_lr in losses_by_width.values()]


def best_lr_spread_octaves(losses_by_width: dict[int, dict[float, float]]) -> float:
    """Return the distance between the lowest and the highest optimum in grid steps of 2x, or NaN if a width has none."""
    optima = log2_best_lrs(losses_by_width)
    return max(optima) - min(optima) if all(map(isfinite, optima)) else nan


def judge(losses: Losses) -> list[Measurement]:
    """Compare the moves of the optimum, in grid steps of 2x, with their limits.

    Under muP it may move one step. Without width rules it must fall further than that from the narrowest to the widest model;
    otherwise the sweep has shown nothing.
    """
    widths, spread = list(losses[MUP]), best_lr_spread_octaves(losses[MUP])
    optima = log2_best_lrs(losses[WITHOUT_WIDTH_RULES])
    inside = fmean(min(by_lr) < best_lr(by_lr) < max(by_lr) for by_lr in losses[MUP].values())
    wrong_grid = "a grid that does not contain the optimum; move schedule.lr.peak or raise --octaves"
    width_rules = "the width rules as a whole; the other checks show which"
    too_short = "a sweep that is too short or narrow to show a difference"
    case = f"widths {widths[0]} to {widths[-1]}"
    return [
        Measurement("transfer", "share of muP optima inside the grid", case, inside, 1.0, 1.0, wrong_grid),
        Measurement("transfer", f"moves of the optimum, {MUP}", case, spread, 0.0, MAX_SPREAD_OCTAVES, width_rules),
        Measurement("transfer", f"fall of the optimum, {WITHOUT_WIDTH_RULES}", case, optima[0] - optima[-1], spread + 1, inf,
                    too_short),
    ]  # fmt: skip


def format_table(losses: Losses) -> str:
    """Loss by learning rate and width; `*` marks the best of each column."""
    lines = []
    for name, by_width in losses.items():
        lines.append("  ".join([f"{name:<22}", *(f"{f'width {width}':>11}" for width in by_width)]))
        for lr in next(iter(by_width.values())):
            cells = [f"{by_lr[lr]:9.4f} {'*' if lr == best_lr(by_lr) else ' '}" for by_lr in by_width.values()]
            lines.append("  ".join([f"lr {lr:<19.3g}", *cells]))
    return "\n".join(lines)


def _trial_key(config: TrainConfig, code: str) -> str:
    """Hash everything that determines the loss: the whole config, the corpora, the code that trains, and the machine."""
    corpora = json.dumps(build_loader(config).fingerprints, sort_keys=True)
    machine = f"{torch.__version__} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}"
    return hashlib.sha256("\n".join([dump_config(config), corpora, code, machine]).encode()).hexdigest()[:16]


def _code_digest() -> str:
    """Hash every source file of the trainer and the kernels."""
    folders = [Path(str(package.__file__)).parent for package in (tandem.kernels, tandem.trainer)]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
