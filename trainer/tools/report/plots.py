"""Draw the pictures of a report. `PICTURES` lists them with the functions that draw them; `draw_all` writes them all.

All pictures have the same x axis, so that they can be compared: tokens seen, with a band for each phase and marks for restarts
and rollbacks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from tandem.trainer.config import TrainConfig
from tandem.trainer.config.numbers import format_count
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.disk import atomic_file
from tandem.trainer.metrics.history import RunHistory

BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb5", "#d9822b", "#3a8f5c", "#c0392b", "#6b7280"
PHASE_BAND_COLORS = ("#f3f5f8", "#e6eaf0")
PLOT_STYLE: dict[Any, Any] = {
    "font.size": 10, "legend.frameon": False, "savefig.dpi": 150,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1ab", "axes.labelcolor": "#333a44",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#d5dae1", "grid.linewidth": 0.6,
    "xtick.color": "#59616c", "ytick.color": "#59616c", "lines.linewidth": 1.5, "lines.solid_capstyle": "round",
}  # fmt: skip

FloatArray = NDArray[np.float64]


def column(records: list[dict[str, Any]], name: str) -> FloatArray:
    """Return one field of the records, with NaN for null."""
    return np.array([record[name] for record in records], dtype=np.float64)


def finite_values(values: FloatArray) -> FloatArray:
    return values[np.isfinite(values)]


def finite_median(values: FloatArray) -> float:
    finite = finite_values(values)
    return float(np.median(finite)) if len(finite) else float("nan")


def running_median(steps: list[dict[str, Any]], values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return tokens and the running median over a fiftieth of the run, without values that are not finite.

    The line breaks between phases. Each phase has at most 500 points. A mean would make one stalled step look like a slow hour.
    """
    tokens, token_positions, medians, first = column(steps, "tokens"), [], [], 0
    half = max(1, len(steps) // 100)
    for _, group in groupby(steps, key=lambda record: record["phase"]):
        size = len(list(group))
        for index in np.unique(np.linspace(0, size - 1, min(size, 500)).round().astype(int)):
            half_window = max(min(half, index, size - 1 - index), min(half, 5))  # shorter towards the ends
            low, high = max(0, index - half_window), min(size, index + half_window + 1)
            token_positions.append(tokens[first + index])
            medians.append(finite_median(values[first + low : first + high]))
        token_positions.append(np.nan)
        medians.append(np.nan)
        first += size
    return np.array(token_positions), np.array(medians)


def draw_all(history: RunHistory, config: TrainConfig, folder: Path) -> list[tuple[str, str, Path]]:
    """Write a PNG for every picture for which the history has numbers. Return their titles, captions and files."""
    if not history.steps:
        return []
    has_memory = np.isfinite(column(history.steps, "memory_gib")).any()
    with matplotlib.rc_context(PLOT_STYLE):
        return [
            (title, picture.caption, save_figure(picture.figure(history, config), folder / f"{picture.name}.png"))
            for title, picture in PICTURES.items() if picture.name != "memory" or has_memory
        ]  # fmt: skip


@dataclass(frozen=True)
class Picture:
    name: str
    """Name of the PNG."""
    y_label: str
    caption: str
    draw: Callable[[Axes, RunHistory, TrainConfig], None]

    def figure(self, history: RunHistory, config: TrainConfig) -> Figure:
        figure, axes = token_axes(history, self.y_label)
        self.draw(axes, history, config)
        add_legend(axes)
        return figure


def plain_text(name: str) -> str:
    """Return a name as a text in a picture that shows it as it is: matplotlib would read text between $ as a formula."""
    return escape_control_characters(name, one_line=True).replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])
    return path


