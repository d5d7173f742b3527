"""Text to the sharded, tokenized corpora that `tandem.trainer.data` reads: `prepare` writes, `verify` checks."""
