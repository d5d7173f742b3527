"""One tiny model for each combination of options that changes what is computed or stored, in odd sizes.

No value is the default of a class of transformers, so that a field which is not written is noticed. The rows that
`tokens` draws are longer than the `train_seq_len` of dynamic interpolation.
"""

from types import ModuleType

import torch
from torch import Tensor

from tandem.trainer.config import BTLM, AlibiScaling, Model, Mup, StableLM
from tests.reference import btlm, stablelm

_BOTH = {"depth": 2, "ffn_width": 54, "norm_epsilon": 3e-4, "init_std": 0.03, "init_truncation_sigmas": 2.0}
_STABLELM = _BOTH | {"family": "stablelm", "rotary_base": 500.0, "document_masking": True}
_BTLM = _BOTH | {"family": "btlm", "document_masking": False}

VARIANTS: dict[str, tuple[StableLM | BTLM, Mup | None]] = {
    "stablelm_12b": (
        StableLM(
            **_STABLELM, width=96, heads=6, kv_heads=2, vocab=101, rotary_fraction=0.25,
            parallel_residual=True, qk_norm=True, qkv_bias=False, norm_bias=False, tied_head=False,
        ),
        None,
    ),
    "stablelm_1_6b": (
        StableLM(
            **_STABLELM, width=48, heads=4, kv_heads=4, vocab=103, rotary_fraction=0.5,
            parallel_residual=False, qk_norm=False, qkv_bias=True, norm_bias=True, tied_head=False,
        ),
        None,
    ),
    "stablelm_tied": (
        StableLM(
            **_STABLELM, width=48, heads=6, kv_heads=3, vocab=97, rotary_fraction=1.0,
            parallel_residual=False, qk_norm=True, qkv_bias=True, norm_bias=False, tied_head=True,
        ),
        None,
    ),
    "btlm_mup": (BTLM(**_BTLM, width=48, heads=4, vocab=101, tied_head=True), Mup(16, 14.6, 2.22)),
    "btlm_6_heads": (BTLM(**_BTLM, width=48, heads=6, vocab=103, tied_head=True), Mup(32, 10.0, 1.5)),
    "btlm_untied": (BTLM(**_BTLM, width=40, heads=10, vocab=97, tied_head=False), None),
    "btlm_fixed": (
        BTLM(**_BTLM, width=48, heads=4, vocab=101, tied_head=True, alibi_scaling=AlibiScaling("linear", factor=2.5)),
        Mup(16, 14.6, 2.22),
    ),
    "btlm_dynamic": (
        BTLM(**_BTLM, width=40, heads=10, vocab=97, tied_head=False, alibi_scaling=AlibiScaling("linear", train_seq_len=24)),
        None,
    ),
}  # fmt: skip


def reference(model: Model) -> ModuleType:
    """The module with `logits`, `shapes` and `random_tensors` of the model's family."""
    return {"stablelm": stablelm, "btlm": btlm}[model.family]


def tokens(model: Model, *, rows: int = 2, length: int = 40, seed: int = 7) -> Tensor:
    return torch.randint(model.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}
