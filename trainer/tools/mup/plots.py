"""Draw the two figures of the checks in the style of the reports: coordinates against width, loss against learning rate."""

from collections.abc import Sequence
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tandem.trainer.config.numbers import format_count
from tandem.trainer.tools.mup.coordinates import LAWS, CoordinateRecord, coordinate_curve
from tandem.trainer.tools.mup.lr_transfer import Losses, best_lr
from tandem.trainer.tools.report.plots import GREY, PLOT_STYLE, RED, save_figure

MUP_PLOT_STYLE = PLOT_STYLE | {"savefig.dpi": 100, "font.size": 9}
COLORS = ("#b9d2ec", "#8ab3dd", "#5a94cd", "#2f6fb5", "#1d4f87", "#0f3159")
"""From light (early updates, narrow models) to dark (late updates, wide models)."""


@matplotlib.rc_context(MUP_PLOT_STYLE)
def draw_coordinates(records: list[CoordinateRecord], folder: Path) -> None:
    """Write one PNG for each case, with the change after each update and the size at the start against the width."""
    for tp_size, precision in dict.fromkeys((record["tp_size"], record["precision"]) for record in records):
        figure = _draw_coordinates(records, tp_size, precision)
        save_figure(figure, folder / f"coordinates-tp{tp_size}-{precision}.png")


@matplotlib.rc_context(MUP_PLOT_STYLE)
def draw_transfer(losses: Losses, folder: Path) -> Path:
    """Draw loss against learning rate, one panel for each parametrisation and one curve for each width."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(losses), sharey=True)
    by_lrs = [by_lr for by_width in losses.values() for by_lr in by_width.values()]
    finite = [loss for by_lr in by_lrs for loss in by_lr.values() if isfinite(loss)]
    for axes, (name, by_width) in zip(panels, losses.items(), strict=True):
        for color, (width, by_lr) in zip(_pick_colors(len(by_width)), by_width.items(), strict=True):
            curve = {lr: loss for lr, loss in by_lr.items() if isfinite(loss)}
            axes.plot(list(curve), list(curve.values()), "o-", color=color, ms=4, label=str(width))
            if curve:
                axes.plot([best_lr(curve)], [min(curve.values())], "o", color=color, ms=10, mfc="none", mew=1.5)
        peaks = list(next(iter(by_width.values())))
        _set_log2_xaxis(axes, peaks, [f"{peak:.2g}" for peak in peaks])
        axes.set_xlabel("peak learning rate (ring: best of each width)")
        axes.set_title(name, loc="left")
        if finite:
            axes.set_ylim(min(finite) - 0.1, min(max(finite), min(finite) + 2.5) + 0.1)
    panels[0].set_ylabel("final training loss (nats per token)")
    figure.legend(*panels[0].get_legend_handles_labels(), title="width", loc="outside right upper")
    return save_figure(figure, folder / "transfer.png")


def _draw_coordinates(records: list[CoordinateRecord], tp_size: int, precision: str) -> Figure:
    """Draw the changes in the top row, one line for each update, and the sizes at the start in the bottom row."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(2, len(LAWS))
    widths, last_step = sorted({record["width"] for record in records}), max(record["step"] for record in records)
    for column, coordinate in enumerate(LAWS):
        change, size = panels[0][column], panels[1][column]
        for color, step in zip(_pick_colors(last_step), range(1, last_step + 1), strict=True):
            points = _curve_over_layers(records, tp_size, precision, "change", coordinate, step)
            change.plot(*points, "o-", color=color, ms=3, label=str(step))
        _, sizes = _curve_over_layers(records, tp_size, precision, "size", coordinate, 0)
        size.plot(widths, sizes, "o-", color=GREY, ms=3)
        law = [sizes[0] * (width / widths[0]) ** LAWS[coordinate]["size"][0] for width in widths]
        size.plot(widths, law, ":", color=RED, label="law")
        change.set_title(coordinate, loc="left")
        for axes in (change, size):
            _set_log_axes(axes, widths)
        size.set_xlabel("width (hidden_size)")
    panels[0][0].set_ylabel("change since the start (RMS)")
    panels[1][0].set_ylabel("size at the start (RMS)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), title="updates", loc="outside right upper")
    figure.legend(*panels[1][0].get_legend_handles_labels(), loc="outside right lower")
    conditions = f"tensor parallel {tp_size}, {precision}"
    figure.suptitle(f"Root mean square over rows, layers and seeds; {conditions}", x=0.01, ha="left")
    return figure


def _curve_over_layers(
    records: list[CoordinateRecord], tp_size: int, precision: str, kind: str, coordinate: str, step: int
) -> tuple[list[int], list[float]]:
    """Like `coordinates.coordinate_curve`, as the root mean square over all layers."""
    names = [name for name in records[0][kind] if name.split()[0] == coordinate]
    curves = [coordinate_curve(records, tp_size, precision, kind, name, step) for name in names]
    by_width = zip(*(values for _, values in curves), strict=True)
    return curves[0][0], [sqrt(fmean(value**2 for value in values)) for values in by_width]


def _set_log2_xaxis(axes: Axes, ticks: Sequence[float], labels: list[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _set_log_axes(axes: Axes, widths: list[int]) -> None:
    """Make both axes logarithmic, with at least a decade of y so that a flat curve looks flat."""
    _set_log2_xaxis(axes, widths, [str(width) for width in widths])
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 20 * low:
        middle = sqrt(low * high)
        axes.set_ylim(middle / sqrt(20), middle * sqrt(20))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def _pick_colors(count: int) -> list[str]:
    """Pick `count` shades from light to dark."""
    return [COLORS[round(index * (len(COLORS) - 1) / max(1, count - 1))] for index in range(count)]
