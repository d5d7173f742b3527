"""Text to the sharded, tokenized corpora that `trainer.data` reads: `prepare` writes, `verify` checks."""
