"""How fast text becomes a corpus beside other ways, and that the ids are the same: `python -m tandem.data_prep.bench`.

`text` gathers real text from this machine into .jsonl.zst files, `ways` says who goes from them to ids on disk and by which
command, `launch` runs a command and says what it took, `rows` puts the figures together; `script` and `through_datatrove` are
rivals' programs, `alone` tokenizes and does nothing else. Rivals are imported by their own functions and need not be installed.
"""
