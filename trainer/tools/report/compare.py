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
from tandem.trainer.disk import write_whole
from tandem.trainer.metrics.history import History, read
from tandem.trainer.tools.report import page, plots

COMPARED = {"loss": "loss (nats per token)", "gradient_norm": "gradient norm before clipping"}
LISTED_STEPS = 200
"""Rows of the table of differences at most; the verdict counts them all."""


def write(a: Path, b: Path) -> tuple[str, Path]:
    """The verdict in one line, and the page B/compare-A.html that shows it."""
    histories = read(a), read(b)
    pairs = common(*histories)
    if not pairs:
        raise UserError(f"--compare: {a} and {b} have no step in common; name two runs that both finished a step")
    verdict = "; ".join(first_difference(pairs, name) for name in COMPARED)
    folder = b / "report"
    pictures = [
        page.picture(label, f"{a} and {b}", _overlay(histories, (a, b), name, folder / f"compare-{a.name}-{name}.png"))
        for name, label in COMPARED.items()
    ]
    sections = [*pictures, page.rows("Steps that differ", *_differences(pairs)), _config_difference(a, b)]
    path = b / f"compare-{a.name}.html"
    write_whole(path, page.document(f"{a} and {b}", verdict, sections))
    return verdict, path


def common(a: History, b: History) -> list[tuple[dict[str, Any], dict[str, Any]]]:
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


def _overlay(histories: tuple[History, History], folders: tuple[Path, Path], name: str, path: Path) -> Path:
    with matplotlib.rc_context(plots.STYLE):
        longer = max(histories, key=lambda history: history.steps[-1]["tokens"])
        figure, axes = plots.frame(longer, COMPARED[name])
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
        return plots.save(plots.finish(figure, axes), path)


def _differences(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    head = ["step", *(f"{name} {side}" for name in COMPARED for side in ("of A", "of B", "B - A"))]
    body = []
    for one, other in pairs:
        if any(one[name] != other[name] for name in COMPARED):
            body.append([str(one["step"]), *(cell for name in COMPARED for cell in _cells(one[name], other[name]))])
    return head, body[:LISTED_STEPS]


def _cells(one: float | None, other: float | None) -> list[str]:
    gap = "-" if one is None or other is None else f"{other - one:+.3g}"
    return [str(one), str(other), gap]


def _config_difference(a: Path, b: Path) -> str:
    before, after = ((folder / "config.yaml").read_text().splitlines() for folder in (a, b))
    lines = list(difflib.unified_diff(before, after, str(a), str(b), lineterm="", n=1))
    return page.source("config.yaml, A against B", "\n".join(lines) or "the same")
