"""Operations that are worth a kernel, each a pure function of tensors that computes the same on every device.

Nothing here depends on configs, meshes or models. README.md has the table of operations.
"""
