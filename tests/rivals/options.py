"""Helpers shared by the command lines of the benchmarks."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem.trainer.config import UserError

INSTALL_HINT = "pip install -e '.[rivals]'"


def check_names(option: str, names: list[str], known: Iterable[str]) -> None:
    """Raises: UserError for a name that is not known."""
    for name in names:
        if name not in known:
            raise UserError(f"{option}: {name!r} is not known; use one of {'; '.join(known)}")


def check_at_least(options: argparse.Namespace, **minima: float) -> None:
    """Raises: UserError for an option below its minimum."""
    for option, minimum in minima.items():
        if (value := getattr(options, option)) < minimum:
            raise UserError(f"--{option.replace('_', '-')}: {value} is too small; use at least {minimum}")


def check_json_path(path: Path | None) -> None:
    """Raises: UserError if rows cannot be written to this file."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        reason = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise UserError(f"--json: {path} {reason}; name a file in an existing folder")


def append_json_row(path: Path | None, row: Any) -> None:
    """Append a dataclass to a file as one line of JSON."""
    if path is not None:
        with path.open("a") as out:
            out.write(json.dumps(asdict(row)) + "\n")


def format_number(value: float | None, digits: int, divisor: float = 1) -> str:
    """Format a cell of a table."""
    return "-" if value is None else f"{value / divisor:,.{digits}f}"
