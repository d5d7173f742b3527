"""How fast text becomes a corpus beside other ways, and that the ids are the same: `python -m tandem.data_prep.bench`.

`text_files` gathers real text from this machine into .jsonl.zst files, `pipelines` says who goes from them to ids on disk and
by which command, `process_measurement` runs a command and says what it took, `comparison` puts the figures together;
`baseline_script` and `datatrove_pipeline` are rivals' programs, `encode_in_memory` tokenizes and does nothing else. Rivals are
imported by their own functions and need not be installed.
"""
