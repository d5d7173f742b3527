"""Speed of `tandem prepare` against other pipelines, and a check that the token ids agree: `python -m tests.rivals.data_prep`.

`text_files` gathers real text from this machine into .jsonl.zst files. `pipelines` lists the pipelines and their commands.
`process_measurement` measures one command. `comparison` runs the rounds and computes medians. `baseline_script`,
`datatrove_pipeline` and `encode_in_memory` are the programs of the rivals. A rival that is not installed gets a row with the
reason.
"""
