"""Complete configs of models small enough for a test, one for each family and variant, and rows to train them on."""

import torch
from torch import Tensor

from tandem.trainer.config import TrainConfig, parse_dataclass

BTLM = {
    "family": "btlm",
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_hidden_size": 170,
    "vocab_size": 500,
    "norm_eps": 1e-5,
    "init_std": 0.073,
    "init_truncation_sigmas": 2.0,
    "document_masking": False,
    "tie_word_embeddings": True,
}
STABLELM = {
    "family": "stablelm",
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 176,
    "vocab_size": 500,
    "norm_eps": 1e-5,
    "init_std": 0.06,
    "init_truncation_sigmas": 0.0,
    "document_masking": True,
    "partial_rotary_factor": 0.25,
    "rotary_base": 10_000.0,
    "parallel_residual": True,
    "qk_layernorm": True,
    "qkv_bias": False,
    "norm_bias": False,
    "tie_word_embeddings": False,
}
STABLELM_SEQUENTIAL = STABLELM | {
    "num_kv_heads": 4, "parallel_residual": False, "qk_layernorm": False, "qkv_bias": True, "norm_bias": True,
}  # fmt: skip
MUP = {"base_hidden_size": 32, "embedding_multiplier": 14.6, "output_multiplier": 2.22}
VARIANTS = {
    "btlm": (BTLM, MUP),
    "stablelm": (STABLELM, None),
    "stablelm_sequential": (STABLELM_SEQUENTIAL, None),
}

SEQ_LEN, GLOBAL_BATCH_SIZE = 32, 8


def config_tree(variant: str, **sections: dict) -> dict:
    """The plain YAML tree of a config; `sections` are laid over it, field by field."""
    model, mup = VARIANTS[variant]
    steps, tokens_per_step = 10, GLOBAL_BATCH_SIZE * SEQ_LEN
    sections_by_name: dict = {
        "run": {"name": "tiny", "seed": 1, "precision": "fp32"},
        "model": dict(model),
        "mup": mup,
        "schedule": {
            "tokens_per_step": tokens_per_step,
            "phases": [
                {
                    "name": "short",
                    "tokens": steps * tokens_per_step,
                    "seq_len": SEQ_LEN,
                    "global_batch_size": GLOBAL_BATCH_SIZE,
                    "micro_batch_size": 2,
                    "mixture": {"corpus": 1.0},
                },
            ],
            "lr": {"kind": "linear", "peak": 1e-2, "final": 1e-4, "warmup_steps": 2, "decay_steps": None},
        },
        "optim": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0},
        "parallel": {"tp_size": 1, "zero_stage": 1, "recompute": "none"},
        "data": {"sources": {"corpus": "unused"}},
        "evaluate": {"every_steps": 0, "tokens": 0},
        "checkpoint": {"every_steps": 0, "keep_last": 0},
        "log": {"wandb": "disabled"},
        "hardware": None,
    }
    for name, fields in sections.items():
        sections_by_name[name] = sections_by_name.get(name, {}) | fields
    return sections_by_name


def make_config(variant: str, **sections: dict) -> TrainConfig:
    """The config of `config_tree`."""
    found: TrainConfig = parse_dataclass(TrainConfig, config_tree(variant, **sections), "")
    return found


def global_batch(
    step: int, global_batch_size: int = GLOBAL_BATCH_SIZE, seq_len: int = SEQ_LEN, vocab_size: int = 500
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and documents of one global step, all ranks' rows; documents of about ten tokens.

    Low ids are frequent, as in text: with all ids alike the gradients would be sums that cancel, and mostly rounding.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = (vocab_size * torch.rand((global_batch_size, seq_len + 1), generator=generator) ** 4).long()
    ends = torch.rand((global_batch_size, seq_len), generator=generator) < 0.1
    documents = torch.cat([torch.zeros(global_batch_size, 1), ends.cumsum(1)[:, :-1]], dim=1).int()
    return tokens[:, :-1], tokens[:, 1:], documents
