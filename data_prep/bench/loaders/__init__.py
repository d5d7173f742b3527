"""How fast training data is read beside other loaders, and how exactly they resume: `python -m tandem.data_prep.bench.loaders`.

`synthetic_corpus` draws the tokens, `adapters` write them in their own form and read rows of it, `measurement` makes one
measurement of one loader in a process of its own, `comparison` puts measurements together into rows. Rivals are imported by
their own functions and need not be installed.
"""
