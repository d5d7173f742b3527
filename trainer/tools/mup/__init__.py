"""`tandem mup-check`: measure on proxies of several widths whether a config keeps the promises of muP.

There are three checks. `coordinates`: activations neither grow nor vanish with the width. `lr_transfer`: the best learning rate
is the same at every width. `weight_decay`: decay follows the learning rate. Each check states its laws again and does not use
the table in `models.mup`, from which the proxies are built. `proxies` builds and trains a proxy, `measurement` compares numbers
with laws, and `plots` draws.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tandem.trainer.config import TrainConfig, UserError, load_config
from tandem.trainer.config.addresses import hide_secrets_in_tree
from tandem.trainer.config.outside import read_json, safe_print
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.disk import atomic_write
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.run_folder import describe_environment
from tandem.trainer.runtime import process
from tandem.trainer.runtime.launch import current_launch
from tandem.trainer.tools.mup import coordinates, lr_transfer, weight_decay
from tandem.trainer.tools.mup.measurement import Measurement, first_failure, format_table, measurements_to_json
from tandem.trainer.tools.mup.proxies import proxy_config, require_mup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    folder_help = "folder for the plots and result.json (default: the folder mup in the run folder)"
    add("config", type=Path, help="YAML file of a run with muP, or a shipped config, for example mup-check")
    add("overrides", nargs="*", help="section.field=value replaces this field of the file")
    add("--widths", default="64,128,256,512", help="widths of the small models to train (default: 64,128,256,512)")
    add("--checks", default=",".join(CHECKS), help=f"checks to run, from {','.join(CHECKS)} (default: all)")
    add("--output", type=Path, help=folder_help)
    add("--seeds", type=int, default=3, help="number of seeds of the coordinates check (default: 3)")
    add("--updates", type=int, default=4, help="number of updates of the coordinates check (default: 4)")
    add("--tp-sizes", default="1,2", help="tensor-parallel sizes of the coordinates check (default: 1,2)")
    add("--as-ranks", action="store_true", help=argparse.SUPPRESS)  # set by launch_coordinate_ranks
    add(
        "--octaves",
        type=int,
        default=3,
        help="N: the transfer check tries peaks from schedule.lr.peak / 2^N to schedule.lr.peak * 2^N (default: 3)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the checks, print their tables, and write plots and result.json. Returns 0 if every check passed, else 1."""
    config = load_config(arguments.config, arguments.overrides)
    request = CheckRequest.from_arguments(config, arguments)
    request.folder.mkdir(parents=True, exist_ok=True)
    if config.debug.deterministic:
        process.make_deterministic()
    if arguments.as_ranks:
        measure_coordinates(request, current_launch().world_size)
        return 0
    (request.folder / "result.json").unlink(missing_ok=True)
    measurements: list[Measurement] = []
    for check in request.checks:
        measurements += (found := CHECKS[check](request))
        safe_print(f"{format_table(found)}\n", flush=True)
    result = {
        "widths": request.widths, "checks": request.checks, "environment": describe_environment(),
        "passed": not first_failure(measurements), "measurements": measurements_to_json(measurements),
        "config": hide_secrets_in_tree(asdict(config)),
    }  # fmt: skip
    atomic_write(request.folder / "result.json", json.dumps(result, indent=1) + "\n")
    for check in request.checks:
        failure = first_failure(measurement for measurement in measurements if measurement.check == check)
        safe_print(f"FAILED {failure.failure_message()}" if failure else f"passed {check}")
    safe_print(f"result and plots: {request.folder}")
    return 1 if first_failure(measurements) else 0


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
        if unknown := [check for check in checks if check not in CHECKS]:
            raise UserError(f"--checks: {unknown[0]!r} is not a check; use some of {','.join(CHECKS)}")
        if len(widths) < 2:
            raise UserError(f"--widths: {arguments.widths} is one width, but the check needs at least two; add one")
        for name in ("seeds", "updates", "octaves"):
            if (number := getattr(arguments, name)) < 1:
                raise UserError(f"--{name}: {number} is less than 1; use 1 or more")
        if "decay" in checks and not config.optim.weight_decay:
            remedy = "use a value above 0, or leave decay out of --checks"
            raise UserError(f"optim.weight_decay: 0 leaves no decay to check; {remedy}")
        steps, devices = Timeline(config.schedule).total_steps, torch.cuda.device_count()
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


def check_coordinates(request: CheckRequest) -> list[Measurement]:
    """Check coordinates at every tensor-parallel size. Sizes above 1 run as separately launched ranks."""
    records = []
    for tp_size in request.tp_sizes:
        if tp_size == 1:
            measure_coordinates(request, 1)
        else:
            launch_coordinate_ranks(request, tp_size)
        records += read_json(request.records_file(tp_size))
    from tandem.trainer.tools.mup.plots import draw_coordinates

    draw_coordinates(records, request.folder)
    return coordinates.judge(records)


def measure_coordinates(request: CheckRequest, tp_size: int) -> None:
    """Measure coordinates on the launched ranks and write the records to their file."""
    arguments = request.arguments
    proxy_configs = coordinates.proxy_configs(request.config, request.widths, arguments.seeds, tp_size)
    with mesh_context(tp_size) as mesh:
        records = coordinates.measure(proxy_configs, arguments.updates, mesh)
    if current_launch().rank == 0:
        atomic_write(request.records_file(tp_size), json.dumps(records) + "\n")


def launch_coordinate_ranks(request: CheckRequest, tp_size: int) -> None:
    """Start this command as `tp_size` ranks on this machine that only measure coordinates.

    Raises: RuntimeError if they fail; their own output precedes it.
    """
    arguments = request.arguments
    request.records_file(tp_size).unlink(missing_ok=True)
    options = {
        "widths": arguments.widths, "checks": "coordinates", "tp-sizes": tp_size, "output": request.folder,
        "seeds": arguments.seeds, "updates": arguments.updates,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_size}",
        "-m", "tandem.trainer", "mup-check", str(arguments.config), *arguments.overrides,
        *(f"--{name}={value}" for name, value in options.items()), "--as-ranks",
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise RuntimeError(f"the {tp_size} ranks of the coordinate check failed")


def check_transfer(request: CheckRequest) -> list[Measurement]:
    """Run the part of the sweep that has no results yet, and check how the optimum moves."""
    trials = lr_transfer.build_trials(request.config, request.widths, request.arguments.octaves)
    with mesh_context(1) as mesh:
        losses = lr_transfer.run_sweep(trials, request.folder / "transfer.jsonl", mesh)
    from tandem.trainer.tools.mup.plots import draw_transfer

    draw_transfer(losses, request.folder)
    safe_print(f"{lr_transfer.format_table(losses)}\n")
    return lr_transfer.judge(losses)


def check_decay(request: CheckRequest) -> list[Measurement]:
    with mesh_context(1) as mesh:
        return weight_decay.measure(request.config, request.widths, mesh)


CHECKS = {"coordinates": check_coordinates, "transfer": check_transfer, "decay": check_decay}
