"""The learning-rate transfer check: the best learning rate of every width, under muP and without its width rules.

Every trial is a whole run of the config's schedule at another width and peak. Trials take minutes to hours, so each is written
down when it is done, under a key of all that decides its loss: a sweep that was killed goes on where it stopped.
At the base width both parametrisations are the same config, and the same trial.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path

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
from tandem.trainer.tools.mup.progress_reporter import ProgressReporter
from tandem.trainer.tools.mup.proxies import build_loader, proxy_config, train_steps, with_peak_lr, without_width_rules

MUP, WITHOUT_WIDTH_RULES = "muP", "without width rules"
TAIL_FRACTION = 1 / 8
"""The loss of a trial is the mean of this last share of its steps."""
MAX_SPREAD_OCTAVES = 1.0
"""Grid steps of 2x that the optimum may move under muP."""
LIKELY_CAUSE = "the width rules as a whole; the other checks say which"


@dataclass(frozen=True)
class Trial:
    parametrisation: str
    lr: float
    config: TrainConfig

    @property
    def width(self) -> int:
        return self.config.model.hidden_size


Losses = dict[str, dict[int, dict[float, float]]]
"""Parametrisation -> width -> peak learning rate -> loss in nats, infinite where the run diverged."""


def build_trials(config: TrainConfig, widths: list[int], octaves: int) -> list[Trial]:
    """All runs of the sweep: peaks from the config's / 2^octaves to the config's * 2^octaves, narrow models first."""
    peaks = [config.schedule.lr.peak * 2.0**step for step in range(-octaves, octaves + 1)]
    found = []
    for width in widths:
        under_mup = proxy_config(config, width)
        for name, base in ((MUP, under_mup), (WITHOUT_WIDTH_RULES, without_width_rules(under_mup))):
            found += [Trial(name, lr, with_peak_lr(base, lr)) for lr in peaks]
    return found


def run_sweep(trials: list[Trial], results_file: Path, mesh: Mesh) -> Losses:
    """The loss of every trial, run now or read from the ledger."""
    code, losses_by_key = _code_digest(), _read_results(results_file)
    keys = [_trial_key(trial.config, code) for trial in trials]
    missing: dict[str, Trial] = {}
    for key, trial in zip(keys, trials, strict=True):
        if key not in losses_by_key:
            missing.setdefault(key, trial)
    with ProgressReporter("transfer", sum(map(_trial_flops, missing.values()))) as progress:
        for key, trial in missing.items():
            start_time, losses_of_steps = time.perf_counter(), train_proxy(trial.config, mesh)
            loss = tail_mean(losses_of_steps, Timeline(trial.config.schedule).total_steps)
            seconds = time.perf_counter() - start_time
            _append_result(results_file, key, trial, loss, seconds)
            losses_by_key[key] = loss
            what = f"width {trial.width}, lr {trial.lr:.3g}, {trial.parametrisation}"
            progress.advance(_trial_flops(trial), f"{what}: loss {loss:.4f}, {seconds:.0f} s")
    losses: Losses = {}
    for key, trial in zip(keys, trials, strict=True):
        losses.setdefault(trial.parametrisation, {}).setdefault(trial.width, {})[trial.lr] = losses_by_key[key]
    return losses


def train_proxy(config: TrainConfig, mesh: Mesh) -> list[float]:
    """The loss of every step of the config's run, up to the first that is not finite."""
    losses = []
    for loss in train_steps(config, build_engine(config, mesh, None), mesh):
        losses.append(loss)
        if not math.isfinite(loss):
            break
    return losses


def tail_mean(losses: list[float], total_steps: int) -> float:
    """Mean of the last steps; infinite for a run that did not reach its end."""
    if len(losses) < total_steps or not math.isfinite(losses[-1]):
        return inf
    tail = losses[-max(1, round(total_steps * TAIL_FRACTION)) :]
    return sum(tail) / len(tail)


def best_lr(losses_by_lr: dict[float, float]) -> float:
    """The learning rate of the grid with the least loss; not a number where every run diverged."""
    best = min(losses_by_lr, key=lambda lr: losses_by_lr[lr])
    return best if math.isfinite(losses_by_lr[best]) else nan