def token_axes(history: RunHistory, label: str) -> tuple[Figure, Axes]:
    """Create an empty picture over tokens with phases, restarts, rollbacks and labels."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    left = 0.0
    for index, (name, steps) in enumerate(groupby(history.steps, key=lambda record: record["phase"])):
        right = float(list(steps)[-1]["tokens"])
        axes.axvspan(left, right, color=PHASE_BAND_COLORS[index % 2], lw=0, zorder=0)
        axes.text(
            left, 1.01, f" {plain_text(name)}", transform=axes.get_xaxis_transform(), color=GREY, size=9, va="bottom"
        )
        left = right
    axes.set_xlim(0, left)
    foot: dict[str, Any] = {"clip_on": False, "transform": axes.get_xaxis_transform(), "ls": ""}
    marks = ((history.restarts, "^", RED, "restart"), (history.rollbacks, "<", ORANGE, "rollback"))
    for records, marker, color, label in marks:
        if records:
            places = column(records, "tokens")
            axes.plot(places, np.zeros(len(places)), marker=marker, color=color, ms=6, label=label, **foot)
    return figure, axes


def add_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.06), ncols=4, fontsize=9, borderaxespad=0.1)


def _set_log_scale_if_wide(axes: Axes, values: FloatArray, ratio: float | int) -> None:
    """Use a logarithmic y axis with round ticks if the largest value exceeds `ratio` times the smallest."""
    values = finite_values(values)
    if len(values) and values.min() > 0 and values.max() > ratio * values.min():
        axes.set_yscale("log")
        if values.max() < 30 * values.min():
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def _draw_raw_and_median(axes: Axes, history: RunHistory, values: FloatArray, color: str, label: str) -> None:
    axes.plot(column(history.steps, "tokens"), values, color=color, alpha=0.3, lw=0.8)
    axes.plot(*running_median(history.steps, values), color=color, label=f"{label}: running median (faint: each step)")


def _draw_skipped_steps(axes: Axes, history: RunHistory, name: str) -> None:
    """Mark each skipped step with a cross. It is at the upper edge if the value is not finite or above the axis."""
    if not history.skipped_steps:
        return
    values, top = column(history.skipped_steps, name), axes.get_ylim()[1]
    outside = ~(values <= top)
    tokens = column(history.skipped_steps, "tokens")
    look: dict[str, Any] = {"color": RED, "ms": 7, "mew": 1.6, "ls": "", "marker": "x", "zorder": 4}
    axes.plot(tokens[outside], np.ones(outside.sum()), transform=axes.get_xaxis_transform(), clip_on=False, **look)
    axes.plot(tokens[~outside], values[~outside], label="skipped step", **look)


def draw_loss(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    _set_log_scale_if_wide(axes, _draw_losses(axes, history), 2.5)
    _draw_skipped_steps(axes, history, "loss")


def draw_late_loss(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    values = _draw_losses(axes, history)
    late = finite_values(np.append(values[len(values) // 10 :], column(history.validations, "loss")))
    if len(late):
        low, high = np.percentile(late, (0.1, 99.5))
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    _draw_skipped_steps(axes, history, "loss")


def _draw_losses(axes: Axes, history: RunHistory) -> FloatArray:
    """Draw training and validation losses; return the training losses."""
    values = column(history.steps, "loss")
    _draw_raw_and_median(axes, history, values, BLUE, "training")
    if history.validations:
        tokens, held_out = column(history.validations, "tokens"), column(history.validations, "loss")
        axes.plot(tokens, held_out, "o", color=ORANGE, ms=5, mec="white", mew=0.8, label="validation", zorder=3)
    return values


def draw_learning_rate(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    axes.plot(column(history.steps, "tokens"), column(history.steps, "lr"), color=BLUE)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_seq_len(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    values = column(history.steps, "seq_len")
    axes.plot(column(history.steps, "tokens"), values, color=BLUE, drawstyle="steps-pre")
    lengths = sorted(set(values))
    axes.set_yscale("log", base=2)
    axes.set_yticks(lengths, [f"{int(length):,}" for length in lengths])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(lengths[0] / 2, lengths[-1] * 2)


def draw_grad_norm(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    values, max_grad_norm = column(history.steps, "grad_norm"), config.optim.max_grad_norm
    _draw_raw_and_median(axes, history, values, BLUE, "norm")
    if max_grad_norm > 0:
        axes.axhline(max_grad_norm, color=RED, lw=1, ls="--", label=f"clipped above {max_grad_norm:g}")
    _set_log_scale_if_wide(axes, np.append(values, max_grad_norm or np.nan), 5)
    _draw_skipped_steps(axes, history, "grad_norm")


def draw_throughput(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    _draw_raw_and_median(axes, history, column(history.steps, "tokens_per_second"), BLUE, "throughput")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def draw_mfu(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    for name, color, label in (("mfu", BLUE, "full attention"), ("mfu_causal", GREEN, "causal half")):
        _draw_raw_and_median(axes, history, 100 * column(history.steps, name), color, label)
    axes.set_ylim(bottom=0)


def draw_data_wait(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    share = 100 * column(history.steps, "data_seconds") / column(history.steps, "step_seconds")
    _draw_raw_and_median(axes, history, share, ORANGE, "share")
    axes.set_ylim(0, max(5.0, float(np.nanmax(share, initial=0)) * 1.1))


def draw_step_time(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    values = column(history.steps, "step_seconds")
    _draw_raw_and_median(axes, history, values, BLUE, "step")
    _set_log_scale_if_wide(axes, values, 10)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)


def draw_memory(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    values = column(history.steps, "memory_gib")
    axes.plot(column(history.steps, "tokens"), values, color=BLUE, label="peak allocation")
    if config.hardware:
        axes.axhline(config.hardware.memory_gib, color=RED, lw=1, ls="--", label=plain_text(config.hardware.name))
    axes.set_ylim(bottom=0)


LOSS_LABEL = "loss (nats per token)"
MFU_CAPTION = (
    "Model FLOPs of a step over the devices' dense peak, with attention counted in full and at its causal half."
)
PICTURES = {
    "Loss": Picture("loss", LOSS_LABEL, "Mean cross-entropy of each step. Points: held-out rows.", draw_loss),
    "Late loss": Picture("loss_late", LOSS_LABEL, "The same, scaled to all but the first tenth of the steps.", draw_late_loss),
    "Learning rate": Picture("learning_rate", "learning rate", "The schedule over all phases.", draw_learning_rate),
    "Sequence length": Picture("seq_len", "tokens per row", "Tokens per row in each phase.", draw_seq_len),
    "Gradient norm": Picture("grad_norm", "norm before clipping", "Global norm over all parameters.", draw_grad_norm),
    "Throughput": Picture("throughput", "tokens per second", "All devices together.", draw_throughput),
    "MFU": Picture("mfu", "MFU (% of peak FLOP/s)", MFU_CAPTION, draw_mfu),
    "Waiting for data": Picture("data_wait", "% of the step", "Part of each step spent waiting for its batch.", draw_data_wait),
    "Step time": Picture("step_time", "step time (s)", "Wall-clock time, without validations and saves.", draw_step_time),
    "Memory": Picture("memory", "device memory (GiB)", "Peak allocation on a device so far.", draw_memory),
}  # fmt: skip
"""Title -> picture."""
