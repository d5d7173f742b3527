"""Read config.json of a Hugging Face folder strictly: every key is read, known to have no effect, or must have the one value
that we support. Any other key may change what the weights compute, so it is refused.

`stablelm` and `btlm` list the keys of their families.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from tandem.trainer.config import UserError, parse_dataclass
from tandem.trainer.config.constraints import Range
from tandem.trainer.config.parsing import FieldError

Count = Annotated[int, Range(at_least=1)]
Positive = Annotated[float, Range(above=0, at_most=1e9)]
REMEDY = "correct config.json, or choose another folder"
UNKNOWN_REMEDY = (
    "if the model computes the same without it, remove it from config.json; otherwise choose another folder"
)

KEYS_WITHOUT_EFFECT = {
    "say how the folder was made": (
        "_commit_hash", "_name_or_path", "auto_map", "finetuning_task", "name_or_path", "neftune_noise_alpha",
        "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
    ),
    "select code or a form of the output, not the values": (
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_flash_attn_2_enabled",
        "attn_implementation", "chunk_size_feed_forward", "experts_implementation", "gradient_checkpointing", "is_decoder",
        "keys_to_ignore_at_inference", "output_attentions", "output_hidden_states", "pretraining_tp", "return_dict",
        "tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache", "use_flash_attention", "use_flash_attention_2",
        "use_return_dict",
    ),
    "belong to text generation": (
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
        "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    ),
    "belong to encoders, classifiers or tokenizers": (
        "cross_attention_hidden_size", "decoder_start_token_id", "id2label", "label2id", "model_max_length", "num_labels",
        "problem_type",
        "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
        "summary_use_proj", "task_specific_params", "tie_encoder_decoder", "tokenizer_class",
    ),
}  # fmt: skip
"""Keys of transformers 4 and 5, of GPT-2's config and of common tools, which do not change the logits of our models."""
_IGNORED = frozenset(key for keys in KEYS_WITHOUT_EFFECT.values() for key in keys)

FIXED_FIELDS: dict[str, Any] = {
    "add_cross_attention": False, "attention_bias": False, "is_causal": True, "is_encoder_decoder": False, "mlp_bias": False,
    "pruned_heads": {}, "text_config": {},
}  # fmt: skip
"""Keys of both families for which we support only one value."""


@dataclass(frozen=True)
class ExtraFields:
    """The fields that the published schema lacks. The defaults are for folders that we did not export."""

    init_truncation_sigmas: Annotated[float, Range(at_least=0)] = 0.0
    document_masking: bool = False


@dataclass(frozen=True, kw_only=True)
class SharedFields:
    """The keys of both families that are read. The names are the published ones."""

    model_type: str
    architectures: list[str] | None = None
    dtype: str | None = None
    vocab_size: Count
    initializer_range: Annotated[float, Range(at_least=0)] = 0.02
    bos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: Any = None
    unk_token_id: Any = None
    tandem: ExtraFields = ExtraFields()
    aliases: dict[str, str] = field(default_factory=dict)
    """Name of a field -> the other name under which config.json has it. This is not a key of the file."""

    def key(self, name: str) -> str:
        """Return the key under which config.json has a field."""
        return self.aliases.get(name, name)


def parse_config(tree: dict[str, Any], path: Path, family: Any) -> Any:
    """Convert config.json into `family.Fields`. A key that is null is like one that is absent.

    Raises: UserError if a key is unknown, has a value that we do not support, or contradicts another key.
    """
    tree = {key: value for key, value in tree.items() if value is not None and key not in _IGNORED}
    if found := tree.pop("quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UserError(f"{path}: quantization_config is {method!r}, but only weights that are not quantized can be read; "
                        "choose the folder of the original weights")  # fmt: skip
    classes = tree.get("architectures")
    if wrong := [name for name in classes if name not in family.ARCHITECTURES] if isinstance(classes, list) else []:
        raise UserError(
            f"{path}: architectures is {wrong[0]!r}, but model_type is {tree['model_type']!r}, whose classes are "
            f"{', '.join(family.ARCHITECTURES)}; {REMEDY}"
        )
    aliases: dict[str, str] = {}
    for alias, name in (*family.ALIASES.items(), ("torch_dtype", "dtype"), *family.DUPLICATES.items()):
        if alias not in tree or (alias in family.DUPLICATES and name not in tree):
            continue
        value = tree.pop(alias)
        if name == "dtype" and isinstance(value, str):
            value = value.removeprefix("torch.")
        if name not in tree:
            aliases[name] = alias
        if tree.setdefault(name, value) != value:
            raise UserError(
                f"{path}: {alias} is {value!r}, but {aliases.get(name, name)} is {tree[name]!r}, and both mean the same; "
                "remove the wrong one"
            )
    _check_layer_types(tree.pop("layer_types", None), tree, family.MODEL_FIELDS["num_layers"], aliases, path)
    for name, supported in (FIXED_FIELDS | family.FIXED_FIELDS).items():
        if name not in tree:
            continue
        value = tree.pop(name)
        if value != supported or isinstance(value, bool) != isinstance(supported, bool):  # True equals 1.0
            raise UserError(f"{path}: {name} is {value!r}, but only {supported!r} is supported; choose another folder")
    known = family.Fields.__dataclass_fields__.keys() - {"aliases"}
    if unknown := next((key for key in tree if key not in known), None):
        problem = f"{unknown} is {repr(tree[unknown])[:60]}, a field that is not known to have no effect"
        raise UserError(f"{path}: {problem}; {UNKNOWN_REMEDY}")
    return replace(parse_fields(family.Fields, tree, path, aliases), aliases=aliases)


def parse_fields(dataclass_type: Any, tree: Any, path: Path | str, keys: Mapping[str, str]) -> Any:
    """Convert fields that config.json states. `keys` maps names of the dataclass to the keys of the file that differ.

    Raises: UserError that names the key of the file.
    """
    try:
        return parse_dataclass(dataclass_type, tree, "")
    except FieldError as error:
        name = next((name for name in keys if re.match(rf"{name}\b", error.problem)), "")
        problem = keys.get(name, "") + error.problem.removeprefix(name)
        raise UserError(f"{path}: {problem}; {REMEDY}") from None


def check_divisible(path: Path, fields: SharedFields, *names: str) -> None:
    """Raises: UserError if a field is not a multiple of the next one: the width, the heads and the key-value heads."""
    for name, divisor in pairwise(names):
        number, by = getattr(fields, name), getattr(fields, divisor)
        if number % (by or 1):
            raise UserError(
                f"{path}: {fields.key(name)} is {number}, which is not a multiple of {fields.key(divisor)} {by}; {REMEDY}"
            )


def _check_layer_types(
    types: Any, tree: Mapping[str, Any], count_name: str, aliases: Mapping[str, str], path: Path
) -> None:
    """Raises: UserError unless `layer_types` is absent or says that each layer has full attention."""
    if types is None:
        return
    other = next((each for each in types if each != "full_attention"), None) if isinstance(types, list) else types
    if other is not None:
        raise UserError(
            f"{path}: layer_types has {repr(other)[:60]}, but only 'full_attention' is supported; choose another folder"
        )
    if len(types) != tree.get(count_name):
        layers = f"{aliases.get(count_name, count_name)} is {tree.get(count_name)}"
        raise UserError(f"{path}: layer_types has {len(types)} entries, but {layers}; {REMEDY}")
