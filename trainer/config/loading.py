"""Read and write the YAML file. Only this module uses omegaconf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tandem.trainer.config.parsing import parse_dataclass
from tandem.trainer.config.rules import check_config
from tandem.trainer.config.sections import SHIPPED_CONFIGS, TrainConfig, UserError


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a config file, apply dotted overrides (`optim.max_grad_norm=0.5`) in order, and check the result.

    If there is no file `path`, it may be the name of a config that ships, without `.yaml`.

    Raises: UserError, one line that names field, value, rule and remedy.
    """
    path = Path(path)
    if not path.is_file():
        shipped = {file.stem: file for file in SHIPPED_CONFIGS.glob("*.yaml")}
        if str(path) not in shipped:
            names = ", ".join(sorted(shipped))
            raise UserError(f"{path}: no such config file; name one, or a config that ships: {names}")
        path = shipped[str(path)]
    with _user_errors(path):
        node = OmegaConf.load(path)
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
        return OmegaConf.to_container(OmegaConf.load(files[name]))


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    """Raises: UserError instead of an error of omegaconf or PyYAML."""
    try:
        yield
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); correct the file or the override") from None
    except Exception as error:  # PyYAML's errors have no base class in common with omegaconf's
        if not type(error).__module__.startswith("yaml"):
            raise
        raise UserError(f"{path}: is not valid YAML ({_one_line(error)}); correct the file") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
