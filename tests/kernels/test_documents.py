"""Where documents start."""

import torch

from tandem.kernels.documents import document_starts


def test_every_token_knows_where_its_document_starts():
    """Positions minus the start restart with every document."""
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4]], dtype=torch.int32)
    found = document_starts(documents)
    assert found.dtype == torch.int32
    assert found.tolist() == [[0, 0, 0, 3, 4, 4], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4]]
    assert (torch.arange(6) - found).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]]


def test_a_document_is_a_run_of_one_index():
    """Padding before a text has a negative id. An id that returns later is another document."""
    assert document_starts(torch.tensor([[-1, -1, 0, 0, -1, 0]])).tolist() == [[0, 0, 2, 2, 4, 5]]
