"""What the two command lines share."""

import argparse

from tandem.trainer.config import UserError


def check_output_paths(options: argparse.Namespace) -> None:
    """Raises: UserError where --json or --folder names a place that cannot be."""
    for option in ("json", "folder"):
        path = getattr(options, option)
        if path is not None and not path.parent.is_dir():
            raise UserError(f"--{option}: {path}; its folder does not exist; create it, or name another")
    if options.json is not None and options.json.is_dir():
        raise UserError(f"--json: {options.json}; is a folder; name a file")


def format_number(value: float | int | None, digits: int) -> str:
    """As a table shows it."""
    return "-" if value is None else f"{value:,.{digits}f}"
