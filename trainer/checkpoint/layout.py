"""The layout of a checkpoint folder: its files, whether it is committed, and whether it is damaged. No tensor is read here.

    checkpoints/step-00000100/
        rank-00000.safetensors    one per rank that owns state: "<kind>/<name>/<start>" -> flat fp32
        manifest.json             step, cursor, model, position of every fragment, size and hash of every file
        COMMITTED                 hash of manifest.json, written last; a folder without it is not a checkpoint

A fragment is a contiguous range of one rank's flattened and padded tensor-parallel shard. Any number of ranks can therefore
assemble the global tensor and shard it for their own layout.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from tandem.trainer.config import (
    MODEL_CONFIGS,
    AnyModelConfig,
    MupConfig,
    PhaseConfig,
    UserError,
    parse_content,
    parse_dataclass,
)
from tandem.trainer.config.constraints import COUNT, POSITIVE, SHA256, Pattern, SelectedBy
from tandem.trainer.config.outside import open_regular_file, parse_json, read_file, read_json

FORMAT_VERSION = 2
"""Version of the manifest's format. Only this version can be read."""
MANIFEST_FILE, COMMIT_MARKER = "manifest.json", "COMMITTED"
REJECTED_MARKER = "REJECTED"
"""When a run continues from an older checkpoint, it renames the commit markers of damaged newer ones to this."""
STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
REMEDY = "restore the checkpoint, or use another"
Count = Annotated[int, COUNT]
Positive = Annotated[int, POSITIVE]
FileName = Annotated[str, Pattern(r"rank-\d+\.safetensors", "the name of a rank's file in the folder")]


@dataclass(frozen=True)
class SavedFile:
    bytes: Count
    sha256: Annotated[str, SHA256]


@dataclass(frozen=True)
class SavedSharding:
    """`distributed.sharding.TensorSharding` at the time of the save."""

    shape: list[Positive]
    dim: Annotated[int | None, COUNT]
    padded_size: Count

    def box_numel(self, tp_size: int) -> int | None:
        """Return the elements of a rank's box, or None if there is no such sharding."""
        if self.dim is None:
            return math.prod(self.shape)
        if self.dim >= len(self.shape) or self.padded_size < self.shape[self.dim] or self.padded_size % tp_size:
            return None
        return math.prod(self.shape) // self.shape[self.dim] * (self.padded_size // tp_size)


@dataclass(frozen=True)
class Fragment:
    name: str
    sharding: SavedSharding
    tp_rank: Count
    start: Count
    numel: Positive
    kinds: list[Literal["master", "exp_avg", "exp_avg_sq"]]
    file: FileName


@dataclass(frozen=True)
class GuardState:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    comparison_key: list[Any] = field(default_factory=list)
    num_consecutive_bad_steps: Count = 0


@dataclass(frozen=True)
class CheckpointManifest:
    """manifest.json. An import has only the first fields; a run's checkpoint has all except `max_seq_len`."""

    format: int
    step: Count
    tp_size: Positive
    dp_size: Positive
    model: Annotated[AnyModelConfig, SelectedBy("family", MODEL_CONFIGS)]
    mup: MupConfig | None
    files: dict[FileName, SavedFile]
    fragments: list[Fragment]
    eos_token: str | None = None
    max_seq_len: Annotated[int | None, POSITIVE] = None
    tokenizer_sha256: Annotated[str | None, SHA256] = None
    special_tokens: dict[str, str] | None = None
    token_ids: dict[str, Any] | None = None
    tokens: Count = 0
    num_updates: Count = 0
    cursor: dict[str, Count] = field(default_factory=dict)
    num_ledger_lines: Count = 0
    guard: GuardState | None = None
    fingerprints: dict[str, Annotated[str, SHA256]] = field(default_factory=dict)
    shuffle_settings: dict[str, Count] = field(default_factory=dict)
    skipped_shards: dict[str, list[str]] = field(default_factory=dict)
    phases: list[PhaseConfig] = field(default_factory=list)


FindDamage = Callable[[Path], str | None]


