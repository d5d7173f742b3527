"""`tandem checkpoint`: list checkpoints (`ls`), check their files (`verify`), compare two checkpoints (`diff`).

The commands only read. The run can continue meanwhile, and a checkpoint that it removes is not reported as damaged. `ls` and
`verify` do not import torch. `diff` compares whole tensors without padding, so the layout of the ranks does not matter.
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
from typing import Any

from tandem.trainer.checkpoint import layout
from tandem.trainer.checkpoint.layout import COMMIT_MARKER, REJECTED_MARKER, find_damage, list_checkpoints
from tandem.trainer.config import UserError
from tandem.trainer.config.numbers import format_bytes
from tandem.trainer.config.outside import safe_print
from tandem.trainer.metrics import progress
from tandem.trainer.tools.checkpoints.compare import ProgressCallback, compare_checkpoints

REMARKS = {
    "rejected": "damaged: the run continued from an earlier checkpoint and will remove this one when it reaches this step",
    "torn": "torn: not committed; a save is in progress, or the run was killed and will remove it when it continues",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|diff")
    folder_help = "run folder, import folder or folder of checkpoints"
    any_help = "run folder, import folder, folder of checkpoints or single checkpoint"
    command_help = "print one row per checkpoint, oldest first"
    listing = commands.add_parser("ls", help=command_help, description=command_help)
    listing.add_argument("folder", metavar="RUN", type=Path, help=folder_help)
    command_help = "read every file of the committed checkpoints and check its hash"
    verifying = commands.add_parser("verify", help=command_help, description=command_help)
    verifying.add_argument("folder", metavar="RUN|CHECKPOINT", type=Path, help=any_help)
    verifying.add_argument("--step", metavar="N", type=int, help="check only the checkpoint of this step")
    command_help = "compare the metadata and every bit of every tensor of two checkpoints, even if their layouts differ"
    differing = commands.add_parser("diff", help=command_help, description=command_help)
    for name in ("a", "b"):
        side_help = "checkpoint, RUN@STEP, or a run or import folder (its newest undamaged checkpoint is used)"
        differing.add_argument(name, metavar=name.upper(), help=side_help)
    for command in (listing, verifying, differing):
        command.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run one command. Return 1 if `verify` found damage or `diff` a difference, else 0.

    Raises: UserError if there is no such checkpoint.
    """
    return {"ls": _ls, "verify": _verify, "diff": _diff}[args.command](args)


def _ls(args: argparse.Namespace) -> int:
    rows = [row for folder in find_checkpoints(args.folder) if (row := describe_checkpoint(folder))]
    total_bytes, free_bytes = sum(row["bytes"] for row in rows), shutil.disk_usage(args.folder).free
    if args.json:
        totals = {"total_bytes": total_bytes, "free_bytes": free_bytes}
        print(json.dumps({"folder": str(args.folder), "checkpoints": rows, **totals}))
        return 0
    safe_print("\n".join(format_table(["step", "tokens", "size", "committed", "tp x dp", ""], map(_row_cells, rows))))
    states = Counter(row["state"] for row in rows)
    others = [f" and {states[state]} {state}" for state in ("torn", "rejected") if states[state]]
    counted = f"{states['committed'] + states['damaged']} committed{''.join(others)}"
    safe_print(f"{counted}: {format_bytes(total_bytes)}; free on this file system: {format_bytes(free_bytes)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    results = []
    for folder in find_committed(args.folder, args.step):
        with progress.progress_bar(f"verifying {folder.name}", _folder_bytes(folder), "bytes") as advance:
            result = verify_checkpoint(folder, advance)
        results.append(result)
        words = {
            "whole": f"whole: {format_bytes(result['bytes'])} in {result['files']} data files",
            "damaged": f"damaged: {'; '.join(result['damage'])}", "removed": "removed while it was read",
        }  # fmt: skip
        if not args.json:
            safe_print(f"{folder}: {words[result['state']]}", flush=True)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "checkpoints": results}))
    return int(any(verdict["state"] == "damaged" for verdict in results))


def _diff(args: argparse.Namespace) -> int:
    folders = [_find_named(text) for text in (args.a, args.b)]
    # Imported here because it imports torch, which a refusal does not need.
    from tandem.trainer.checkpoint.read import open_checkpoint

    with progress.open_screen().status("opening"):
        one, other = map(open_checkpoint, folders)
    with progress.progress_bar("comparing", _folder_bytes(one.folder), "bytes") as advance:
        comparison = compare_checkpoints(one, other, advance)
    safe_print(json.dumps(comparison) if args.json else "\n".join(_format_comparison(comparison)))
    return 0 if comparison["same"] else 1


