"""The operations worth a kernel of their own, each a pure function of tensors with one meaning everywhere.

Nothing here knows of configs, meshes or models. The table of operations is in README.md.
"""
