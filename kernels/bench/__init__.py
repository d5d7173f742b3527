"""How fast the operations run at the shapes of the shipped configs, next to plain torch: `python -m tandem.kernels.bench`.

`shapes` lists the sizes, `ops` has the inputs, the work and both implementations of each operation, `measure` reads time and
memory, and `compare` makes the rows. Comparisons with other projects' kernels are in `tests/rivals/kernels/`.
"""
