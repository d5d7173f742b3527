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

from tandem.trainer.checkpoint.layout import MARKER, PASSED_OVER, begun, damage, data_files, read_manifest
from tandem.trainer.config import UserError
from tandem.trainer.metrics import progress
from tandem.trainer.tools.checkpoints.compare import Advance, differences

if TYPE_CHECKING:
    from tandem.trainer.checkpoint.read import Snapshot

PASSED = "damaged: a run has passed it over and gone on from an earlier one; it removes it when it gets there"
TORN = "torn: not committed; a save is under way, or a kill left it and the run removes it when it goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem checkpoint`, of each of its three commands."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|diff")
    here = "run folder, an import's folder, a folder of checkpoints"
    says = "one row for each checkpoint, oldest first"
    listing = commands.add_parser("ls", help=says, description=says)
    listing.add_argument("folder", metavar="RUN", type=Path, help=here)
    says = "read every file of the committed checkpoints again and compare hashes"
    verifying = commands.add_parser("verify", help=says, description=says)
    verifying.add_argument("folder", metavar="RUN|CHECKPOINT", type=Path, help=f"{here} or a checkpoint itself")
    verifying.add_argument("--step", metavar="N", type=int, help="only the checkpoint of this step")
    says = "compare two checkpoints, facts and every bit of every tensor, whatever ranks wrote them"
    differing = commands.add_parser("diff", help=says, description=says)
    for name in ("a", "b"):
        which = "checkpoint, or a run's or import's folder: its newest whole one; RUN@STEP names one of a run"
        differing.add_argument(name, metavar=name.upper(), help=which)
    for command in (listing, verifying, differing):
        command.add_argument("--json", action="store_true", help="one JSON object, for machines")


def run(args: argparse.Namespace) -> int:
    """What was asked for is printed; returns 1 where `verify` found damage or `diff` a difference, else 0.

    Raises: UserError where there is no such checkpoint.
    """
    return {"ls": _ls, "verify": _verify, "diff": _diff}[args.command](args)


def _ls(args: argparse.Namespace) -> int:
    rows = [row for folder in found(args.folder) if (row := described(folder))]
    total_bytes, free_bytes = sum(row["bytes"] for row in rows), shutil.disk_usage(args.folder).free
    if args.json:
        totals = {"total_bytes": total_bytes, "free_bytes": free_bytes}
        print(json.dumps({"folder": str(args.folder), "checkpoints": rows, **totals}))
        return 0
    print("\n".join(table(["step", "tokens", "size", "committed", "tp x dp", ""], map(_cells, rows))))
    states = Counter(row["state"] for row in rows)
    others = [f" and {states[state]} {state}" for state in ("torn", "passed over") if states[state]]
    counted = f"{states['committed'] + states['damaged']} committed{''.join(others)}"
    print(f"{counted}: {decimal(total_bytes)}; free on this file system: {decimal(free_bytes)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    verdicts = []
    for folder in committed_at(args.folder, args.step):
        with progress.shown(f"verifying {folder.name}", _size_bytes(folder), "bytes") as advance:
            verdict = verified(folder, advance)
        verdicts.append(verdict)
        if not args.json:
            print(f"{folder}: {_verdict_words(verdict)}", flush=True)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "checkpoints": verdicts}))
    return int(any(verdict["state"] == "damaged" for verdict in verdicts))


def _diff(args: argparse.Namespace) -> int:
    one, other = (_snapshot(text) for text in (args.a, args.b))
    with progress.shown("comparing", _size_bytes(one.folder), "bytes") as advance:
        compared = differences(one, other, advance)
    print(json.dumps(compared) if args.json else "\n".join(_difference_words(compared)))
    return 0 if compared["same"] else 1


