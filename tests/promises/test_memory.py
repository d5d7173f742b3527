"""Import and export hold one tensor at a time: the largest tensor bounds their memory, whatever the size of model or shard.

The tests measure RssAnon, the memory that belongs to the process alone. VmHWM and ru_maxrss also count files read through the
page cache, so they cannot distinguish a stream from a full copy. RLIMIT_AS and RLIMIT_DATA limit address space. Another process
samples every two milliseconds, because a thread inside would have to wait for the interpreter lock.
"""

import contextlib
import filecmp
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tandem.trainer.checkpoint import write
from tandem.trainer.checkpoint.hf import description
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, WEIGHTS_FILE
from tandem.trainer.checkpoint.hf.weight_files import PICKLE_FILE
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.config import BTLMConfig, MupConfig, load_config
from tandem.trainer.distributed.sharding import TensorSharding, slice_local
from tandem.trainer.models.init import initial_value
from tandem.trainer.models.mup import parameter_rules
from tests.promises.conftest import clean_environment

MIB, GIB = 1 << 20, 1 << 30
MODEL = BTLMConfig(
    family="btlm",
    hidden_size=256,
    num_layers=60,
    num_heads=4,
    ffn_hidden_size=1200,
    vocab_size=50_257,
    norm_eps=1e-5,
    init_std=0.02,
    init_truncation_sigmas=0.0,
    document_masking=False,
    tie_word_embeddings=True,
)
"""84 million parameters, 13 million of them in the embedding, the largest tensor."""
OVERHEAD = 16 * MIB
"""Python objects, file buffers and memory that the allocator keeps; measured 4 to 7 MiB. Two copies of the largest tensor, 98
MiB, exceed the limit."""
COMMANDS = """
import json, sys
from tandem.trainer.__main__ import main
from tandem.trainer.runtime.process import silence_library_warnings
silence_library_warnings()
import tandem.trainer.tools.convert_hf.conversion, tandem.trainer.tools.convert_hf.export_check
print("imported modules", flush=True)
sys.stdin.readline()
sys.exit(any(main(command) for command in json.loads(sys.argv[1])))
"""


def anonymous_bytes(process: subprocess.Popen) -> int:
    """Return RssAnon, or 0 if the process has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def peak_bytes(process: subprocess.Popen) -> int:
    """Return the peak RssAnon until the process ends; it must end with exit code 0."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process))
        time.sleep(0.002)
    assert process.returncode == 0
    return peak


def peak_of(*commands: list[object]) -> tuple[int, str]:
    """Return the peak RssAnon of the commands above that of the imported modules, and their output."""
    with start_python("-c", COMMANDS, json.dumps([list(map(str, command)) for command in commands])) as process:
        assert process.stdout.readline() == "imported modules\n"
        modules = anonymous_bytes(process)
        process.stdin.write("\n")
        process.stdin.flush()
        return peak_bytes(process) - modules, process.stdout.read()


def start_python(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=clean_environment(), **pipes)


def ascending(shape: tuple[int, ...], name: str) -> Tensor:
    """A tensor whose rows and columns all differ, as far as bf16 can represent."""
    return torch.arange(math.prod(shape), dtype=torch.float32).remainder(251.0).reshape(shape) + len(name)


def write_export(
    model: BTLMConfig, mup: MupConfig | None, values: Callable[[tuple[int, ...], str], Tensor], out: Path
) -> int:
    """Write a bf16 export, like released ones; return the bytes of the largest tensor in fp32."""
    rows = {row.name: row for row in description.FAMILY_MODULES["btlm"].tensor_mappings(model)}
    export_folder(
        lambda name: values(rows[name].shape, name),
        model,
        mup,
        out,
        tokenizer=None,
        max_seq_len=64,
        dtype=torch.bfloat16,
    )
    return max(4 * math.prod(row.shape) for row in rows.values())


