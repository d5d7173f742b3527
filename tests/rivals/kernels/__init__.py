"""Our operations next to other projects' kernels, and what our kernels ask of a GPU: `python -m tests.rivals.kernels`.

This is for development and is not installed. It adds rivals, and the shapes that rivals publish, to the operations of
`tandem.kernels.bench`. `errors` compares with fp64, `resources` compiles for a Hopper GPU without one, `activation_memory`
counts the bytes kept for backward, and `attention_sweep` measures other tile sizes. Functions import the optional packages that
they call.
"""
