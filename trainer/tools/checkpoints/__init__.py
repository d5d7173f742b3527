"""`tandem checkpoint`: what a run has saved (`ls`), whether it is what was written (`verify`), how two of them differ (`diff`).

Nothing here writes, and a run may go on meanwhile: what it removes while we look is no damage. `ls` and `verify` know names,
manifests and hashes, and never import torch; `diff` compares bits of true global tensors, so that layouts do not show.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal

from tandem.trainer.checkpoint.layout import (
    COMMIT_MARKER,
    REJECTED_MARKER,
    find_damage,
    list_checkpoints,
    list_data_files,
    read_manifest,
)
from tandem.trainer.config import UserError
from tandem.trainer.metrics import progress
from tandem.trainer.tools.checkpoints.compare import ProgressCallback, compare_checkpoints

if TYPE_CHECKING:
    from tandem.trainer.checkpoint.read import Checkpoint

REJECTED_REMARK = "damaged: a run has passed it over and gone on from an earlier one; it removes it when it gets there"
TORN_REMARK = "torn: not committed; a save is under way, or a kill left it and the run removes it when it goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem checkpoint`, of each of its three commands."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|diff")
    folder_help = "run folder, an import's folder, a folder of checkpoints"
    command_help = "one row for each checkpoint, oldest first"
    listing = commands.add_parser("ls", help=command_help, description=command_help)
    listing.add_argument("folder", metavar="RUN", type=Path, help=folder_help)
    command_help = "read every file of the committed checkpoints again and compare hashes"
    verifying = commands.add_parser("verify", help=command_help, description=command_help)
    verifying.add_argument("folder", metavar="RUN|CHECKPOINT", type=Path, help=f"{folder_help} or a checkpoint itself")
    verifying.add_argument("--step", metavar="N", type=int, help="only the checkpoint of this step")
    command_help = "compare two checkpoints, facts and every bit of every tensor, whatever ranks wrote them"
    differing = commands.add_parser("diff", help=command_help, description=command_help)
    for name in ("a", "b"):
        side_help = "checkpoint, or a run's or import's folder: its newest whole one; RUN@STEP names one of a run"
        differing.add_argument(name, metavar=name.upper(), help=side_help)
    for command in (listing, verifying, differing):
        command.add_argument("--json", action="store_true", help="one JSON object, for machines")


def run(args: argparse.Namespace) -> int:
    """What was asked for is printed; returns 1 where `verify` found damage or `diff` a difference, else 0.

    Raises: UserError where there is no such checkpoint.
    """
    return {"ls": _ls, "verify": _verify, "diff": _diff}[args.command](args)


def _ls(args: argparse.Namespace) -> int:
    rows = [row for folder in find_checkpoints(args.folder) if (row := describe_checkpoint(folder))]
    total_bytes, free_bytes = sum(row["bytes"] for row in rows), shutil.disk_usage(args.folder).free
    if args.json:
        totals = {"total_bytes": total_bytes, "free_bytes": free_bytes}
        print(json.dumps({"folder": str(args.folder), "checkpoints": rows, **totals}))
        return 0
    print("\n".join(format_table(["step", "tokens", "size", "committed", "tp x dp", ""], map(_row_cells, rows))))
    states = Counter(row["state"] for row in rows)
    others = [f" and {states[state]} {state}" for state in ("torn", "rejected") if states[state]]
    counted = f"{states['committed'] + states['damaged']} committed{''.join(others)}"
    print(f"{counted}: {decimal(total_bytes)}; free on this file system: {decimal(free_bytes)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    results = []
    for folder in find_committed(args.folder, args.step):
        with progress.progress_bar(f"verifying {folder.name}", _folder_bytes(folder), "bytes") as advance:
            result = verify_checkpoint(folder, advance)
        results.append(result)
        if not args.json:
            print(f"{folder}: {_format_verification(result)}", flush=True)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "checkpoints": results}))
    return int(any(verdict["state"] == "damaged" for verdict in results))


def _diff(args: argparse.Namespace) -> int:
    one, other = (_open_checkpoint(text) for text in (args.a, args.b))
    with progress.progress_bar("comparing", _folder_bytes(one.folder), "bytes") as advance:
        comparison = compare_checkpoints(one, other, advance)
    print(json.dumps(comparison) if args.json else "\n".join(_format_comparison(comparison)))
    return 0 if comparison["same"] else 1


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run folder, an import's folder, a folder of checkpoints or a checkpoint has, oldest first, torn
    ones too.

    Raises: UserError when there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run folder, an import's folder or a checkpoint")
    for root in (folder / "checkpoints", folder):
        if folders := list_checkpoints(root):
            return folders
    if (folder / COMMIT_MARKER).is_file() or folder in list_checkpoints(folder.parent):
        return [folder]
    raise UserError(f"{folder}: no checkpoint there; give a run folder that has saved one, or an import's folder")


def find_committed(folder: Path, step: int | None = None, option: str = "--step") -> list[Path]:
    """The committed ones of `find_checkpoints`, or the one of `step`; `option` is what the user has named it with.

    Raises: UserError when there is none.
    """
    folders = [each for each in find_checkpoints(folder) if (each / COMMIT_MARKER).is_file()]
    if not folders:
        raise UserError(
            f"{folder}: no committed checkpoint there; give a run folder that has saved one, or an import's folder"
        )
    if step is None:
        return folders
    if chosen := [each for each in folders if _read_step(each) == step]:
        return chosen
    kept = ", ".join(str(_read_step(each)) for each in folders)
    raise UserError(f"{option}: {step}; {folder} has kept checkpoints of steps {kept}; name one of them")


def describe_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The row of a checkpoint, from its manifest and the sizes of its files; None when it is gone.

    Units: `time` is that of the commit, in seconds since 1970.
    """
    row: dict[str, Any] = {"step": _read_step(folder), "folder": str(folder), "bytes": _folder_bytes(folder)}
    damage_found, manifest = find_damage(folder, files_to_hash=[]), _manifest_or_empty(folder)
    row |= {name: manifest.get(name) for name in ("tokens", "tp_size", "dp_size")}
    try:  # last: a run that removes a checkpoint begins with its marker
        committed_time = (folder / COMMIT_MARKER).stat().st_mtime
    except FileNotFoundError:
        state = "rejected" if (folder / REJECTED_MARKER).is_file() else "torn"
        return row | {"state": state, "damage": None, "time": None} if folder.is_dir() else None
    return row | {"state": "damaged" if damage_found else "committed", "damage": damage_found, "time": committed_time}


