"""Read and write the YAML file. Only this module uses omegaconf."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tandem.trainer.config.outside import NotAFile, read_file
from tandem.trainer.config.parsing import parse_dataclass
from tandem.trainer.config.rules import check_config
from tandem.trainer.config.sections import SHIPPED_CONFIGS, TrainConfig, UserError

MAX_YAML_BYTES = 1 << 20
"""Largest file. The shipped configs take 4 KB."""
MAX_EXPANDED_VALUES = 1 << 24
"""Largest number of values after aliases are replaced, and largest number of characters after interpolations are."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a config file, apply dotted overrides (`optim.max_grad_norm=0.5`) in order, and check the result.

    If there is no file `path`, it may be the name of a config that ships, without `.yaml`.

    Raises: UserError, one line that names field, value, rule and remedy.
    """
    path = Path(path)
    try:
        is_named_file = path.exists() and not path.is_dir()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path or its permissions") from None
    if not is_named_file:
        shipped = {file.stem: file for file in SHIPPED_CONFIGS.glob("*.yaml")}
        if str(path) not in shipped:
            names = ", ".join(sorted(shipped))
            raise UserError(f"{path}: no such config file; name one, or a config that ships: {names}")
        path = shipped[str(path)]
    with _user_errors(path):
        node = OmegaConf.load(_open_yaml(path))
        for override in overrides or []:
            key, equals, value = override.partition("=")
            if not key or not equals:
                example = "write section.field=value, for example optim.max_grad_norm=0.5"
                raise UserError(f"override {override!r}: has no field or no value; {example}")
            try:
                OmegaConf.update(node, key, OmegaConf.from_dotlist([f"value={value}"])["value"])
            except (IndexError, TypeError, ValueError) as error:
                raise UserError(f"override {override!r}: {_one_line(error)}; name an existing field") from None
        tree = OmegaConf.to_container(node, resolve=True)
    if not isinstance(tree, dict):
        found, complete = type(tree).__name__, SHIPPED_CONFIGS / "demo-btlm.yaml"
        raise UserError(f"{path}: contains a {found}, not a mapping of sections; start from {complete}")
    if isinstance(tree.get("hardware"), str):
        tree["hardware"] = _load_hardware(path.parent, tree["hardware"])
    config: TrainConfig = parse_dataclass(TrainConfig, tree, "")
    check_config(config)
    return config


def dump_config(config: TrainConfig) -> str:
    """Format the config as YAML that `load_config` reads back into an equal config."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))


def _load_hardware(config_folder: Path, name: str) -> Any:
    """Read the file of this name beside the config, or else the one that ships."""
    folders = [folder / "hardware" for folder in (SHIPPED_CONFIGS, config_folder)]
    files = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    if name not in files:
        known, place = ", ".join(sorted(files)) or "none", config_folder / "hardware"
        raise UserError(f"hardware: {name!r} has no file in {place}; known names: {known}; use one of them, or null")
    with _user_errors(files[name]):
        return OmegaConf.to_container(OmegaConf.load(_open_yaml(files[name])))


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    """Raises: UserError instead of an error of omegaconf or PyYAML."""
    try:
        yield
    except NotAFile:
        raise
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); correct the file or the override") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; correct the file or the override") from None
    except Exception as error:  # PyYAML's errors have no base class in common with omegaconf's
        is_value_error = isinstance(error, ValueError) and not isinstance(
            error, UserError
        )  # a number of too many digits
        if not is_value_error and not type(error).__module__.startswith("yaml"):
            raise
        raise UserError(f"{path}: is not valid YAML ({_one_line(error)}); correct the file") from None


def _open_yaml(path: Path) -> io.StringIO:
    """Read the file, and refuse one that would grow without bounds when aliases and interpolations are replaced.

    Raises: UserError.
    """
    content = read_file(path, MAX_YAML_BYTES).decode()
    num_interpolations = content.count("${")
    # n references in levels of k multiply a value by at most k^(n/k), which is largest for k = e.
    if len(content) * math.exp(num_interpolations / math.e) > MAX_EXPANDED_VALUES:
        rule = f"has {num_interpolations} interpolations of the form ${{...}}, which could multiply its size without bounds"
        raise UserError(f"{path}: {rule}; write the values out")
    if "*" in content and _count_values(yaml.compose(content, Loader=yaml.SafeLoader), {}) > MAX_EXPANDED_VALUES:
        raise UserError(f"{path}: has aliases (*name) that multiply its size without bounds; write the values out")
    return io.StringIO(content)


def _count_values(node: yaml.Node | None, counts: dict[int, int]) -> int:
    """Count the values below a node, those below an alias each time that it is used."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
