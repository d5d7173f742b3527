"""Complete configs of models small enough for a test, one for each family and variant, and rows to train them on."""

import torch
from torch import Tensor

from tandem.trainer.config import RunConfig, section_from

BTLM = {
    "family": "btlm", "width": 64, "depth": 2, "heads": 4, "ffn_width": 170, "vocab": 500, "norm_epsilon": 1e-5,
    "init_std": 0.073, "init_truncation_sigmas": 2.0, "document_masking": False, "tied_head": True,
}  # fmt: skip
STABLELM = {
    "family": "stablelm", "width": 64, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_width": 176, "vocab": 500,
    "norm_epsilon": 1e-5, "init_std": 0.06, "init_truncation_sigmas": 0.0, "document_masking": True,
    "rotary_fraction": 0.25, "rotary_base": 10_000.0, "parallel_residual": True, "qk_norm": True, "qkv_bias": False,
    "norm_bias": False, "tied_head": False,
}  # fmt: skip
STABLELM_SEQUENTIAL = STABLELM | {
    "kv_heads": 4, "parallel_residual": False, "qk_norm": False, "qkv_bias": True, "norm_bias": True,
}  # fmt: skip
MUP = {"base_width": 32, "embedding_multiplier": 14.6, "output_multiplier": 2.22}
VARIANTS = {
    "btlm": (BTLM, MUP),
    "stablelm": (STABLELM, None),
    "stablelm_sequential": (STABLELM_SEQUENTIAL, None),
}

SEQ_LEN, ROWS = 32, 8


def tree(variant: str, **sections: dict) -> dict:
    """The plain YAML tree of a config; `sections` are laid over it, field by field."""
    model, mup = VARIANTS[variant]
    steps, batch_tokens = 10, ROWS * SEQ_LEN
    found: dict = {
        "run": {"name": "tiny", "seed": 1, "precision": "fp32"},
        "model": dict(model),
        "mup": mup,
        "schedule": {
            "batch_tokens": batch_tokens,
            "phases": [
                {"name": "short", "tokens": steps * batch_tokens, "seq_len": SEQ_LEN, "rows": ROWS, "micro_rows": 2,
                 "mixture": {"corpus": 1.0}},
            ],
            "lr": {"kind": "linear", "peak": 1e-2, "final": 1e-4, "warmup_steps": 2, "decay_steps": None},
        },
        "optim": {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
        "parallel": {"tp_size": 1, "zero_stage": 1, "recompute": "none"},
        "data": {"sources": {"corpus": "unused"}},
        "evaluate": {"every_steps": 0, "tokens": 0},
        "checkpoint": {"every_steps": 0, "keep": 0},
        "log": {"wandb": "disabled"},
        "hardware": None,
    }  # fmt: skip
    for name, fields in sections.items():
        found[name] = found.get(name, {}) | fields
    return found


def config(variant: str, **sections: dict) -> RunConfig:
    """The config of `tree`."""
    found: RunConfig = section_from(RunConfig, tree(variant, **sections), "")
    return found


def rows(step: int, num_rows: int = ROWS, seq_len: int = SEQ_LEN, vocab: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and documents of one global step, all ranks' rows; documents of about ten tokens.

    Low ids are frequent, as in text: with all ids alike the gradients would be sums that cancel, and mostly rounding.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = (vocab * torch.rand((num_rows, seq_len + 1), generator=generator) ** 4).long()
    ends = torch.rand((num_rows, seq_len), generator=generator) < 0.1
    documents = torch.cat([torch.zeros(num_rows, 1), ends.cumsum(1)[:, :-1]], dim=1).int()
    return tokens[:, :-1], tokens[:, 1:], documents
