"""One tiny model for each combination of options that changes what is computed or stored, in odd sizes.

No value is the default of a class of transformers, so that a field which is not written is noticed. The rows that
`tokens` draws are longer than the `train_seq_len` of dynamic interpolation.
"""

from types import ModuleType

import torch
from torch import Tensor

from tandem.trainer.config import AlibiScalingConfig, BTLMConfig, ModelConfig, MupConfig, StableLMConfig
from tests.reference import btlm, stablelm

_SHARED = {"num_layers": 2, "ffn_hidden_size": 54, "norm_eps": 3e-4, "init_std": 0.03, "init_truncation_sigmas": 2.0}
_STABLELM = _SHARED | {"family": "stablelm", "rotary_base": 500.0, "document_masking": True}
_BTLM = _SHARED | {"family": "btlm", "document_masking": False}

VARIANTS: dict[str, tuple[StableLMConfig | BTLMConfig, MupConfig | None]] = {
    "stablelm_12b": (
        StableLMConfig(
            **_STABLELM,
            hidden_size=96,
            num_heads=6,
            num_kv_heads=2,
            vocab_size=101,
            partial_rotary_factor=0.25,
            parallel_residual=True,
            qk_layernorm=True,
            qkv_bias=False,
            norm_bias=False,
            tie_word_embeddings=False,
        ),
        None,
    ),
    "stablelm_1_6b": (
        StableLMConfig(
            **_STABLELM,
            hidden_size=48,
            num_heads=4,
            num_kv_heads=4,
            vocab_size=103,
            partial_rotary_factor=0.5,
            parallel_residual=False,
            qk_layernorm=False,
            qkv_bias=True,
            norm_bias=True,
            tie_word_embeddings=False,
        ),
        None,
    ),
    "stablelm_tied": (
        StableLMConfig(
            **_STABLELM,
            hidden_size=48,
            num_heads=6,
            num_kv_heads=3,
            vocab_size=97,
            partial_rotary_factor=1.0,
            parallel_residual=False,
            qk_layernorm=True,
            qkv_bias=True,
            norm_bias=False,
            tie_word_embeddings=True,
        ),
        None,
    ),
    "btlm_mup": (
        BTLMConfig(**_BTLM, hidden_size=48, num_heads=4, vocab_size=101, tie_word_embeddings=True),
        MupConfig(16, 14.6, 2.22),
    ),
    "btlm_6_heads": (
        BTLMConfig(**_BTLM, hidden_size=48, num_heads=6, vocab_size=103, tie_word_embeddings=True),
        MupConfig(32, 10.0, 1.5),
    ),
    "btlm_fractional": (
        BTLMConfig(**_BTLM, hidden_size=40, num_heads=4, vocab_size=99, tie_word_embeddings=True),
        MupConfig(0.3 * 40 + 0.7, 6.5, 1.75, scale_qk_dot_by_d=False),
    ),
    "btlm_untied": (BTLMConfig(**_BTLM, hidden_size=40, num_heads=10, vocab_size=97, tie_word_embeddings=False), None),
    "btlm_fixed": (
        BTLMConfig(
            **_BTLM,
            hidden_size=48,
            num_heads=4,
            vocab_size=101,
            tie_word_embeddings=True,
            alibi_scaling=AlibiScalingConfig("linear", factor=2.5),
        ),
        MupConfig(16, 14.6, 2.22),
    ),
    "btlm_dynamic": (
        BTLMConfig(
            **_BTLM,
            hidden_size=40,
            num_heads=10,
            vocab_size=97,
            tie_word_embeddings=False,
            alibi_scaling=AlibiScalingConfig("linear", train_seq_len=24),
        ),
        None,
    ),
}

NOT_IN_TRANSFORMERS: tuple[str, ...] = ()
"""Variants that an export refuses, because the published class lacks one of their options."""
EXPORTED_VARIANTS = {name: case for name, case in VARIANTS.items() if name not in NOT_IN_TRANSFORMERS}


def reference_module(model: ModelConfig) -> ModuleType:
    """The module with `logits`, `shapes` and `random_tensors` of the model's family."""
    return {"stablelm": stablelm, "btlm": btlm}[model.family]


def random_tokens(model: ModelConfig, *, num_rows: int = 2, seq_len: int = 40, seed: int = 7) -> Tensor:
    return torch.randint(model.vocab_size, (num_rows, seq_len), generator=torch.Generator().manual_seed(seed))


def to_fp64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}
