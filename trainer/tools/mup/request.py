"""The validated command line of `tandem mup-check`. Nothing here needs torch."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data import corpora
from tandem.trainer.runtime.launch import current_launch
from tandem.trainer.tools.mup.proxies import proxy_config, require_mup

CHECK_NAMES = ("coordinates", "transfer", "decay")


@dataclass(frozen=True)
class CheckRequest:
    """A validated command line."""

    config: TrainConfig
    widths: list[int]
    checks: list[str]
    tp_sizes: list[int]
    folder: Path
    arguments: argparse.Namespace

    @staticmethod
    def from_arguments(config: TrainConfig, arguments: argparse.Namespace) -> "CheckRequest":
        """Validate the options and the config of every proxy. Raises: UserError if a check cannot run."""
        require_mup(config)
        num_ranks = current_launch().world_size
        if num_ranks > 1 and not arguments.as_ranks:
            raise UserError(
                f"ranks: a launcher started {num_ranks}, but tandem mup-check is one process that starts the ranks "
                "it needs; run it without a launcher"
            )
        widths, tp_sizes = (parse_sizes(getattr(arguments, name), name) for name in ("widths", "tp_sizes"))
        checks = arguments.checks.split(",")
        if unknown := [check for check in checks if check not in CHECK_NAMES]:
            raise UserError(f"--checks: {unknown[0]!r} is not a check; use some of {','.join(CHECK_NAMES)}")
        if len(widths) < 2:
            raise UserError(f"--widths: {arguments.widths} is one width, but the check needs at least two; add one")
        for name in ("seeds", "updates", "octaves"):
            if (number := getattr(arguments, name)) < 1:
                raise UserError(f"--{name}: {number} is less than 1; use 1 or more")
        if "decay" in checks and not config.optim.weight_decay:
            remedy = "use a value above 0, or leave decay out of --checks"
            raise UserError(f"optim.weight_decay: 0 leaves no decay to check; {remedy}")
        steps, devices = Timeline(config.schedule).total_steps, current_launch().num_devices
        if "coordinates" in checks and arguments.updates > steps:
            raise UserError(f"--updates: {arguments.updates} is more than the schedule's {steps} steps; use fewer")
        if "coordinates" in checks and devices and max(tp_sizes) > devices:
            raise UserError(
                f"--tp-sizes: {arguments.tp_sizes} needs {max(tp_sizes)} GPUs, one for each rank, but this machine has "
                f"{devices}; use smaller sizes, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        for width in widths:
            for tp_size in tp_sizes if "coordinates" in checks else [1]:
                proxy_config(config, width, tp_size=tp_size)
        corpora.load_corpora(corpora.without_remote_addresses(config.data), config.model.vocab_size)
        folder = arguments.output or Path(config.run.root) / config.run.name / "mup"
        return CheckRequest(config, widths, checks, tp_sizes, folder, arguments)

    def records_file(self, tp_size: int) -> Path:
        return self.folder / f"coordinates-tp{tp_size}.json"


def parse_sizes(text: str, option: str) -> list[int]:
    """Parse positive integers separated by commas; return the distinct ones, ascending."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        name = option.replace("_", "-")
        raise UserError(f"--{name}: {text!r} is not a list of positive integers; separate them by commas, as in 64,128")
    return sizes