def divide_checkpoint(between: Path, folder: Path) -> None:
    """Write the checkpoint as two tensor-parallel ranks save it: runs of the embedding (whose vocabulary is padded) and of
    vectors, boxes of the other matrices, and each box in two fragments.
    """
    with contextlib.closing(open_checkpoint(between)) as snapshot:
        shards = {}
        for name in snapshot.parameter_names:
            shape = tuple(snapshot.read_weight(name).shape)
            dim = 1 if len(shape) > 1 and name != "embedding.weight" else 0
            shards[name] = TensorSharding(shape, dim, shape[dim] + shape[dim] % 2)
        folder.mkdir()
        tables = []
        for rank in range(2):
            entries = [
                write._fragment_entry(name, shard, rank, start, math.prod(shard.local_shape(2)) // 2, ["master"])
                for name, shard in shards.items() for start in (0, math.prod(shard.local_shape(2)) // 2)
            ]  # fmt: skip
            parts = (
                slice_local(shards[entry["name"]], snapshot.read_weight(entry["name"]), rank, 2)
                .reshape(-1)
                .narrow(0, entry["start"], entry["numel"])
                for entry in entries
            )
            tables.append(write.write_rank_file(folder, rank, entries, parts))
        write.commit(folder, tables, {**snapshot.manifest, "tp_size": 2})


def test_import_and_export_hold_one_tensor(tmp_path: Path) -> None:
    """At most one tensor in fp32 and, during the cast, one in bf16. The whole model, as each shard, is seven times as large."""
    source, between, out = (tmp_path / name for name in ("source", "between", "out"))
    largest = write_export(MODEL, None, ascending, source)
    peak, output = peak_of(["import-hf", source, between], ["export-hf", between, out])
    assert (between / "step-00000000").is_dir()
    expected_lines = [
        rf"imported btlm of .* into {between}: 321 MiB in \d+\.\d s",
        rf"exported {between} to {out}: 161 MiB .*",
    ]
    assert re.fullmatch("\n".join([*expected_lines, ""]), output), output
    assert filecmp.cmp(source / WEIGHTS_FILE, out / WEIGHTS_FILE, shallow=False)
    print(f"figures: largest tensor {largest / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB")
    assert largest <= peak <= 1.5 * largest + OVERHEAD
    divide_checkpoint(between, tmp_path / "step-00000000")
    peak, output = peak_of(["export-hf", tmp_path / "step-00000000", tmp_path / "again"])
    assert filecmp.cmp(source / WEIGHTS_FILE, tmp_path / "again" / WEIGHTS_FILE, shallow=False)
    print(f"figures: of two ranks, peak {peak / MIB:.0f} MiB")
    assert largest <= peak <= 1.5 * largest + OVERHEAD


def save_as_pickle(folder: Path) -> None:
    """Replace the safetensors by one file of torch.save, with the tied head, as in the published BTLM."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    torch.save(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, folder / PICKLE_FILE)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


@pytest.mark.full_size
@pytest.mark.timeout(1800)
def test_full_size_btlm_goes_in_and_out_within_3_gib(tmp_path: Path) -> None:
    """2.65 billion parameters in bf16, as released, with the commands of the README. Needs 27 GB of disk."""
    config = load_config(Path(__file__).parents[2] / "configs" / "btlm-3b-8k.yaml")
    model, mup = config.model, config.mup
    assert isinstance(model, BTLMConfig)
    table = parameter_rules(model, mup)

    def drawn(shape: tuple[int, ...], name: str) -> Tensor:
        """Values as large as at the start of training; biases and norms are not constant."""
        role = "embedding" if name == "embedding.weight" else "hidden"
        return initial_value(name, shape, table[role], seed=1, truncation_sigmas=model.init_truncation_sigmas)

    source, between, out = (tmp_path / name for name in ("source", "between", "out"))
    try:
        write_export(model, mup, drawn, source)
        for verb in (["import-hf", source, between], ["export-hf", between, out]):
            with start_python("-m", "tandem.trainer", *verb) as process:
                peak = peak_bytes(process)
                print(f"figures: {process.stdout.read().strip()}, peak {peak / GIB:.2f} GiB")
                assert peak <= 3 * GIB
        shards = sorted(path.name for path in source.glob("model-*.safetensors"))
        assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for name in [*shards, INDEX_FILE]:
            assert filecmp.cmp(source / name, out / name, shallow=False)
        shutil.rmtree(out)
        save_as_pickle(source)
        with start_python("-m", "tandem.trainer", "import-hf", source, out) as process:
            peak = peak_bytes(process)
            print(f"figures: from {PICKLE_FILE}, {process.stdout.read().strip()}, peak {peak / GIB:.2f} GiB")
            assert peak <= 3 * GIB
        names = sorted(path.name for path in (between / "step-00000000").glob("*.safetensors"))
        assert filecmp.cmpfiles(between / "step-00000000", out / "step-00000000", names, shallow=False) == (
            names,
            [],
            [],
        )
    finally:
        for folder in (source, between, out):
            shutil.rmtree(folder, ignore_errors=True)
