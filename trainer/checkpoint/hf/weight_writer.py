"""Write the weights of a Hugging Face folder: safetensors in shards, with an index if there are several shards."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, dtype

from tandem.trainer.checkpoint import safetensors_writer
from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, WEIGHTS_FILE, write_json
from tandem.trainer.checkpoint.hf.tensor_conversion import TensorReader, to_hf_tensor
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorMapping
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec

DEFAULT_SHARD_BYTES = 4_000_000_000


def write_weights(
    folder: Path, read_tensor: TensorReader, mappings: list[TensorMapping], dtypes: dict[str, dtype], shard_bytes: int
) -> None:
    """Write tensors in shards of at most `shard_bytes`, with an index if there are several shards.

    `dtypes` maps our name of each tensor to its stored dtype. Only one tensor is in memory at a time.
    """

    def specs(row: TensorMapping) -> dict[str, TensorSpec]:
        return {piece.hf_name: TensorSpec(dtypes[row.name], piece.shape) for piece in row.hf_tensors}

    def num_bytes(row: TensorMapping) -> int:
        return sum(spec.num_bytes for spec in specs(row).values())

    def tensors(shard: list[TensorMapping]) -> Iterator[Tensor]:
        for row in shard:
            yield from _to_hf_tensors(row, read_tensor(row.name), dtypes[row.name])

    shards = safetensors_writer.group_by_bytes(mappings, num_bytes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS_FILE
        file_specs = {name: spec for row in shard for name, spec in specs(row).items()}
        safetensors_writer.write_safetensors(folder / file, file_specs, tensors(shard))
        weight_map |= dict.fromkeys(file_specs, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(map(num_bytes, mappings))}
        write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _to_hf_tensors(mapping: TensorMapping, tensor: Tensor, dtype: dtype) -> Iterator[Tensor]:
    assert tuple(tensor.shape) == mapping.shape, f"{mapping.name}: {tuple(tensor.shape)} is not {mapping.shape}"
    for piece in mapping.hf_tensors:
        yield to_hf_tensor(mapping, piece, tensor).to(dtype)
