"""What a save and a start cost the training: `checkpoint_save` beside torch.distributed.checkpoint, `startup_time` by part."""
