"""BTLM for transformers 4.57 and 5 in plain torch. Copied into every export, so it does not import the trainer.

The model is GPT-2 (pre-norm, [in, out] matrices) with ALiBi instead of position embeddings, SwiGLU, and the multipliers of muP.

* The ALiBi bias and the softmax are computed in fp32 for any dtype of the weights. The bias is not multiplied by the attention
  scale.
* `config.alibi_scaling` divides the slopes. If the divisor depends on the length of a row, padding does not count, and cached
  keys and values keep the divisor they were computed with.
* Attention is computed in blocks of queries, so its memory is linear in the sequence length.
"""

import torch
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple

from .configuration_btlm import BTLMConfig

QUERY_BLOCK_SIZE = 512


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Return slopes, [heads, 1]: a geometric series. Heads beyond a power of two use every other slope of the next power."""
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / below) for head in range(below)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / below) for head in range(num_heads - below)]
    return torch.tensor(slopes).unsqueeze(-1)


def alibi_attention(query, key, value, slopes, visible, scale):
    """Return causal attention with an ALiBi bias, [rows, heads, queries, head_dim].

    The last query and the last key belong to the same token. `visible`, [rows, keys], is False for padding. `slopes` is
    [heads, 1], or [rows, heads, 1] if rows have different slopes.
    """
    cached = key.shape[2] - query.shape[2]
    key_position = torch.arange(key.shape[2], device=key.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    mixed = []
    for start in range(0, query.shape[2], QUERY_BLOCK_SIZE):
        block = query[:, :, start : start + QUERY_BLOCK_SIZE]
        position = torch.arange(block.shape[2], device=key.device) + cached + start
        distance = position[:, None] - key_position
        seen = distance >= 0
        if visible is not None:
            seen = seen & visible[:, None, None, :]
        scores = (block @ key.transpose(2, 3)).to(dtype) * scale - slopes[..., None] * distance
        weights = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1)
        mixed.append(weights.to(value.dtype) @ value)
    return torch.cat(mixed, dim=2)


class BTLMAlibi(nn.Module):
    """The ALiBi slopes, a buffer in the published checkpoint. They are not trained, and are not rounded if the model is."""

    def __init__(self, config: BTLMConfig) -> None:
        super().__init__()
        self.scaling = config.alibi_scaling
        self.register_buffer("slopes", alibi_slopes(config.n_head))

    def forward(self, keys: int, visible, dtype: torch.dtype):
        """Return the slopes for rows of `keys` tokens: [heads, 1], or [rows, heads, 1] if they depend on each row's length."""
        slopes = self.slopes
        if slopes.dtype != torch.float32:  # from_pretrained rounded them to the dtype of the weights
            slopes = alibi_slopes(len(slopes)).to(slopes.device)
        slopes = slopes.to(torch.promote_types(dtype, torch.float32))
        if self.scaling is None:
            return slopes
        if "factor" in self.scaling:
            return slopes / self.scaling["factor"]
        trained = self.scaling["train_seq_len"]
        if visible is None:
            return slopes / max(1.0, keys / trained)
        return slopes / (visible.sum(-1).to(slopes.dtype) / trained).clamp(min=1.0)[:, None, None]

    def _apply(self, fn, recurse=True):
        exact = self.slopes
        super()._apply(fn, recurse)
        if not exact.is_meta and not self.slopes.is_meta:
            self.slopes = exact.to(self.slopes.device)
        return self


