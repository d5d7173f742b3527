"""Cuts the rows of a step from the streams of its sources, and builds their tensors and digests.

A row takes seq_len tokens of its source in reading order. The target of each token is the next token of the stream, so a change
of seq_len neither loses nor repeats a token. A rank's rows of one source are consecutive in reading order and are read in one
call, because a call costs more than reading its tokens. Tokens keep their stored type until a whole batch is converted to the
32-bit integers that are sent to the device.
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

from tandem.trainer.data.digests import Digests
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.data.token_stream import ShardRange, TokenStream

ROW_INDEX_STRUCT, SHARD_RANGE_STRUCT = Struct("<q"), Struct("<qqq")
HASH_MODULUS = 1 << 64
"""The modulus of sums of row hashes."""


@dataclass(frozen=True)
class Batch:
    """This data-parallel rank's rows of one global step."""

    packed: Int32[Tensor, "3 rows seq"]
    """Tokens, targets and document ids in one tensor, so that one copy moves them to the device; see `unpack_batch`."""
    cursor: dict[str, int]
    """The read position of each source after this step, the same on every rank."""
    digests: Digests | None = None
    """None for validation rows."""

    @property
    def tokens(self) -> Int64[Tensor, "rows seq"]:
        return self.packed[0].long()

    @property
    def targets(self) -> Int64[Tensor, "rows seq"]:
        """The next token of the stream for each position, even at the end of a row or block."""
        return self.packed[1].long()

    @property
    def document_ids(self) -> Int32[Tensor, "rows seq"]:
        """Index of each token's document within the row, from 0. EOS belongs to the document that it ends."""
        return self.packed[2]


def unpack_batch(
    packed: Int32[Tensor, "3 rows seq"],
) -> tuple[Int64[Tensor, "rows seq"], Int64[Tensor, "rows seq"], Int32[Tensor, "rows seq"]]:
    """Return tokens, targets and document ids as a model takes them, on the same device."""
    tokens, targets = packed[:2].long()
    return tokens, targets, packed[2]


class RowRun(NamedTuple):
    """Rows that are consecutive in the reading order of one source."""

    source: str
    position: int
    row_indices: np.ndarray
    """Their indices in the batch."""


class BatchPlan(NamedTuple):
    """The rows to read for a batch."""

    row_runs: list[RowRun]
    num_rows: int
    seq_len: int
    cursor: dict[str, int]
    first_row_index: int | None
    """Index of the batch's first row in the global step; None for rows without digests."""


class RowRunTokens(NamedTuple):
    """The tokens of a RowRun."""

    tokens_and_targets: np.ndarray
    """[2, rows, seq] tokens and their targets, in the stored type."""
    document_breaks: list[int]
    """Indices into the flattened tokens at which a new range of the stream begins."""
    shard_ranges: list[ShardRange]


class SourceReader:
    """Reads one split of a corpus in shuffled order, without the skipped shards of its stream."""

    def __init__(self, stream: TokenStream, order: BlockShuffle):
        self.stream, self._shuffle = stream, order
        self._prefetched_window: int | None = None

    def advance(self, position: int, num_tokens: int) -> int:
        """Return the position in reading order after the next `num_tokens` tokens that are not skipped."""
        if num_tokens and self.stream.skipped_shard_indices:
            return self._kept_ranges(position, num_tokens)[1]
        return position + num_tokens

    def skipped_tokens_before(self, position: int) -> int:
        """Return how many positions before this one are skipped."""
        if not self.stream.skipped_shard_indices:
            return 0
        tokens, (window, _) = self.stream.epoch_tokens, self._shuffle.window_range(position)
        num_epochs, epoch_offset = divmod(window, tokens)
        ranges = [(num_epochs * tokens, epoch_offset), *self._shuffle.stream_ranges(window, position - window)]
        kept_tokens = sum(count for run in ranges for _, count in self.stream.kept_ranges(*run))
        return position - num_epochs * self.stream.kept_epoch_tokens - kept_tokens

    def prefetch(self, position: int) -> None:
        """Prefetch the shards of the next window, once per window."""
        first, tokens = self._shuffle.window_range(position)
        if first != self._prefetched_window:
            self._prefetched_window = first
            self.stream.prefetch(first + tokens, tokens)

    def read_rows(self, position: int, num_rows: int, seq_len: int) -> RowRunTokens:
        """Read consecutive rows. The first begins at `position`."""
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
        """Return the stream ranges of the next `num_tokens` tokens that are not skipped, and the position after them."""
        if not self.stream.skipped_shard_indices:
            return self._shuffle.stream_ranges(position, num_tokens), position + num_tokens
        ranges: list[tuple[int, int]] = []
        wanted_tokens = num_tokens
        while True:
            for start, length in self._shuffle.stream_ranges(position, wanted_tokens):
                for first, kept in self.stream.kept_ranges(start, length):
                    taken_tokens = min(kept, num_tokens)
                    if ranges and sum(ranges[-1]) == first:  # split by this loop or by the end of a shard
                        ranges[-1] = (ranges[-1][0], ranges[-1][1] + taken_tokens)
                    else:
                        ranges.append((first, taken_tokens))
                    num_tokens -= taken_tokens
                    if not num_tokens:
                        return ranges, position + first + taken_tokens - start
                position += length
            wanted_tokens *= 2


