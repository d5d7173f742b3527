"""Everything that knows how tensors and rows are divided over ranks; the one door to megatron-core."""
