"""How fast the operations are beside their rivals, and what kernels ask of a multiprocessor: `python -m tandem.kernels.bench`.

`shapes` says at which sizes, `ops` what is measured against whom, `measure` how time and memory are read, `compare` puts the
three together into rows, `resources` compiles without a GPU. Rivals are imported by the functions that call them and need not
be installed.
"""
