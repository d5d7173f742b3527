"""How fast training data is read beside other loaders, and how exactly they resume: `python -m tandem.data_prep.bench.loaders`.

`corpus` draws the tokens, `contestants` write them in their own form and read rows of it, `one` makes one measurement of one
contestant in a process of its own, `rounds` puts measurements together into rows. Rivals are imported by their own functions
and need not be installed.
"""
