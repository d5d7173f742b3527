"""Prepared corpora as the rows of a global step: manifest, remote_files, shard_download,
shard_cache, token_stream, shuffle, mixture, rows, loader, damaged_shards, each with what stands before it. The ledger says what
a run was fed.
"""
