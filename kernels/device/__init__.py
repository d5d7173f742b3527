"""How the operations run on a GPU: Triton kernels and their launchers, one module for each operation, of the same name.

What an operation means, and where autograd meets it, is in the module of that name one folder up, which alone calls these. They
never import it; what both need is in `shared`. Arithmetic is fp32, stores are in the input's dtype, offsets of rows have 64
bits, nothing is written to an input. Sizes of blocks follow rules stated beside them and are never searched for at run time.
"""
