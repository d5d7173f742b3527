"""The rows of one global step cut from the streams of its sources, their tensors, and the evidence of what was read.

A row of seq_len tokens takes seq_len tokens of its source in reading order; each token's target is the one after it in the
stream, so a change of seq_len re-cuts the same order and neither loses nor repeats a token. The rows that a rank has of one
source lie one after the other in its reading order: they are read as one span, since a call costs more than its tokens.
Everything stays in the stored type until all tokens of a batch are widened at once, to the 32 bits that the device is sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor
from xxhash import xxh3_64_intdigest

from tandem.trainer.data.digests import BatchDigests
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.data.token_stream import ShardRange, TokenStream

ROW_INDEX_STRUCT, SHARD_RANGE_STRUCT = Struct("<q"), Struct("<qqq")
HASH_MODULUS = 1 << 64
"""Hashes of rows are added modulo this."""


@dataclass(frozen=True)
class Batch:
    """This data-parallel rank's rows of one global step."""

    packed: Int32[Tensor, "3 rows seq"]
    """Tokens, targets and documents in one piece, as they go to the device; `unpack_batch` tells them apart."""
    cursor: dict[str, int]
    """Where each source stands in its reading order after this step; a fact of the run, not of a rank."""
    digests: BatchDigests | None = None
    """None for rows that nothing is learned from."""

    @property
    def tokens(self) -> Int64[Tensor, "rows seq"]:
        return self.packed[0].long()

    @property
    def targets(self) -> Int64[Tensor, "rows seq"]:
        """Next token of the stream at each position, also across the end of a row or block."""
        return self.packed[1].long()

    @property
    def document_ids(self) -> Int32[Tensor, "rows seq"]:
        """Index of the document within the row, from 0; EOS belongs to the document it ends."""
        return self.packed[2]


def unpack_batch(
    packed: Int32[Tensor, "3 rows seq"],
) -> tuple[Int64[Tensor, "rows seq"], Int64[Tensor, "rows seq"], Int32[Tensor, "rows seq"]]:
    """Tokens, targets and documents of these rows, as a model takes them, on the device of the rows."""
    tokens, targets = packed[:2].long()
    return tokens, targets, packed[2]


class RowRun(NamedTuple):
    """Rows of one source that follow one another in its reading order."""

    source: str
    position: int
    row_indices: np.ndarray
    """Where they stand in the batch."""


class BatchPlan(NamedTuple):
    """What is to be read for a batch."""

    row_runs: list[RowRun]
    num_rows: int
    seq_len: int
    cursor: dict[str, int]
    first_row_index: int | None
    """Index of the batch's first row in the global step; None for rows that need no evidence."""


class RowRunTokens(NamedTuple):
    """A span as it was read."""

    tokens_and_targets: np.ndarray
    """[2, rows, seq] tokens and their targets, in the stored type."""
    document_breaks: list[int]
    """Of the tokens one after the other, where a run of the stream begins."""
    shard_ranges: list[ShardRange]


class SourceReader:
    """One split of a corpus, in the order a run reads it; what its stream leaves out is stepped over."""

    def __init__(self, stream: TokenStream, order: BlockShuffle):
        self.stream, self._shuffle = stream, order
        self._prefetched_window: int | None = None

    def advance(self, position: int, num_tokens: int) -> int:
        """The position in reading order behind the `num_tokens` tokens from `position` on."""
        return (
            self._kept_ranges(position, num_tokens)[1]
            if num_tokens and self.stream.skipped_shard_indices
            else position + num_tokens
        )

    def skipped_tokens_before(self, position: int) -> int:
        """How many of the positions before this one are left out."""
        if not self.stream.skipped_shard_indices:
            return 0
        tokens, (window, _) = self.stream.epoch_tokens, self._shuffle.window_range(position)
        num_epochs, epoch_offset = divmod(window, tokens)
        ranges = [(num_epochs * tokens, epoch_offset), *self._shuffle.stream_ranges(window, position - window)]
        kept_tokens = sum(count for run in ranges for _, count in self.stream.kept_ranges(*run))
        return position - num_epochs * self.stream.kept_epoch_tokens - kept_tokens

    def prefetch(self, position: int) -> None:
        """The shards of the window behind the one around the position are made ready, once for each window."""
        first, tokens = self._shuffle.window_range(position)
        if first != self._prefetched_window:
            self._prefetched_window = first
            self.stream.prefetch(first + tokens, tokens)

    def read_rows(self, position: int, num_rows: int, seq_len: int) -> RowRunTokens:
        """`rows` rows, the first of which begins at `position`."""
        shard_ranges: list[ShardRange] = []
        tokens, targets, document_breaks, start = [], [], [], 0
        for first, count in self._kept_ranges(position, num_rows * seq_len)[0]:
            run_shard_ranges, run = self.stream.read_with_next_token(first, count)
            tokens.append(run[:-1])
            targets.append(run[1:])
            document_breaks.append(start)
            start += count
            shard_ranges += run_shard_ranges
        pair = np.empty((2, start), self.stream.dtype)
        np.concatenate(tokens, out=pair[0])
        np.concatenate(targets, out=pair[1])
        return RowRunTokens(pair.reshape(2, num_rows, seq_len), document_breaks, merge_shard_ranges(shard_ranges))

    def _kept_ranges(self, position: int, num_tokens: int) -> tuple[list[tuple[int, int]], int]:
        """The runs of the stream that the next `num_tokens` tokens are, and the position behind them."""
        if not self.stream.skipped_shard_indices:
            return self._shuffle.stream_ranges(position, num_tokens), position + num_tokens
        ranges: list[tuple[int, int]] = []
        wanted_tokens = num_tokens
        while True:
            for start, length in self._shuffle.stream_ranges(position, wanted_tokens):
                for first, kept in self.stream.kept_ranges(start, length):
                    taken_tokens = min(kept, num_tokens)
                    if ranges and sum(ranges[-1]) == first:  # asked for in two turns, or in two shards
                        ranges[-1] = (ranges[-1][0], ranges[-1][1] + taken_tokens)
                    else:
                        ranges.append((first, taken_tokens))
                    num_tokens -= taken_tokens
                    if not num_tokens:
                        return ranges, position + first + taken_tokens - start
                position += length
            wanted_tokens *= 2