def verify_checkpoint(folder: Path, advance: ProgressCallback) -> dict[str, Any]:
    """Whether every file of a committed checkpoint is what was written: `state` is whole, damaged or removed."""
    files, size_bytes = list_data_files(folder), _folder_bytes(folder)
    by_size = find_damage(folder, files_to_hash=[])
    damage_found = [by_size] if by_size else _find_changed_files(folder, files, advance)
    state = "damaged" if damage_found else "whole"
    if not (folder / COMMIT_MARKER).is_file():  # with which a run begins to remove a checkpoint
        state, damage_found = "removed", []
    facts = {"step": _read_step(folder), "folder": str(folder), "files": len(files), "bytes": size_bytes}
    return facts | {"state": state, "damage": damage_found}


def format_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with every column but the last aligned at its right."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0
    padded = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return ["  ".join(line).rstrip() for line in padded]


def _open_checkpoint(text: str) -> Checkpoint:
    """The whole checkpoint that a user has named, opened.  Raises: UserError when there is none."""
    from tandem.trainer.checkpoint.read import open_checkpoint

    folder = Path(text)
    if not folder.is_dir() and (named := re.fullmatch(r"(.+)@(\d+)", text, re.ASCII)):
        [folder] = find_committed(Path(named[1]), int(named[2]), option=text)
    find_checkpoints(folder)
    with Console(stderr=True).status(f"opening {folder}"):
        return open_checkpoint(folder)


def _find_changed_files(folder: Path, files: Sequence[str], advance: ProgressCallback) -> list[str]:
    def check_file(file: str) -> str | None:
        try:
            return find_damage(folder, files_to_hash=[file])
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        finally:
            advance(_file_bytes(folder / file))

    with ThreadPoolExecutor() as pool:
        return [words for words in pool.map(check_file, files) if words]


def _row_cells(row: Mapping[str, Any]) -> list[str]:
    committed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"])) if row["time"] else "-"
    layout = f"{row['tp_size']} x {row['dp_size']}" if row["tp_size"] else "-"
    remark = {"torn": TORN_REMARK, "rejected": REJECTED_REMARK, "damaged": f"damaged: {row['damage']}"}.get(
        row["state"], ""
    )
    tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
    return [str(row["step"]), tokens, decimal(row["bytes"]), committed, layout, remark]


def _format_verification(result: Mapping[str, Any]) -> str:
    return {
        "whole": f"whole: {decimal(result['bytes'])} in {result['files']} data files",
        "damaged": f"damaged: {'; '.join(result['damage'])}",
        "removed": "removed while it was read",
    }[str(result["state"])]


def _format_comparison(comparison: Mapping[str, Any]) -> Iterator[str]:
    for side in ("a", "b"):
        checkpoint = comparison[side]
        layout = f"tp {checkpoint['tp_size']} x dp {checkpoint['dp_size']}"
        yield f"{side.upper()}: {checkpoint['folder']}, step {checkpoint['step']}, {layout}"
    yield from comparison["facts"]
    for side in ("a", "b"):
        yield from (f"only in {side.upper()}: {name}" for name in comparison[f"only_in_{side}"])
    shapes = {name: pair for kind in comparison["kinds"].values() for name, pair in kind.get("other_shape", {}).items()}
    yield from (f"other shape: {name}: {one} | {other}" for name, (one, other) in shapes.items())
    titles = ["kind", "tensors equal", "differing", "elements differing", "largest difference"]
    yield from format_table(titles, [_kind_cells(kind, found) for kind, found in comparison["kinds"].items()])
    yield "the same facts and bits" if comparison["same"] else "different"


def _kind_cells(kind: str, comparison: Mapping[str, Any]) -> list[str]:
    if "only_in" in comparison:
        return [kind, "-", "-", "-", f"only in {comparison['only_in'].upper()}"]
    size, name = comparison["largest_difference"], comparison["largest_in"]
    largest = "-" if name is None else f"{'not finite' if size is None else f'{size:.3g}'} in {name}"
    elements = f"{comparison['elements_differing']:,} of {comparison['elements']:,}"
    return [kind, str(comparison["tensors_equal"]), str(comparison["tensors_differing"]), elements, largest]


def _read_step(folder: Path) -> int | None:
    if numbered := re.fullmatch(r"step-(\d+)", folder.absolute().name):
        return int(numbered[1])
    step: int | None = _manifest_or_empty(folder).get("step")  # a folder that a person has renamed
    return step


def _manifest_or_empty(folder: Path) -> dict[str, Any]:
    """What the manifest says; nothing where it cannot be read."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _folder_bytes(folder: Path) -> int:
    return sum(map(_file_bytes, folder.glob("*")))


def _file_bytes(path: Path) -> int:
    """Nothing for a file that is not there: a run may have removed it just now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