def best_lr_spread_octaves(losses_by_size: dict[int, dict[float, float]]) -> float:
    """Between which two widths the optimum differs most, in grid steps of 2x."""
    log2_best_lrs = [math.log2(best_lr(by_lr)) for by_lr in losses_by_size.values()]
    return max(log2_best_lrs) - min(log2_best_lrs) if all(map(math.isfinite, log2_best_lrs)) else nan


def best_lr_drop_octaves(losses_by_size: dict[int, dict[float, float]]) -> float:
    """How many grid steps of 2x lower the optimum of the widest is than that of the narrowest."""
    log2_best_lrs = [math.log2(best_lr(by_lr)) for by_lr in losses_by_size.values()]
    return log2_best_lrs[0] - log2_best_lrs[-1]


def judge(losses: Losses) -> list[Measurement]:
    """How far the optimum moves in grid steps of 2x: at most one under muP; without it must fall further from the narrowest
    to the widest, or the sweep has shown nothing.
    """
    widths = list(losses[MUP])
    case = f"widths {widths[0]} to {widths[-1]}"
    mup_spread, drop_without_rules = (
        best_lr_spread_octaves(losses[MUP]),
        best_lr_drop_octaves(losses[WITHOUT_WIDTH_RULES]),
    )
    is_inside_grid = [min(by_lr) < best_lr(by_lr) < max(by_lr) for by_lr in losses[MUP].values()]
    return [
        Measurement(
            "transfer",
            "share of muP optima inside the grid",
            case,
            sum(is_inside_grid) / len(is_inside_grid),
            1.0,
            1.0,
            "a grid that does not hold the optimum: move schedule.lr.peak or raise --octaves",
        ),
        Measurement(
            "transfer", f"moves of the optimum, {MUP}", case, mup_spread, 0.0, MAX_SPREAD_OCTAVES, LIKELY_CAUSE
        ),
        Measurement(
            "transfer",
            f"fall of the optimum, {WITHOUT_WIDTH_RULES}",
            case,
            drop_without_rules,
            mup_spread + 1,
            inf,
            "a sweep too short or narrow to tell",
        ),
    ]


def format_table(losses: Losses) -> str:
    """Loss by learning rate and width; the best of each column is marked."""
    lines = []
    for name, by_width in losses.items():
        lines.append("  ".join([f"{name:<22}", *(f"{f'width {width}':>11}" for width in by_width)]))
        for lr in next(iter(by_width.values())):
            cells = [f"{by_lr[lr]:9.4f} {'*' if lr == best_lr(by_lr) else ' '}" for by_lr in by_width.values()]
            lines.append("  ".join([f"lr {lr:<19.3g}", *cells]))
    return "\n".join(lines)


def _trial_flops(trial: Trial) -> float:
    tokens = Timeline(trial.config.schedule).total_tokens
    return float(tokens * flops_per_token(trial.config.model, trial.config.schedule.phases[0].seq_len, causal=False))


def _trial_key(config: TrainConfig, code: str) -> str:
    """What decides the loss: the whole config, the corpora themselves, the code that trains, and what it runs on."""
    corpora = json.dumps(build_loader(config).fingerprints, sort_keys=True)
    machine = f"{torch.__version__} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}"
    return hashlib.sha256("\n".join([dump_config(config), corpora, code, machine]).encode()).hexdigest()[:16]


def _code_digest() -> str:
    """Changes with every source file of the trainer and the kernels."""
    files = [
        file
        for package in (tandem.kernels, tandem.trainer)
        for file in Path(str(package.__file__)).parent.rglob("*.py")
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _read_results(results_file: Path) -> dict[str, float]:
    found = journal.read_records(results_file)
    return {record["key"]: inf if record["loss"] is None else record["loss"] for record in found}


def _append_result(results_file: Path, key: str, trial: Trial, loss: float, seconds: float) -> None:
    record = {
        "key": key, "parametrisation": trial.parametrisation, "width": trial.width, "lr": trial.lr,
        "seed": trial.config.run.seed, "loss": loss if math.isfinite(loss) else None, "seconds": round(seconds, 1),
    }  # fmt: skip
    with journal.open_journal(results_file) as file:
        journal.append_record(file, record)
