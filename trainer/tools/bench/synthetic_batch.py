"""Draw synthetic rows that depend only on the seed, the names of run and phase, and the step.

As with a corpus, each data-parallel rank gets its slice of the rows. Token ids are uniform over the whole vocabulary, so every
row of the embedding gets a gradient. If the model masks documents, their lengths are drawn too, because the cost of attention
depends on them. Otherwise a row is one document.
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
"""Parameters of log-normal document lengths, as in web text: most are short, some have many rows, and the mean is 1,050 tokens
(choice)."""


def draw_batch(config: TrainConfig, phase: PhaseConfig, step: int, mesh: Mesh) -> Batch:
    """Draw this rank's rows of step `step`."""
    digest = hashlib.sha256(f"{config.run.seed}/bench/{config.run.name}/{phase.name}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rows, seq_len = phase.global_batch_size, phase.seq_len
    token_ids = torch.randint(config.model.vocab_size, (rows, seq_len + 1), generator=generator).int()
    documents = torch.zeros(rows, seq_len, dtype=torch.int32)
    if config.model.document_masking:
        documents = draw_document_indices(rows, seq_len, generator)
    local_rows = slice(mesh.dp_rank * rows // mesh.dp_size, (mesh.dp_rank + 1) * rows // mesh.dp_size)
    return Batch(torch.stack((token_ids[:, :-1], token_ids[:, 1:], documents))[:, local_rows].contiguous(), {})


def draw_document_indices(num_rows: int, seq_len: int, generator: torch.Generator) -> Int32[Tensor, "rows seq"]:
    """Return each token's document index within its row. Documents continue from one row to the next, as in a corpus."""
    num_tokens = num_rows * seq_len
    num_lengths = 16 + 4 * num_tokens // MEDIAN_DOCUMENT_TOKENS  # on average nine times as many as needed
    normal = torch.randn(num_lengths, generator=generator)
    lengths = (math.log(MEDIAN_DOCUMENT_TOKENS) + DOCUMENT_LENGTH_SIGMA * normal).exp().long().clamp(min=1)
    ends = lengths.cumsum(0)
    is_start = torch.zeros(num_tokens, dtype=torch.int32)
    is_start[ends[ends < num_tokens]] = 1
    is_start = is_start.view(num_rows, seq_len)
    is_start[:, 0] = 0
    return is_start.cumsum(1, dtype=torch.int32)