class SavedCheckpoint:
    """What a committed checkpoint states about itself.

    Raises: UserError if the checkpoint has another format version, or a manifest that states impossible things.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        check_manifest(folder, self.manifest)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def run_folder(self) -> Path:
        """The folder of the run or import."""
        folder = self.folder.absolute().parent
        return folder.parent if folder.name == "checkpoints" else folder

    def model_configs(self) -> tuple[AnyModelConfig, MupConfig | None]:
        """Return the saved model and muP sections."""
        tree, mup = self.manifest["model"], self.manifest["mup"]
        model = parse_dataclass(MODEL_CONFIGS[tree["family"]], tree, "model")
        return model, parse_dataclass(MupConfig, mup, "mup") if mup else None


def model_metadata(model: AnyModelConfig, mup: MupConfig | None) -> dict[str, Any]:
    """Return the manifest's sections `model` and `mup`, from which a reader rebuilds the model."""
    return {"model": dataclasses.asdict(model), "mup": dataclasses.asdict(mup) if mup else None}


def choose_newest(root: Path, folders: list[Path], find_damage: FindDamage) -> Path | None:
    """Return the last of the committed `folders` of `root` without damage, or None if there are no folders.

    Raises: UserError if all are damaged.
    """
    for folder in reversed(folders):
        if find_damage(folder) is None:
            return folder
    if folders:
        raise UserError(
            f"{root}: no undamaged checkpoint is left to continue from (damaged: {len(folders)}); move the folder away or "
            "choose another run.name"
        )
    return None


def choose_checkpoint(folder: Path, newest: Callable[[Path], Path | None], find_damage: FindDamage) -> Path:
    """Return the checkpoint that a path names: itself, or the newest undamaged one of a run folder or an import's folder.

    Raises: UserError if there is no such checkpoint.
    """
    for root in (folder / "checkpoints", folder):
        if chosen := newest(root):
            return chosen
    if not is_committed(folder):
        raise UserError(
            f"{folder}: has no committed checkpoint; name a run folder that has one, or the folder of an import"
        )
    if damage := find_damage(folder):
        raise UserError(f"{folder}: is damaged ({damage}); name another checkpoint, or the run folder")
    return folder


def find_damage_by_size(folder: Path) -> str | None:
    """Return what `find_damage` does without hashing a file."""
    return find_damage(folder, files_to_hash=[])


def find_newest(root: Path) -> Path | None:
    """Return the newest committed checkpoint in `root` whose files have the right sizes. Raises: UserError if none has."""
    return choose_newest(root, list_committed(root), find_damage_by_size)


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def fragment_key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def list_committed(root: Path) -> list[Path]:
    """List the committed checkpoint folders in `root`, oldest first. Raises: UserError if one cannot be read."""
    return [folder for folder in list_checkpoints(root) if is_committed(folder)]


def is_committed(folder: Path) -> bool:
    """Whether a checkpoint folder is committed. Raises: UserError if the folder cannot be read."""
    try:
        return (folder / COMMIT_MARKER).is_file()
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions, or name another folder")


def list_checkpoints(root: Path) -> list[Path]:
    """List all checkpoint folders in `root`, including incomplete ones, oldest first. Without `root` there are none.

    Raises: UserError if `root` cannot be read, because a run would then start again from its first step.
    """
    try:
        return sorted(path for path in root.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(root, error) from None


def find_damage(folder: Path, files_to_hash: list[str] | None = None) -> str | None:
    """Return a description of a committed folder's damage, or None if it has none. Hash only `files_to_hash` if given.

    Raises: UserError if its manifest was committed with a content that this version cannot read, or a file may not be read:
    a run would otherwise continue from an older checkpoint.
    """
    read = {}
    for file in (MANIFEST_FILE, COMMIT_MARKER):
        try:
            read[file] = read_file(folder / file)
        except PermissionError as error:
            raise _unreadable(folder / file, error) from None
        except OSError:
            return f"{file} cannot be read"
    text = read[MANIFEST_FILE]
    if hashlib.sha256(text).hexdigest().encode() != read[COMMIT_MARKER].strip():
        return f"{MANIFEST_FILE} is not the one that was committed"
    saved = _parse_files(folder, text)
    for file, entry in saved.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{file} is missing or has another size"
    hashed = [file for file in saved if files_to_hash is None or file in files_to_hash]
    # Threads help: hashing releases the interpreter lock, and one core hashes more slowly than a disk reads.
    with ThreadPoolExecutor() as pool:
        hashes = {file: pool.submit(file_sha256, folder / file) for file in hashed}
    for file, found in hashes.items():
        try:
            if found.result() != saved[file]["sha256"]:
                return f"{file} has changed since it was saved"
        except PermissionError as error:
            raise _unreadable(folder / file, error) from None
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None


@lru_cache(maxsize=1)
def _parse_files(folder: Path, text: bytes) -> dict[str, dict[str, Any]]:
    """Return the files in a manifest after checking it."""
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST_FILE}: is not valid JSON ({error}); {REMEDY}") from None
    check_manifest(folder, tree)
    files: dict[str, dict[str, Any]] = tree["files"]
    return files


