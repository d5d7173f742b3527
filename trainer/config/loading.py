"""Load the config of a run from its YAML file, and write it. Only this module uses omegaconf, which replaces interpolations.

An interpolation is `${section.field}`, `${HOME}`, or `${oc.env:NAME}` of an environment variable that the file lists under
`environment`. `\\${` is a plain `${`. The config of a run folder may come from somebody else: nothing in it is replaced.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tandem.trainer.config.addresses import hide_secrets_in_tree
from tandem.trainer.config.outside import NotAFile
from tandem.trainer.config.overrides import apply_override
from tandem.trainer.config.parsing import parse_dataclass
from tandem.trainer.config.rules import check_config
from tandem.trainer.config.sections import SHIPPED_CONFIGS, TrainConfig, UserError
from tandem.trainer.config.yaml_file import MAX_EXPANDED_VALUES, one_line, read_yaml

_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*(\$\{([^}]*)\}?)")
_FIELD = re.compile(r"\.*[A-Za-z0-9_]+(\.[A-Za-z0-9_]+|\[\d+\])*")
_ENVIRONMENT_VARIABLE = re.compile(r"oc\.env:([A-Za-z_][A-Za-z0-9_]*)(,[^${}]*)?")
_SECRET_WORDS = {
    "APIKEY", "AUTH", "COOKIE", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD",
    "PAT", "PW", "PWD", "SECRET", "SECRETS", "TOKEN", "TOKENS",
}  # fmt: skip
"""A word between underscores that marks an environment variable as secret, as in MYSQL_PWD."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a config file, apply dotted overrides (`optim.max_grad_norm=0.5`) in order, and check the result.

    If there is no file `path`, it may be the name of a config that ships, without `.yaml`.

    Raises: UserError, one line that names field, value, rule and remedy.
    """
    path = _find_config(Path(path))
    tree = _read_sections(path)
    sources_of_file = set(_sources(tree))
    for override in overrides or []:
        apply_override(tree, override)
    tree = _replace_interpolations(tree, path)
    if isinstance(tree.get("hardware"), str):
        tree["hardware"] = _load_hardware(path.parent, tree["hardware"])
    config = _parse_config(tree)
    # A file may list a source that only earlier steps read. An override that adds one is a typing error if nothing reads it.
    read_sources = {name for phase in config.schedule.phases for name in phase.mixture}
    for name in config.data.sources.keys() - sources_of_file - read_sources:
        known = ", ".join(sorted(sources_of_file)) or "none"
        rule = f"is not in the file, whose sources are {known}, and no phase reads it"
        raise UserError(f"override data.sources.{name}: {rule}; correct the name, or add it to the mixture of a phase")
    return config


def load_saved_config(path: Path) -> TrainConfig:
    """Read the config.yaml of a run folder. It is complete, so that no variable, file or other field is looked up.

    Raises: UserError.
    """
    return _parse_config(_read_sections(path))


def dump_config(config: TrainConfig) -> str:
    """Format the config as YAML that `load_saved_config` reads back into an equal config, apart from secrets in addresses."""
    return str(OmegaConf.to_yaml(OmegaConf.create(hide_secrets_in_tree(dataclasses.asdict(config)))))


def _parse_config(tree: dict[str, Any]) -> TrainConfig:
    config: TrainConfig = parse_dataclass(TrainConfig, tree, "")
    check_config(config)
    return config


def _sources(tree: dict[str, Any]) -> dict[str, Any]:
    """Return data.sources of a file that is not checked yet."""
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return sources if isinstance(sources, dict) else {}


def _find_config(path: Path) -> Path:
    try:
        is_named_file = path.exists() and not path.is_dir()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); correct the path or its permissions") from None
    if is_named_file:
        return path
    shipped = {file.stem: file for file in SHIPPED_CONFIGS.glob("*.yaml")}
    if str(path) not in shipped:
        names = ", ".join(sorted(shipped))
        raise UserError(f"{path}: no such config file; name one, or a config that ships: {names}")
    return shipped[str(path)]


def _read_sections(path: Path) -> dict[str, Any]:
    tree = _read(path)
    if not isinstance(tree, dict):
        fault = "is empty" if tree is None else f"contains a {type(tree).__name__}, not a mapping of sections"
        raise UserError(f"{path}: {fault}; start from {SHIPPED_CONFIGS / 'demo-btlm.yaml'}")
    return tree


def _load_hardware(config_folder: Path, name: str) -> Any:
    """Read the file of this name beside the config, or else the one that ships."""
    folders = [folder / "hardware" for folder in (SHIPPED_CONFIGS, config_folder)]
    files = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    if name not in files:
        known, place = ", ".join(sorted(files)) or "none", config_folder / "hardware"
        raise UserError(f"hardware: {name!r} has no file in {place}; known names: {known}; use one of them, or null")
    return _read(files[name])


def _read(path: Path) -> Any:
    try:
        return read_yaml(path)
    except NotAFile:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; restore it, or name another folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path or its permissions") from None


def _replace_interpolations(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the tree with the value of each interpolation. Raises: UserError naming the field."""
    allowed_variables = _allowed_variables(tree.pop("environment", []), path)
    size, num_interpolations = 0, 0
    for key_path, text in _texts(tree, ""):
        size += len(text)
        for match in _INTERPOLATION.finditer(text):
            num_interpolations += 1
            _check_interpolation(match[1], match[2], key_path, allowed_variables)
    # n references in levels of k multiply a value by at most k^(n/k), which is largest for k = e.
    if size * math.exp(num_interpolations / math.e) > MAX_EXPANDED_VALUES:
        rule = f"has {num_interpolations} interpolations of the form ${{...}}, which could multiply its size without bounds"
        raise UserError(f"{path}: {rule}; write the values out")
    if not any("${" in text for _key_path, text in _texts(tree, "")):
        return tree
    try:
        node = OmegaConf.create({"HOME": os.path.expanduser("~")} | tree)
        resolved = OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:  # RecursionError: a field that refers to itself
        raise UserError(f"{path}: cannot be read ({one_line(error)}); correct the file or the override") from None
    assert isinstance(resolved, dict)
    return {str(key): resolved[key] for key in tree}


