"""How fast the operations run at the shapes of the shipped configs, next to plain torch: `python -m tandem.kernels.bench`.

`shapes` lists the sizes, `ops` has the inputs, the work and the implementations of each operation, `measure` reads time and
memory, and `compare` makes a row of each measurement. Comparisons with other projects' kernels are not part of the package:
`tests/rivals/kernels/` extends this one.
"""
