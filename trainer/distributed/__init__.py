"""How tensors and rows are divided over ranks. Only this package uses megatron-core and DeepSpeed."""