def _check_interpolation(text: str, content: str, key_path: str, allowed_variables: list[str]) -> None:
    """Raises: UserError unless `text`, which is `${content}`, is a field, HOME or a listed variable."""
    subject = f"{key_path}: {text}"
    if content == "HOME":
        if os.path.expanduser("~") == "~":
            raise UserError(f"{subject} has no value, because this user has no home folder; write the path out")
        return
    if _FIELD.fullmatch(content) and text.endswith("}"):
        return
    variable = _ENVIRONMENT_VARIABLE.fullmatch(content)
    if not variable:
        known = "${section.field}, ${HOME} or ${oc.env:NAME}"
        raise UserError(f"{subject} is not supported; use {known}, or write \\${{ for a plain ${{")
    name = variable[1]
    if name not in allowed_variables:
        remedy = f"add `environment: [{name}]` to the file if its value may be written to the run folder"
        raise UserError(f"{subject} is not a variable that the file allows; {remedy}")
    if name not in os.environ and not variable[2]:
        raise UserError(f"{subject} is not set; set the variable, or write a default: ${{oc.env:{name},default}}")


def _allowed_variables(names: Any, path: Path) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        rule = "is not a list of names of environment variables"
        raise UserError(f"{path}: environment: {str(names)[:60]!r} {rule}; write environment: [NAME]")
    for name in names:
        if _SECRET_WORDS & set(name.upper().split("_")):
            rule = "looks like the name of a secret, whose value would be written to the run folder"
            raise UserError(f"{path}: environment: {name} {rule}; leave it out")
    return names


def _texts(tree: Any, key_path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every text in the tree."""
    if isinstance(tree, str):
        yield key_path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{key_path}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _texts(value, f"{key_path}[{index}]")
