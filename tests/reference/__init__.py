"""The two families once more, in the simplest torch: what the trainer and its exports are compared with."""