def build_batch(sources: Mapping[str, SourceReader], plan: BatchPlan, eos_id: int) -> Batch:
    """The rows of the cut as tensors, and their evidence."""
    row_run_tokens = [
        sources[span.source].read_rows(span.position, len(span.row_indices), plan.seq_len) for span in plan.row_runs
    ]
    if len(row_run_tokens) == 1:
        tokens_and_targets, document_breaks = row_run_tokens[0].tokens_and_targets, row_run_tokens[0].document_breaks
    else:
        tokens_and_targets, document_breaks = (
            np.empty(
                (2, plan.num_rows, plan.seq_len), np.result_type(*(read.tokens_and_targets for read in row_run_tokens))
            ),
            [],
        )
        for span, read in zip(plan.row_runs, row_run_tokens, strict=True):
            tokens_and_targets[:, span.row_indices] = read.tokens_and_targets
            document_breaks += [
                int(span.row_indices[at // plan.seq_len]) * plan.seq_len + at % plan.seq_len
                for at in read.document_breaks
            ]
    packed = np.empty((3, plan.num_rows, plan.seq_len), np.int32)
    packed[:2] = tokens_and_targets
    packed[2] = document_ids_of(tokens_and_targets[0], document_breaks, eos_id)
    digests = (
        None if plan.first_row_index is None else compute_digests(plan, row_run_tokens, packed[0], plan.first_row_index)
    )
    return Batch(torch.from_numpy(packed), plan.cursor, digests)


def document_ids_of(tokens: np.ndarray, document_breaks: list[int], eos_id: int) -> np.ndarray:
    """The document of each token, counted in its row. What follows a break is another document, whatever stands before it."""
    rows, seq_len = tokens.shape
    ends = tokens.reshape(-1) == eos_id
    ends[seq_len - 1 :: seq_len] = True
    for at in document_breaks:
        ends[at - 1] = True  # before the first of all: the last of all, which is an end
    last_indices = ends.nonzero()[0]
    lengths = last_indices.copy()
    lengths[0] += 1
    lengths[1:] -= last_indices[:-1]
    first_documents = last_indices.searchsorted(np.arange(0, tokens.size, seq_len))
    document_ids = np.arange(len(last_indices)) - first_documents[last_indices // seq_len]
    # Every document's number repeated: many times as fast as a running sum over the tokens.
    return document_ids.astype(np.int32).repeat(lengths).reshape(rows, seq_len)


def compute_digests(
    plan: BatchPlan, row_run_tokens: list[RowRunTokens], tokens: np.ndarray, first_row_index: int
) -> BatchDigests:
    """The sums for the batch's tokens, which are the very ones it is fed: a row put in the wrong place since it was read
    is not the row that its place should have.
    """
    tokens_by_dtype = {
        dtype: tokens.astype(dtype) for dtype in {read.tokens_and_targets.dtype for read in row_run_tokens}
    }
    ranges_digest = tokens_digest = 0
    for span, read in zip(plan.row_runs, row_run_tokens, strict=True):
        stored_tokens, name = tokens_by_dtype[read.tokens_and_targets.dtype], span.source.encode() + b"\0"
        for row, pieces in zip(
            span.row_indices.tolist(), pack_shard_ranges(read.shard_ranges, plan.seq_len), strict=True
        ):
            index = ROW_INDEX_STRUCT.pack(first_row_index + row)
            ranges_digest += xxh3_64_intdigest(index + name + pieces)
            tokens_digest += xxh3_64_intdigest(index + stored_tokens[row].tobytes())
    return BatchDigests(ranges_digest % HASH_MODULUS, tokens_digest % HASH_MODULUS)


def pack_shard_ranges(shard_ranges: list[ShardRange], seq_len: int) -> list[bytes]:
    """The bytes of each row's pieces: these pieces, cut at the ends of rows."""
    rows: list[bytes] = []
    tokens_left = 0
    for shard, first, count in shard_ranges:
        end = first + count
        while first < end:
            if not tokens_left:
                rows.append(b"")
                tokens_left = seq_len
            num_tokens = min(end - first, tokens_left)
            rows[-1] += SHARD_RANGE_STRUCT.pack(shard, first, num_tokens)
            first += num_tokens
            tokens_left -= num_tokens
    return rows


def merge_shard_ranges(shard_ranges: list[ShardRange]) -> list[ShardRange]:
    """The same tokens in the fewest pieces."""
    merged = shard_ranges[:1]
    for shard, first, count in shard_ranges[1:]:
        last_shard, last_first, last_count = merged[-1]
        if shard == last_shard and first == last_first + last_count:
            merged[-1] = (shard, last_first, last_count + count)
        else:
            merged.append((shard, first, count))
    return merged
