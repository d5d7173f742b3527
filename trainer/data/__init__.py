"""From prepared corpora to the rows of a step.

Each module uses those before it: manifest, remote_files, shard_download, shard_cache, token_stream, shuffle, mixture, rows,
loader, damaged_shards. The ledger records what a run has read.
"""
