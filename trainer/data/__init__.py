"""Prepared corpora as the rows of a global step: manifest, stream, mixture, rows, loader, in this order."""
