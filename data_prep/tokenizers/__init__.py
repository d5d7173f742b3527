"""The tokenizer of a corpus and the encoding of its documents.

`build` gives the one form a tokenizer has here, the text of a tokenizer.json, from any of the forms it comes in;
`encoding` turns documents into tokens with the fastest library that is exactly equal to the reference, `tokenizers`.
The one idea: the library can never show in the bytes of a corpus, so it is free to change.

    text = build.read(path, kind)                        # kind: None, or one of build.KINDS
    text = build.train(texts, vocab, eos)
    encoder = encoding.encoder(text, eos, where, library="auto", sample=texts)   # checked; prints a line if it falls back
    encode = encoder.load()                              # in each worker; the encoder itself is small and pickles
    tokens, lengths = encode(texts, places)              # uint16 or uint32; EOS ends each document and is counted
"""