def find_checkpoints(folder: Path) -> list[Path]:
    """Find the checkpoints, torn ones included, of a run folder, import folder, folder of checkpoints or checkpoint.

    Returns them oldest first.  Raises: UserError if there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run folder, an import folder or a checkpoint")
    for root in (folder / "checkpoints", folder):
        if folders := list_checkpoints(root):
            return folders
    if (folder / COMMIT_MARKER).is_file() or folder in list_checkpoints(folder.parent):
        return [folder]
    raise UserError(f"{folder}: has no checkpoint; name the folder of a run that has saved one, or an import folder")


def find_committed(folder: Path, step: int | None = None, option: str = "--step") -> list[Path]:
    """Find the committed checkpoints, or the one of `step`, which the user gave as `option`.

    Raises: UserError if there is none.
    """
    folders = [each for each in find_checkpoints(folder) if (each / COMMIT_MARKER).is_file()]
    if not folders:
        remedy = "name the folder of a run that has saved one, or an import folder"
        raise UserError(f"{folder}: has no committed checkpoint; {remedy}")
    if step is None:
        return folders
    if chosen := [each for each in folders if _read_step(each) == step]:
        return chosen
    kept = ", ".join(str(_read_step(each)) for each in folders)
    raise UserError(f"{option}: {folder} has no checkpoint of step {step}; name a step that has one: {kept}")


def describe_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Describe a checkpoint from its manifest and file sizes. Return None if it was removed meanwhile.

    Units: `time` is the time of the commit in seconds since 1970.
    """
    row: dict[str, Any] = {"step": _read_step(folder), "folder": str(folder), "bytes": _folder_bytes(folder)}
    damage_found, manifest = _find_damage(folder, []), _manifest_or_empty(folder)
    row |= {name: manifest.get(name) for name in ("tokens", "tp_size", "dp_size")}
    try:  # read last, because a run that removes a checkpoint removes the marker first
        committed_time = (folder / COMMIT_MARKER).stat().st_mtime
    except FileNotFoundError:
        state = "rejected" if (folder / REJECTED_MARKER).is_file() else "torn"
        return row | {"state": state, "damage": None, "time": None} if folder.is_dir() else None
    return row | {"state": "damaged" if damage_found else "committed", "damage": damage_found, "time": committed_time}


def verify_checkpoint(folder: Path, advance: ProgressCallback) -> dict[str, Any]:
    """Hash every file of a committed checkpoint. `state` of the result is whole, damaged or removed."""
    files, size_bytes = layout.list_data_files(folder), _folder_bytes(folder)
    by_size = _find_damage(folder, [])
    damage_found = [by_size] if by_size else _find_changed_files(folder, files, advance)
    state = "damaged" if damage_found else "whole"
    if not (folder / COMMIT_MARKER).is_file():  # a run that removes a checkpoint removes the marker first
        state, damage_found = "removed", []
    facts = {"step": _read_step(folder), "folder": str(folder), "files": len(files), "bytes": size_bytes}
    return facts | {"state": state, "damage": damage_found}


def format_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Format a table. Every column except the last is right-aligned."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    return ["  ".join([*map(str.rjust, line, widths), line[-1]]).rstrip() for line in lines]


def _find_named(text: str) -> Path:
    """Find the folder that the user named, without reading a tensor.  Raises: UserError if it has no checkpoint to compare."""
    folder = Path(text)
    if not folder.is_dir() and (named := re.fullmatch(r"(.+)@(\d+)", text, re.ASCII)):
        [folder] = find_committed(Path(named[1]), int(named[2]), option=text)
    find_checkpoints(folder)
    layout.SavedCheckpoint(layout.choose_checkpoint(folder, layout.find_newest, layout.find_damage_by_size))
    return folder


def _find_damage(folder: Path, files_to_hash: list[str]) -> str | None:
    """Describe the damage of a checkpoint, also if this version cannot read it."""
    try:
        return find_damage(folder, files_to_hash)
    except UserError as error:
        return str(error).removeprefix(f"{folder / layout.MANIFEST_FILE}: ").removeprefix(f"{folder}: ")


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
    remark = f"damaged: {row['damage']}" if row["state"] == "damaged" else REMARKS.get(row["state"], "")
    tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
    return [str(row["step"]), tokens, format_bytes(row["bytes"]), committed, layout, remark]


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
    yield "same facts and bits" if comparison["same"] else "different"


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
    step: int | None = _manifest_or_empty(folder).get("step")  # a user renamed the folder
    return step


def _manifest_or_empty(folder: Path) -> dict[str, Any]:
    """Read and check the manifest. Return an empty one if that fails."""
    try:
        manifest = layout.read_manifest(folder)
        layout.check_manifest(folder, manifest)
    except (OSError, ValueError):
        return {}
    return manifest


def _folder_bytes(folder: Path) -> int:
    return sum(map(_file_bytes, folder.glob("*")))


def _file_bytes(path: Path) -> int:
    """Return the size of a file, or 0 if the run has removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
