"""The tokenizer of a corpus and the encoding of its documents.

`build` converts any kind of tokenizer to the text of a tokenizer.json, or trains one. `encoding.select_encoder` checks it and
selects the fastest library that agrees exactly with the reference, `tokenizers`, so the library does not affect the bytes of a
corpus. Each worker loads the encoder from the spec that `select_encoder` returns.
"""
