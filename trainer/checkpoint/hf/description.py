"""Read what a Hugging Face folder says about its model: config.json, special tokens, longest row. Nothing here needs torch.

`config_fields` reads config.json, and `stablelm` and `btlm` map its fields to ours.
"""

import dataclasses
from pathlib import Path
from typing import Any

from tandem.trainer.checkpoint.hf import btlm, special_tokens, stablelm
from tandem.trainer.checkpoint.hf.config_fields import ExtraFields, SharedFields, parse_config, parse_fields
from tandem.trainer.checkpoint.hf.folder import read_json
from tandem.trainer.config import MODEL_CONFIGS, AnyModelConfig, MupConfig, UserError

FAMILY_MODULES: dict[str, Any] = {"stablelm": stablelm, "btlm": btlm}
MODEL_TYPES = FAMILY_MODULES | {"stablelm_epoch": stablelm}
"""The table of each model_type. stablelm_epoch is the name in the first revisions of Stable LM's folders."""
EXTRA_FIELDS_KEY = "tandem"
"""Key in config.json of the fields that the published schema lacks. It also identifies our exports."""
EXTRA_FIELD_DEFAULTS = dataclasses.asdict(ExtraFields())
"""The fields under that key, and their values for folders that we did not export."""


def read_model(folder: Path) -> tuple[AnyModelConfig, MupConfig | None]:
    """Return the model and the muP section that config.json describes. The weights may show that norms have biases.

    Raises: UserError if config.json is not valid, or not that of a supported model.
    """
    return parse_model(folder, read_json(folder / "config.json"))


def read_model_and_aliases(folder: Path) -> tuple[AnyModelConfig, MupConfig | None, dict[str, str]]:
    """Do `read_model`. Return also the published name of each field that config.json has under another one -> that one."""
    hf_config = read_json(folder / "config.json")
    return *parse_model(folder, hf_config), _parse_fields(folder, hf_config).aliases


def parse_model(folder: Path, hf_config: dict[str, Any]) -> tuple[AnyModelConfig, MupConfig | None]:
    """Return what `read_model` returns, for the content of the folder's config.json."""
    config_path, fields = str(folder / "config.json"), _parse_fields(folder, hf_config)
    model_tree, mup_tree = MODEL_TYPES[fields.model_type].from_hf_config(fields, folder / "config.json")
    model_tree |= dataclasses.asdict(fields.tandem)
    table = FAMILY_MODULES[model_tree["family"]]
    keys = {name: fields.key(published) for name, published in table.MODEL_FIELDS.items()}
    keys |= {name: f"{EXTRA_FIELDS_KEY}.{name}" for name in EXTRA_FIELD_DEFAULTS}
    model = parse_fields(MODEL_CONFIGS[model_tree["family"]], model_tree, config_path, keys)
    mup = parse_fields(MupConfig, mup_tree, config_path, table.MUP_FIELDS) if mup_tree else None
    return model, mup


def read_text_settings(folder: Path) -> tuple[str | None, int | None]:
    """Return the token that ends a document and the longest row's length. Each is None if the folder does not state it."""
    tokens, _ = read_special_tokens(folder)
    fields = _parse_fields(folder, read_json(folder / "config.json"))
    return tokens.get("eos_token"), getattr(fields, MODEL_TYPES[fields.model_type].MAX_SEQ_LEN_FIELD)


def read_special_tokens(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the special tokens (`bos_token`, ...) and their ids (`bos_token_id`, ...) that the folder states.

    Raises: UserError if two of its files contradict each other.
    """
    fields = _parse_fields(folder, read_json(folder / "config.json"))
    return special_tokens.read_special_tokens(folder, fields, special_tokens.read_tokenizer_tree(folder))


def _parse_fields(folder: Path, hf_config: dict[str, Any]) -> SharedFields:
    config_path, model_type = folder / "config.json", hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"{config_path}: model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}; name another folder"
        )
    fields: SharedFields = parse_config(hf_config, config_path, MODEL_TYPES[model_type])
    return fields
