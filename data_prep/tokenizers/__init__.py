"""The tokenizer of a corpus and the encoding of its documents.

`build` gives the one form a tokenizer has here, the text of a tokenizer.json, from any of the forms it comes in;
`encoding` turns documents into tokens with the fastest library that is exactly equal to the reference, `tokenizers`.
The one idea: the library can never show in the bytes of a corpus, so it is free to change.

    text = build.read_tokenizer(path, kind)              # kind: None, or one of build.TIKTOKEN_KINDS
    text = build.train_bpe(texts, vocab_size, eos_token)
    encoder = encoding.select_encoder(text, eos_token, error_prefix, sample_texts=texts)  # checked; says if it falls back
    encode = encoder.load()                              # in each worker; the encoder itself is small and pickles
    tokens, lengths = encode(texts, locations)           # uint16 or uint32; EOS ends each document and is counted
"""
