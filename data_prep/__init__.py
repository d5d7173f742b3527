"""Turn text into the sharded, tokenized corpora that `tandem.trainer.data` reads: `prepare` writes and `verify` checks them."""
