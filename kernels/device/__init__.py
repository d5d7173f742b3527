"""Triton kernels and their launchers: one module per operation, with the same name.

The module of that name one folder up has the operation's meaning and its autograd, and is the only caller. Kernels never
import it; `shared` has what both need. Arithmetic is fp32, stores are in the input's dtype, row offsets have 64 bits, and no
kernel writes to an input, except that the gradient of logits overwrites them. Block sizes follow rules written next to them;
nothing is autotuned.
"""
