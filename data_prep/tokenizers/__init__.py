"""The tokenizer of a corpus and the encoding of its documents.

`build` converts any kind of tokenizer to the text of a tokenizer.json. `encoding` encodes documents with the fastest
library that agrees exactly with the reference, `tokenizers`, so the library does not affect the bytes of a corpus.

    text = build.read_tokenizer(path, kind)              # kind: None, or one of build.TIKTOKEN_KINDS
    text = build.train_bpe(texts, vocab_size, eos_token)
    encoder = encoding.select_encoder(text, eos_token, error_prefix, sample_texts=texts)  # checks; prints a fallback
    encode = encoder.load()                              # in each worker; `encoder` is small and can be pickled
    tokens, lengths = encode(texts, locations)           # uint16 or uint32; lengths include the EOS of each document
"""
