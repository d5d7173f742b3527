"""Synthetic rows: a function of seed, names and step, of which each data-parallel rank takes its slice, as with a corpus.

Token ids are uniform over the whole vocabulary, so no gradient row of the embedding is left out. Where the model masks
documents their lengths are drawn too, since attention costs what they make it cost; elsewhere a row is one document.
"""

import hashlib
import math

import torch
from jaxtyping import Int32
from torch import Tensor

from tandem.trainer.config import Phase, RunConfig
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.mesh import Mesh

MEDIAN_TOKENS, SIGMA = 450, 1.3
"""Log-normal lengths of documents: many short, a few of many rows, 1,050 tokens on average, as web text has it (choice)."""


def drawn(config: RunConfig, phase: Phase, step: int, mesh: Mesh) -> Batch:
    """This rank's rows of global step `step` of the phase."""
    digest = hashlib.sha256(f"{config.run.seed}/bench/{config.run.name}/{phase.name}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    read = torch.randint(config.model.vocab, (phase.rows, phase.seq_len + 1), generator=generator)
    documents = torch.zeros(phase.rows, phase.seq_len, dtype=torch.int32)
    if config.model.document_masking:
        documents = drawn_documents(phase.rows, phase.seq_len, generator)
    local = phase.rows // mesh.dp_size
    mine = slice(mesh.dp_rank * local, (mesh.dp_rank + 1) * local)
    return Batch(torch.stack((read[mine, :-1].int(), read[mine, 1:].int(), documents[mine])), {})


def drawn_documents(rows: int, seq_len: int, generator: torch.Generator) -> Int32[Tensor, "rows seq"]:
    """Index of the document within its row; documents follow one another through the rows as through a corpus."""
    tokens = rows * seq_len
    count = 16 + 4 * tokens // MEDIAN_TOKENS  # on average nine times too many
    lengths = (math.log(MEDIAN_TOKENS) + SIGMA * torch.randn(count, generator=generator)).exp().long().clamp(min=1)
    ends = lengths.cumsum(0)
    begins = torch.zeros(tokens, dtype=torch.int32)
    begins[ends[ends < tokens]] = 1
    begins = begins.view(rows, seq_len)
    begins[:, 0] = 0
    return begins.cumsum(1, dtype=torch.int32)
