"""Files that end a program which imports one of them, named like modules of Python, of libraries and of ours."""

from pathlib import Path

NAMES = (
    "argparse", "contextlib", "dataclasses", "deepspeed", "json", "kernels", "logging", "multiprocessing", "numpy", "omegaconf",
    "random", "re", "sitecustomize", "socket", "tandem", "tempfile", "torch", "trainer", "typing", "yaml",
)  # fmt: skip


def write_hostile_modules(folder: Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """A program that imports one ends with 99 and says which."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(NAMES) - set(leave_out):
        lines = f"import os\nos.write(2, b'imported {name}.py of the working folder\\n')\nos._exit(99)\n"
        (folder / f"{name}.py").write_text(lines)
