"""Compare two runs: find where losses and gradient norms first differ and by how much, and how the configs differ.

Numbers are compared as they were written, to the last bit. "identical" therefore proves that a refactoring changed nothing.
"""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tandem.trainer.checkpoint.compatibility import check_run_folder_model
from tandem.trainer.config import UserError, load_saved_config
from tandem.trainer.config.addresses import hide_secrets
from tandem.trainer.config.outside import read_text
from tandem.trainer.disk import atomic_write
from tandem.trainer.metrics.history import RunHistory, read_history
from tandem.trainer.tools.report import page, plots

COMPARED_METRICS = {"loss": "loss (nats per token)", "grad_norm": "gradient norm before clipping"}
MAX_LISTED_STEPS = 200
"""Largest number of rows in the table of differing steps. The verdict counts all of them."""

StepPair = tuple[dict[str, Any], dict[str, Any]]
"""The records of one step in both runs."""


def write_comparison(a: Path, b: Path) -> tuple[str, Path]:
    """Write the page B/compare-A.html. Return the verdict in one line and the page's path."""
    histories = read_history(a), read_history(b)
    steps_of_b = {record["step"]: record for record in histories[1].steps}
    pairs = [(one, steps_of_b[one["step"]]) for one in histories[0].steps if one["step"] in steps_of_b]
    if not pairs:
        raise UserError(f"--compare: {a} and {b} have no step in common; name two runs that both finished a step")
    before, after = (read_config(folder).splitlines() for folder in (a, b))
    summary = "; ".join(first_difference(pairs, name) for name in COMPARED_METRICS)
    names = list(COMPARED_METRICS)
    files = [_draw_overlay(histories, (a, b), name, b / "report" / f"compare-{a.name}-{name}.png") for name in names]
    differing = [pair for pair in pairs if any(pair[0][name] != pair[1][name] for name in names)]
    config_diff = difflib.unified_diff(before, after, str(a), str(b), lineterm="", n=1)
    sections = [
        *(page.picture(COMPARED_METRICS[name], f"{a} and {b}", file) for name, file in zip(names, files, strict=True)),
        page.data_table("Steps that differ", _difference_columns(), differing[:MAX_LISTED_STEPS]),
        page.collapsible_text("config.yaml, A against B", "\n".join(config_diff) or "no difference"),
    ]
    path = b / f"compare-{a.name}.html"
    atomic_write(path, hide_secrets(page.html_page(f"{a} and {b}", summary, sections)))
    return summary, path


def read_config(folder: Path) -> str:
    """Return the text of a run's config.yaml, which another version may have written.

    Raises: UserError if it cannot be read, is not UTF-8, or has another model than the run's checkpoints.
    """
    path = folder / "config.yaml"
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); restore it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it, or name another folder") from None
    config = None
    with suppress(UserError):
        config = load_saved_config(path)
    if config:
        check_run_folder_model(config, folder)
    return text


def first_difference(pairs: list[StepPair], name: str) -> str:
    """Describe the first step that differs and the largest difference, or report that the metric is identical."""
    differing = [(one, other) for one, other in pairs if one[name] != other[name]]
    if not differing:
        return f"{name} identical in {len(pairs)} common steps"
    one, other = differing[0]
    of_a, of_b = (plots.column([pair[side] for pair in differing], name) for side in (0, 1))
    distances = np.abs(of_a - of_b)
    num_unknown = int(np.count_nonzero(~np.isfinite(distances)))  # a value is missing, infinite or NaN
    unknown = f"; {num_unknown} of these have a value that is not finite" if num_unknown else ""
    largest = np.max(distances, initial=0.0, where=np.isfinite(distances))
    return (
        f"{name} differs first at step {one['step']} ({one[name]} and {other[name]}), "
        f"in {len(differing)} of {len(pairs)} common steps, by at most {largest:.3g}{unknown}"
    )


def _draw_overlay(histories: tuple[RunHistory, RunHistory], folders: tuple[Path, Path], name: str, path: Path) -> Path:
    looks: list[dict[str, Any]] = [{"color": plots.BLUE, "lw": 3, "alpha": 0.5}, {"color": plots.ORANGE, "lw": 1.2}]
    with matplotlib.rc_context(plots.PLOT_STYLE):
        longer = max(histories, key=lambda history: history.steps[-1]["tokens"])
        figure, axes = plots.token_axes(longer, COMPARED_METRICS[name])
        for history, folder, look in zip(histories, folders, looks, strict=True):
            tokens, values = plots.column(history.steps, "tokens"), plots.column(history.steps, name)
            axes.plot(tokens, values, label=plots.plain_text(str(folder)), **look)
        plots.add_legend(axes)
        return plots.save_figure(figure, path)


def _difference_columns() -> dict[str, Any]:
    columns: dict[str, Any] = {"step": lambda pair: str(pair[0]["step"])}
    for name in COMPARED_METRICS:
        columns |= {
            f"{name} of A": lambda pair, name=name: str(pair[0][name]),
            f"{name} of B": lambda pair, name=name: str(pair[1][name]),
            f"{name} B - A": lambda pair, name=name: _format_gap(pair[0][name], pair[1][name]),
        }
    return columns


def _format_gap(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else f"{other - one:+.3g}"
