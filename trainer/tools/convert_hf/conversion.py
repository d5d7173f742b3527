"""Import and export weights, one tensor at a time, with a progress bar."""

import argparse
import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tandem.trainer.checkpoint.hf.description import FAMILY_MODULES
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.folder import atomic_folder
from tandem.trainer.checkpoint.hf.tensor_conversion import TensorReader
from tandem.trainer.checkpoint.hf.tokenizer_files import write_chat_templates
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.weight_source import WeightSource
from tandem.trainer.checkpoint.weights import OpenWeights, open_weights
from tandem.trainer.checkpoint.write import save_imported_weights
from tandem.trainer.config import AnyModelConfig
from tandem.trainer.config.numbers import format_bytes
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.metrics import progress
from tandem.trainer.metrics.history import read_history
from tandem.trainer.metrics.records import METRICS_FILE

log = logging.getLogger(__name__)
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_MAX_SEQ_LEN = 2048
"""Longest row in config.json if the exported weights do not state it."""


def import_weights(weight_source: WeightSource, output: Path) -> None:
    """Write a committed checkpoint of the weights, and the tokenizer, to the output folder."""
    start_time, opened = time.perf_counter(), open_with_status(weight_source)
    source, model, text = opened.source, opened.source.model, opened.source.text
    metadata = model_metadata(model, source.mup)
    metadata |= {"eos_token": source.eos_token, "max_seq_len": source.max_seq_len}
    metadata |= {"special_tokens": text.special_tokens, "token_ids": text.token_ids}
    with atomic_folder(output) as folder, with_progress("importing", opened) as read_tensor:
        num_bytes = save_imported_weights(folder, read_tensor, tensor_shapes(model), metadata=metadata)
        if source.tokenizer_file:
            shutil.copyfile(source.tokenizer_file, folder / TOKENIZER_FILE)
        write_chat_templates(folder, text.chat_templates)
    name = f"{model.family} of width {model.hidden_size}, depth {model.num_layers}"
    safe_print(f"imported {name} into {output}: {format_size_and_time(num_bytes, start_time)}")


def export_weights(weight_source: WeightSource, arguments: argparse.Namespace) -> None:
    """Write the folder that the checked arguments describe, and compare it with the weights if they ask for it."""
    start_time, dtype, opened = time.perf_counter(), TORCH_DTYPES[arguments.dtype], open_with_status(weight_source)
    source = opened.source
    loss = validation_loss(arguments.run_folder, source.step)
    text = dataclasses.replace(source.text, license=arguments.license, validation_loss=loss)
    with with_progress("exporting", opened) as read_tensor:
        changed_sections = export_folder(
            read_tensor, source.model, source.mup, arguments.output,
            tokenizer=source.tokenizer_file, eos_token=source.eos_token,
            max_seq_len=arguments.max_seq_len or source.max_seq_len or DEFAULT_MAX_SEQ_LEN, dtype=dtype, text=text,
        )  # fmt: skip
    num_bytes = dtype.itemsize * sum(map(math.prod, tensor_shapes(source.model).values()))
    safe_print(f"exported {arguments.run_folder} to {arguments.output}: {format_size_and_time(num_bytes, start_time)}")
    if changed_sections:
        safe_print(
            f"tokenizer.json of the export has another {' and '.join(changed_sections)} than the corpus's, so that "
            "transformers encodes as the corpus was encoded"
        )
    if source.missing_tokenizer_file:
        message = "exported without a tokenizer: %s is missing; copy the corpus's tokenizer there and export again"
        log.warning(message, source.missing_tokenizer_file)
    if arguments.check:
        from tandem.trainer.tools.convert_hf.export_check import check_export  # imports transformers

        check_export(opened, arguments.output, dtype)


def validation_loss(run_folder: Path, step: int | None) -> float | None:
    """Return the loss of the run's validation after this step, if there was one."""
    if step is None or not (run_folder / METRICS_FILE).is_file():
        return None
    losses = [record["loss"] for record in read_history(run_folder).validations if record["step"] == step]
    return losses[-1] if losses else None


def open_with_status(weight_source: WeightSource) -> OpenWeights:
    """Open weights and show a spinner if stderr is a terminal. Opening a checkpoint hashes all its files."""
    with progress.open_screen().status(f"opening {weight_source.path}"):
        return open_weights(weight_source)


@contextmanager
def with_progress(description: str, opened: OpenWeights) -> Iterator[TensorReader]:
    """Yield a `read_tensor` of the weights that also advances a progress bar if stderr is a terminal."""
    num_elements = sum(map(math.prod, tensor_shapes(opened.source.model).values()))
    with progress.progress_bar(description, num_elements) as advance:

        def read_tensor(name: str) -> Tensor:
            tensor = opened.read_tensor(name)
            advance(tensor.numel())
            return tensor

        yield read_tensor


def tensor_shapes(model: AnyModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and unpadded shape of every tensor of the model."""
    return {row.name: row.shape for row in FAMILY_MODULES[model.family].tensor_mappings(model)}


def format_size_and_time(num_bytes: int, start_time: float) -> str:
    return f"{format_bytes(num_bytes)} in {time.perf_counter() - start_time:.1f} s"
