"""Prepared corpora as the rows of a global step: manifest, remote, cache, stream, order, mixture, rows, loader, damage, each
with what stands before it.
"""
