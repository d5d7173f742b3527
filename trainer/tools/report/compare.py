"""Two runs side by side: where losses and gradient norms first differ, by how much, and the configs.

The proof of a refactor is "identical" here: numbers are compared as written, to the last bit.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.disk import atomic_write
from tandem.trainer.metrics.history import RunHistory, read_history
from tandem.trainer.tools.report import page, plots

COMPARED_METRICS = {"loss": "loss (nats per token)", "grad_norm": "gradient norm before clipping"}
MAX_LISTED_STEPS = 200
"""Rows of the table of differences at most; the verdict counts them all."""


def write_comparison(a: Path, b: Path) -> tuple[str, Path]:
    """The verdict in one line, and the page B/compare-A.html that shows it."""
    histories = read_history(a), read_history(b)
    pairs = common_steps(*histories)
    if not pairs:
        raise UserError(f"--compare: {a} and {b} have no step in common; name two runs that both finished a step")
    summary = "; ".join(first_difference(pairs, name) for name in COMPARED_METRICS)
    folder = b / "report"
    pictures = [
        page.picture(
            label, f"{a} and {b}", _draw_overlay(histories, (a, b), name, folder / f"compare-{a.name}-{name}.png")
        )
        for name, label in COMPARED_METRICS.items()
    ]
    sections = [*pictures, page.data_table("Steps that differ", *_difference_rows(pairs)), _config_diff(a, b)]
    path = b / f"compare-{a.name}.html"
    atomic_write(path, page.html_page(f"{a} and {b}", summary, sections))
    return summary, path


def common_steps(a: RunHistory, b: RunHistory) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The records of the steps that both have, in order."""
    of_b = {record["step"]: record for record in b.steps}
    return [(record, of_b[record["step"]]) for record in a.steps if record["step"] in of_b]


def first_difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]], name: str) -> str:
    """`identical`, or the first step that differs and the largest difference, in words."""
    differing = [(one, other) for one, other in pairs if one[name] != other[name]]
    if not differing:
        return f"{name} identical in {len(pairs)} common steps"
    one, other = differing[0]
    sides = [[pair[side] for pair in differing] for side in (0, 1)]
    largest = np.nanmax(np.abs(plots.column(sides[0], name) - plots.column(sides[1], name)), initial=0.0)
    return (
        f"{name} differs first at step {one['step']} ({one[name]} and {other[name]}), "
        f"in {len(differing)} of {len(pairs)} common steps, by at most {largest:.3g}"
    )


def _draw_overlay(histories: tuple[RunHistory, RunHistory], folders: tuple[Path, Path], name: str, path: Path) -> Path:
    with matplotlib.rc_context(plots.PLOT_STYLE):
        longer = max(histories, key=lambda history: history.steps[-1]["tokens"])
        figure, axes = plots.token_axes(longer, COMPARED_METRICS[name])
        looks: tuple[dict[str, Any], ...] = (
            {"color": plots.BLUE, "lw": 3, "alpha": 0.5},
            {"color": plots.ORANGE, "lw": 1.2},
        )
        for history, folder, look in zip(histories, folders, looks, strict=True):
            axes.plot(
                plots.column(history.steps, "tokens"),
                plots.column(history.steps, name),
                label=str(folder),
                **look,
            )
        return plots.save_figure(plots.add_legend(figure, axes), path)


def _difference_rows(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    head = ["step", *(f"{name} {side}" for name in COMPARED_METRICS for side in ("of A", "of B", "B - A"))]
    body = []
    for one, other in pairs:
        if any(one[name] != other[name] for name in COMPARED_METRICS):
            body.append(
                [
                    str(one["step"]),
                    *(cell for name in COMPARED_METRICS for cell in _difference_cells(one[name], other[name])),
                ]
            )
    return head, body[:MAX_LISTED_STEPS]


def _difference_cells(one: float | None, other: float | None) -> list[str]:
    gap = "-" if one is None or other is None else f"{other - one:+.3g}"
    return [str(one), str(other), gap]


def _config_diff(a: Path, b: Path) -> str:
    before, after = ((folder / "config.yaml").read_text().splitlines() for folder in (a, b))
    lines = list(difflib.unified_diff(before, after, str(a), str(b), lineterm="", n=1))
    return page.collapsible_text("config.yaml, A against B", "\n".join(lines) or "the same")