def found(folder: Path) -> list[Path]:
    """The checkpoints that a run folder, an import's folder, a folder of checkpoints or a checkpoint has, oldest first, torn
    ones too.

    Raises: UserError when there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run folder, an import's folder or a checkpoint")
    for root in (folder / "checkpoints", folder):
        if folders := begun(root):
            return folders
    if (folder / MARKER).is_file() or folder in begun(folder.parent):
        return [folder]
    raise UserError(f"{folder}: no checkpoint there; give a run folder that has saved one, or an import's folder")


def committed_at(folder: Path, step: int | None = None, asked: str = "--step") -> list[Path]:
    """The committed ones of `found`, or the one of `step`; `asked` is what the user has named it with.

    Raises: UserError when there is none.
    """
    folders = [each for each in found(folder) if (each / MARKER).is_file()]
    if not folders:
        raise UserError(
            f"{folder}: no committed checkpoint there; give a run folder that has saved one, or an import's folder"
        )
    if step is None:
        return folders
    if chosen := [each for each in folders if _step_of(each) == step]:
        return chosen
    kept = ", ".join(str(_step_of(each)) for each in folders)
    raise UserError(f"{asked}: {step}; {folder} has kept checkpoints of steps {kept}; name one of them")


def described(folder: Path) -> dict[str, Any] | None:
    """The row of a checkpoint, from its manifest and the sizes of its files; None when it is gone.

    Units: `time` is that of the commit, in seconds since 1970.
    """
    row: dict[str, Any] = {"step": _step_of(folder), "folder": str(folder), "bytes": _size_bytes(folder)}
    wrong, manifest = damage(folder, files=[]), _manifest(folder)
    row |= {name: manifest.get(name) for name in ("tokens", "tp_size", "dp_size")}
    try:  # last: a run that removes a checkpoint begins with its marker
        committed_time = (folder / MARKER).stat().st_mtime
    except FileNotFoundError:
        state = "passed over" if (folder / PASSED_OVER).is_file() else "torn"
        return row | {"state": state, "damage": None, "time": None} if folder.is_dir() else None
    return row | {"state": "damaged" if wrong else "committed", "damage": wrong, "time": committed_time}


def verified(folder: Path, advance: Advance) -> dict[str, Any]:
    """Whether every file of a committed checkpoint is what was written: `state` is whole, damaged or removed."""
    files, size_bytes = data_files(folder), _size_bytes(folder)
    by_size = damage(folder, files=[])
    wrong = [by_size] if by_size else _other_contents(folder, files, advance)
    state = "damaged" if wrong else "whole"
    if not (folder / MARKER).is_file():  # with which a run begins to remove a checkpoint
        state, wrong = "removed", []
    facts = {"step": _step_of(folder), "folder": str(folder), "files": len(files), "bytes": size_bytes}
    return facts | {"state": state, "damage": wrong}


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with every column but the last aligned at its right."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0
    padded = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return ["  ".join(line).rstrip() for line in padded]


def _snapshot(text: str) -> Snapshot:
    """The whole checkpoint that a user has named, opened.  Raises: UserError when there is none."""
    from tandem.trainer.checkpoint.read import opened

    folder = Path(text)
    if not folder.is_dir() and (named := re.fullmatch(r"(.+)@(\d+)", text, re.ASCII)):
        [folder] = committed_at(Path(named[1]), int(named[2]), asked=text)
    found(folder)
    with Console(stderr=True).status(f"opening {folder}"):
        return opened(folder)


def _other_contents(folder: Path, files: Sequence[str], advance: Advance) -> list[str]:
    def wrong(file: str) -> str | None:
        try:
            return damage(folder, files=[file])
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        finally:
            advance(_file_bytes(folder / file))

    with ThreadPoolExecutor() as pool:
        return [words for words in pool.map(wrong, files) if words]


def _cells(row: Mapping[str, Any]) -> list[str]:
    committed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"])) if row["time"] else "-"
    ranks = f"{row['tp_size']} x {row['dp_size']}" if row["tp_size"] else "-"
    remark = {"torn": TORN, "passed over": PASSED, "damaged": f"damaged: {row['damage']}"}.get(row["state"], "")
    tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
    return [str(row["step"]), tokens, decimal(row["bytes"]), committed, ranks, remark]


def _verdict_words(verdict: Mapping[str, Any]) -> str:
    return {
        "whole": f"whole: {decimal(verdict['bytes'])} in {verdict['files']} data files",
        "damaged": f"damaged: {'; '.join(verdict['damage'])}",
        "removed": "removed while it was read",
    }[str(verdict["state"])]


def _difference_words(compared: Mapping[str, Any]) -> Iterator[str]:
    for side in ("a", "b"):
        named = compared[side]
        layout = f"tp {named['tp_size']} x dp {named['dp_size']}"
        yield f"{side.upper()}: {named['folder']}, step {named['step']}, {layout}"
    yield from compared["facts"]
    for side in ("a", "b"):
        yield from (f"only in {side.upper()}: {name}" for name in compared[f"only_in_{side}"])
    shapes = {name: pair for kind in compared["kinds"].values() for name, pair in kind.get("other_shape", {}).items()}
    yield from (f"other shape: {name}: {one} | {other}" for name, (one, other) in shapes.items())
    titles = ["kind", "tensors equal", "differing", "elements differing", "largest difference"]
    yield from table(titles, [_kind_cells(kind, found) for kind, found in compared["kinds"].items()])
    yield "the same facts and bits" if compared["same"] else "different"


def _kind_cells(kind: str, found: Mapping[str, Any]) -> list[str]:
    if "only_in" in found:
        return [kind, "-", "-", "-", f"only in {found['only_in'].upper()}"]
    size, name = found["largest_difference"], found["largest_in"]
    largest = "-" if name is None else f"{'not finite' if size is None else f'{size:.3g}'} in {name}"
    elements = f"{found['elements_differing']:,} of {found['elements']:,}"
    return [kind, str(found["tensors_equal"]), str(found["tensors_differing"]), elements, largest]


def _step_of(folder: Path) -> int | None:
    if numbered := re.fullmatch(r"step-(\d+)", folder.absolute().name):
        return int(numbered[1])
    step: int | None = _manifest(folder).get("step")  # a folder that a person has renamed
    return step


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says; nothing where it cannot be read."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _size_bytes(folder: Path) -> int:
    return sum(map(_file_bytes, folder.glob("*")))


def _file_bytes(path: Path) -> int:
    """Nothing for a file that is not there: a run may have removed it just now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