def list_data_files(folder: Path) -> list[str]:
    """List the files of a committed folder except manifest and marker, or no files if the manifest cannot be read."""
    try:
        return sorted(read_manifest(folder)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest without checking its content."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE)
    return manifest


def check_manifest(folder: Path, tree: Any) -> None:
    """Check format, types, ranges and fragments of a manifest, and that the folder's name states the same step.

    Raises: UserError.
    """
    path = folder / MANIFEST_FILE
    if isinstance(tree, dict) and repr(found := tree.get("format")) != repr(FORMAT_VERSION):
        raise UserError(
            f"{folder}: has checkpoint format {found}, but this version of Tandem reads only {FORMAT_VERSION}; use "
            "the version that wrote it, start a run with another run.name, or repeat the import with tandem import-hf"
        )
    manifest = parse_content(CheckpointManifest, tree, path, REMEDY)
    if re.fullmatch(r"step-\d{8,}", folder.name) and folder.name != step_folder_name(manifest.step):
        raise UserError(
            f"{path}: states step {manifest.step}, but the folder is called {folder.name}; restore the folder's name"
        )
    if fault := _find_wrong_fragment(manifest):
        raise UserError(f"{path}: {fault}; {REMEDY}")


def _find_wrong_fragment(manifest: CheckpointManifest) -> str | None:
    """Return a description of the first tensor whose fragments do not form it, because readers take memory for its shape."""
    stored_bytes = sum(file.bytes for file in manifest.files.values())
    fragments_by_name: dict[str, list[Fragment]] = {}
    for fragment in manifest.fragments:
        fragments_by_name.setdefault(fragment.name, []).append(fragment)
    for name, fragments in fragments_by_name.items():
        sharding = fragments[0].sharding
        num_boxes = 1 if sharding.dim is None else manifest.tp_size
        box_numel = sharding.box_numel(manifest.tp_size)
        if 4 * math.prod(sharding.shape) > stored_bytes:
            return f"the shape of {name} is larger than all files of the checkpoint"
        if box_numel is None or any(each.sharding != sharding for each in fragments):
            return f"the fragments of {name} do not agree in a sharding over {manifest.tp_size} ranks"
        if any(each.file not in manifest.files or each.kinds != fragments[0].kinds for each in fragments):
            return f"the fragments of {name} have a file that is not listed, or not the same kinds of state"
        if len({*fragments[0].kinds}) < len(fragments[0].kinds) or "master" not in fragments[0].kinds:
            return f"the fragments of {name} have the kinds of state {', '.join(fragments[0].kinds)}"
        if not _cover(fragments, num_boxes, box_numel):
            return f"the fragments of {name} do not cover it exactly once"
    return None


def _cover(fragments: Sequence[Fragment], num_boxes: int, box_numel: int) -> bool:
    """Whether the fragments follow each other without gap or overlap through all boxes."""
    next_start = 0
    for each in sorted(fragments, key=lambda each: (each.tp_rank, each.start)):
        if each.tp_rank * box_numel + each.start != next_start or each.start + each.numel > box_numel:
            return False
        next_start += each.numel
    return next_start == num_boxes * box_numel


def file_sha256(path: Path) -> str:
    with open_regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
