"""Use an export as its users do, with whichever transformers is imported, and return what it computed.

As a program (`python use_export.py FOLDER`, with another version first on PYTHONPATH) it prints the same as JSON.
"""

import json
import sys
import tempfile

TEXTS = ("the house", "  a  cat\n\nand 123 é漢", "<|endoftext|>the", "")


def use_export(folder: str) -> dict:
    """Load, compute, generate with and without cache, pad, save and load again, run a pipeline."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    load = {"trust_remote_code": True, "dtype": torch.float32, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    rows = torch.arange(40).view(2, 20) % model.config.vocab_size
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits = model(rows).logits
    cached, uncached = (model.generate(rows, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)

    tokenizer.padding_side = "left"
    batch = tokenizer(["the house", "a cat and the house"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    alone = model.generate(**tokenizer(["the house"], return_tensors="pt"), **options)
    assert torch.equal(model.generate(**batch, **options)[0][-8:], alone[0][-8:])

    rounded = AutoModelForCausalLM.from_pretrained(folder, **load | {"dtype": torch.bfloat16})
    with torch.no_grad():
        rounded_logits = rounded(rows).logits
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        again = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
        assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        with torch.no_grad():
            assert torch.equal(AutoModelForCausalLM.from_pretrained(saved, **load).eval()(rows).logits, logits)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    roles = ("bos_token_id", "eos_token_id")
    return {
        "version": transformers.__version__,
        "logits": logits.double().sum().item(),
        "rounded_logits": rounded_logits.double().sum().item(),
        "generated": cached.tolist(),
        "text": generator("the house", **options)[0]["generated_text"],
        "tokens": [tokenizer(text).input_ids for text in TEXTS],
        "is_tied": model.config.tie_word_embeddings,
        "token_ids": [
            [getattr(each, role) for role in roles] for each in (model.config, model.generation_config, tokenizer)
        ],
        "pad": [model.generation_config.pad_token_id, tokenizer.pad_token_id],
        "length": tokenizer.model_max_length,
    }


if __name__ == "__main__":
    print(json.dumps(use_export(sys.argv[1])))
