"""Synthetic rows: a function of seed, names and step, of which each data-parallel rank takes its slice, as with a corpus.

Token ids are uniform over the whole vocabulary, so no gradient row of the embedding is left out. Where the model masks
documents their lengths are drawn too, since attention costs what they make it cost; elsewhere a row is one document.
"""

import hashlib
import math

import torch
from jaxtyping import Int32
from torch import Tensor

from tandem.trainer.config import PhaseConfig, TrainConfig
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.mesh import Mesh

MEDIAN_DOCUMENT_TOKENS, DOCUMENT_LENGTH_SIGMA = 450, 1.3
"""Log-normal lengths of documents: many short, a few of many rows, 1,050 tokens on average, as web text has it (choice)."""


def draw_batch(config: TrainConfig, phase: PhaseConfig, step: int, mesh: Mesh) -> Batch:
    """This rank's rows of global step `step` of the phase."""
    digest = hashlib.sha256(f"{config.run.seed}/bench/{config.run.name}/{phase.name}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    token_ids = torch.randint(
        config.model.vocab_size, (phase.global_batch_size, phase.seq_len + 1), generator=generator
    )
    documents = torch.zeros(phase.global_batch_size, phase.seq_len, dtype=torch.int32)
    if config.model.document_masking:
        documents = draw_document_indices(phase.global_batch_size, phase.seq_len, generator)
    num_local_rows = phase.global_batch_size // mesh.dp_size
    local_rows = slice(mesh.dp_rank * num_local_rows, (mesh.dp_rank + 1) * num_local_rows)
    return Batch(
        torch.stack((token_ids[local_rows, :-1].int(), token_ids[local_rows, 1:].int(), documents[local_rows])), {}
    )


def draw_document_indices(num_rows: int, seq_len: int, generator: torch.Generator) -> Int32[Tensor, "rows seq"]:
    """Index of the document within its row; documents follow one another through the rows as through a corpus."""
    tokens = num_rows * seq_len
    num_lengths = 16 + 4 * tokens // MEDIAN_DOCUMENT_TOKENS  # on average nine times too many
    lengths = (
        (math.log(MEDIAN_DOCUMENT_TOKENS) + DOCUMENT_LENGTH_SIGMA * torch.randn(num_lengths, generator=generator))
        .exp()
        .long()
        .clamp(min=1)
    )
    ends = lengths.cumsum(0)
    is_document_start = torch.zeros(tokens, dtype=torch.int32)
    is_document_start[ends[ends < tokens]] = 1
    is_document_start = is_document_start.view(num_rows, seq_len)
    is_document_start[:, 0] = 0
    return is_document_start.cumsum(1, dtype=torch.int32)
