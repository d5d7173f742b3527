"""Speed of our data loader against other loaders, and how exactly each resumes: `python -m tests.rivals.loaders`.

`synthetic_corpus` draws random tokens. `adapters` write them in each loader's format and read rows back. `measurement`
measures one loader in its own process. `comparison` combines measurements into rows. A rival that is not installed gets a
row with the reason.
"""