class BTLMAttention(nn.Module):
    def __init__(self, config: BTLMConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.heads, self.head_dim = layer_index, config.n_head, config.n_embd // config.n_head
        self.scale = 1 / self.head_dim if config.mup_scale_qk_dot_by_d else self.head_dim**-0.5
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.ends_branch = True  # type: ignore[assignment]  # for _init_weights

    def forward(self, hidden, slopes, visible, cache):
        rows, length, width = hidden.shape
        qkv = self.c_attn(hidden).view(rows, length, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        mixed = alibi_attention(query, key, value, slopes, visible, self.scale)
        return self.c_proj(mixed.transpose(1, 2).reshape(rows, length, width))


class BTLMMLP(nn.Module):
    def __init__(self, config: BTLMConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_inner, config.n_embd)
        self.c_fc2 = Conv1D(config.n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_inner)
        self.c_proj.ends_branch = True  # type: ignore[assignment]  # for _init_weights

    def forward(self, hidden):
        return self.c_proj(self.c_fc(hidden) * nn.functional.silu(self.c_fc2(hidden)))


class BTLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: BTLMConfig, layer_index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = BTLMAttention(config, layer_index)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = BTLMMLP(config)

    def forward(self, hidden, slopes, visible, past_key_values=None):
        hidden = hidden + self.attn(self.ln_1(hidden), slopes, visible, past_key_values)
        return hidden + self.mlp(self.ln_2(hidden))


class BTLMPreTrainedModel(PreTrainedModel):
    config_class = BTLMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BTLMBlock"]  # noqa: RUF012  (transformers wants lists here)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # transformers 4.57 accepts only names of parameters here. It rounds the slopes, and BTLMAlibi computes them again.
    _keep_in_fp32_modules_strict = ["relative_pe"] if transformers.__version__ >= "5" else None
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module) -> None:
        """Initialize: muP scales the std of matrices by width; the last matrix of a residual branch is also scaled by depth."""
        if isinstance(module, Conv1D):
            std = self.config.initializer_range * self.config.mup_width_scale**0.5
            branches = 2 * self.config.n_layer if getattr(module, "ends_branch", False) else 1
            nn.init.normal_(module.weight, std=std / branches**0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, BTLMAlibi):
            module.slopes.copy_(alibi_slopes(self.config.n_head))


class BTLMModel(BTLMPreTrainedModel):
    def __init__(self, config: BTLMConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.relative_pe = BTLMAlibi(config)
        self.h = nn.ModuleList(BTLMBlock(config, index) for index in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None,
        output_hidden_states=None, **_,
    ):  # fmt: skip
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: give exactly one of the two")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is not None and attention_mask.dim() != 2:
            num_dims = attention_mask.dim()
            raise ValueError(f"attention_mask: has {num_dims} dimensions; use [rows, keys] with 1 for tokens")
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden * self.config.mup_embeddings_scale
        visible = None if attention_mask is None else attention_mask.bool()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        slopes = self.relative_pe(cached + hidden.shape[1], visible, hidden.dtype)
        states = ()
        for block in self.h:
            states += (hidden,) if output_hidden_states else ()
            hidden = block(hidden, slopes, visible, past_key_values=past_key_values)
        hidden = self.ln_f(hidden)
        states = (*states, hidden) if output_hidden_states else None
        return BaseModelOutputWithPast(hidden, past_key_values, states)


class BTLMLMHeadModel(BTLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: BTLMConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.transformer = BTLMModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_mup_param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict]:
        """Return muP's parameter groups for torch.optim.AdamW. The slopes are not trained, so they are in no group.

        * Matrices of the layers: learning rate lr * mup_width_scale, weight decay.
        * Embedding and head: learning rate lr, weight decay.
        * Biases and norms: learning rate lr, no weight decay.

        AdamW multiplies the weight decay by the group's learning rate. The published values are betas (0.9, 0.95) and eps 1e-8.
        """
        groups = [
            {"params": [], "lr": lr * self.config.mup_width_scale, "weight_decay": weight_decay},
            {"params": [], "lr": lr, "weight_decay": weight_decay},
            {"params": [], "lr": lr, "weight_decay": 0.0},
        ]
        for name, parameter in self.named_parameters():
            if name.endswith(".bias") or ".ln_" in name:
                group = 2
            else:
                group = 1 if name in ("transformer.wte.weight", "lm_head.weight") else 0
            groups[group]["params"].append(parameter)
        return groups

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, labels=None,
        use_cache=None, output_hidden_states=None, logits_to_keep=0, **others,
    ):  # fmt: skip
        """Return logits, and the loss if `labels` are given. Labels are `input_ids`, not shifted; -100 is ignored."""
        output = self.transformer(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        logits = logits * (self.config.mup_output_alpha * self.config.mup_width_scale)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss, logits, output.past_key_values, output.hidden_states)