def build_batch(readers: Mapping[str, SourceReader], plan: BatchPlan, eos_id: int) -> Batch:
    """Read the rows of the plan, and build their tensors and digests."""
    num_rows, seq_len = plan.num_rows, plan.seq_len
    parts = [readers[run.source].read_rows(run.position, len(run.row_indices), seq_len) for run in plan.row_runs]
    if len(parts) == 1:
        tokens_and_targets, document_breaks = parts[0].tokens_and_targets, parts[0].document_breaks
    else:
        dtype = np.result_type(*(part.tokens_and_targets for part in parts))
        tokens_and_targets, document_breaks = np.empty((2, num_rows, seq_len), dtype), []
        for run, part in zip(plan.row_runs, parts, strict=True):
            tokens_and_targets[:, run.row_indices] = part.tokens_and_targets
            for index in part.document_breaks:
                row, offset = divmod(index, seq_len)
                document_breaks.append(int(run.row_indices[row]) * seq_len + offset)
    packed = np.empty((3, num_rows, seq_len), np.int32)
    packed[:2] = tokens_and_targets
    packed[2] = document_ids_of(tokens_and_targets[0], document_breaks, eos_id)
    return Batch(torch.from_numpy(packed), plan.cursor, compute_digests(plan, parts, packed[0]))


def document_ids_of(tokens: np.ndarray, document_breaks: list[int], eos_id: int) -> np.ndarray:
    """Return the index of each token's document in its row. A new document begins after each EOS and at each break."""
    rows, seq_len = tokens.shape
    ends = tokens.reshape(-1) == eos_id
    ends[seq_len - 1 :: seq_len] = True
    for index in document_breaks:
        ends[index - 1] = True  # index 0 sets the last token of all, which is an end anyway
    last_indices = ends.nonzero()[0]
    lengths = last_indices.copy()
    lengths[0] += 1
    lengths[1:] -= last_indices[:-1]
    first_documents = last_indices.searchsorted(np.arange(0, tokens.size, seq_len))
    document_ids = np.arange(len(last_indices)) - first_documents[last_indices // seq_len]
    # Repeating each document's index is many times faster than a cumulative sum over the tokens.
    return document_ids.astype(np.int32).repeat(lengths).reshape(rows, seq_len)


def compute_digests(plan: BatchPlan, parts: list[RowRunTokens], tokens: np.ndarray) -> Digests | None:
    """Sum the hashes of the batch's rows, or return None for rows without digests.

    `tokens` are those of the finished batch, so the digest also detects a row that was moved to a wrong place after the
    read.
    """
    if plan.first_row_index is None:
        return None
    tokens_by_dtype = {dtype: tokens.astype(dtype) for dtype in {part.tokens_and_targets.dtype for part in parts}}
    ranges_digest = tokens_digest = 0
    for run, part in zip(plan.row_runs, parts, strict=True):
        stored_tokens, name = tokens_by_dtype[part.tokens_and_targets.dtype], run.source.encode() + b"\0"
        packed_ranges = pack_shard_ranges(part.shard_ranges, plan.seq_len)
        for row, row_ranges in zip(run.row_indices.tolist(), packed_ranges, strict=True):
            index = ROW_INDEX_STRUCT.pack(plan.first_row_index + row)
            ranges_digest += xxh3_64_intdigest(index + name + row_ranges)
            tokens_digest += xxh3_64_intdigest(index + stored_tokens[row].tobytes())
    return Digests(ranges_digest % HASH_MODULUS, tokens_digest % HASH_MODULUS)


def pack_shard_ranges(shard_ranges: list[ShardRange], seq_len: int) -> list[bytes]:
    """Cut the ranges at the ends of rows, and return the bytes of each row's ranges."""
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
    """Merge adjacent ranges."""
    merged = shard_ranges[:1]
    for shard, first, count in shard_ranges[1:]:
        last_shard, last_first, last_count = merged[-1]
        if shard == last_shard and first == last_first + last_count:
            merged[-1] = (shard, last_first, last_count + count)
        else:
            merged.append((shard, first, count))
    return merged
