"""`tandem mup-check`: whether the parametrisation of a config does what muP promises, measured on proxies of other widths.

Three checks: `coordinates` (activations neither grow nor vanish with the width), `transfer` (the best learning rate stays),
`decay` (weight decay follows the learning rate). The laws are said in them, independently of the table in `models.mup` that the
proxies are built with. `proxies` makes and trains a proxy with the pieces of a real run, `measurement` compares, `plots` draws.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tandem.trainer import runtime
from tandem.trainer.config import TrainConfig, UserError, load_config
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.disk import atomic_write
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.run_folder import describe_environment
from tandem.trainer.runtime import launch_rank, launch_world_size
from tandem.trainer.tools.mup import coordinates, lr_transfer, weight_decay
from tandem.trainer.tools.mup.measurement import Measurement, first_failure, format_table, measurements_to_json
from tandem.trainer.tools.mup.proxies import proxy_config, require_mup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tandem mup-check`."""
    parser.add_argument("config", type=Path, help="YAML file of a run with muP, for example configs/mup-check.yaml")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--widths", default="64,128,256,512", help="widths of the proxies (default 64,128,256,512)")
    parser.add_argument("--checks", default=",".join(CHECKS), help=f"some of {','.join(CHECKS)} (default: all)")
    parser.add_argument(
        "--output", type=Path, help="folder for plots and result.json (default: mup in the run's folder)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the coordinate check (default 3)")
    parser.add_argument("--updates", type=int, default=4, help="updates of the coordinate check (default 4)")
    parser.add_argument("--tp-sizes", default="1,2", help="tensor-parallel sizes of the coordinate check (default 1,2)")
    parser.add_argument("--as-ranks", action="store_true", help=argparse.SUPPRESS)  # how `launch` calls us
    parser.add_argument(
        "--octaves", type=int, default=3, help="transfer: peaks from schedule.lr.peak / 2^N to * 2^N (default 3)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Verdict and plots lie in the output folder, the tables are printed. Returns 0 if every check passed, else 1."""
    config = load_config(arguments.config, arguments.overrides)
    request = CheckRequest.from_arguments(config, arguments)
    request.folder.mkdir(parents=True, exist_ok=True)
    if config.debug.deterministic:
        runtime.make_deterministic()
    if arguments.as_ranks:
        measure_coordinates(request, launch_world_size())
        return 0
    (request.folder / "result.json").unlink(missing_ok=True)
    measurements: list[Measurement] = []
    for check in request.checks:
        check_measurements = CHECKS[check](request)
        print(f"{format_table(check_measurements)}\n", flush=True)
        measurements += check_measurements
    settings = {"widths": request.widths, "checks": request.checks, "environment": describe_environment()}
    result = {
        **settings,
        "passed": not first_failure(measurements),
        "measurements": measurements_to_json(measurements),
        "config": asdict(config),
    }
    atomic_write(request.folder / "result.json", json.dumps(result, indent=1) + "\n")
    return print_summary(measurements, request)


@dataclass(frozen=True)
class CheckRequest:
    """What the command line asks for."""

    config: TrainConfig
    widths: list[int]
    checks: list[str]
    tp_sizes: list[int]
    folder: Path
    arguments: argparse.Namespace

    @staticmethod
    def from_arguments(config: TrainConfig, arguments: argparse.Namespace) -> "CheckRequest":
        """The request, once every proxy's config has been made. Raises: UserError for what cannot be done."""
        require_mup(config)
        if launch_world_size() > 1 and not arguments.as_ranks:
            raise UserError(
                f"ranks: {launch_world_size()}; tandem mup-check is one process, which starts the ranks it "
                f"needs; run it without "
                "a launcher"
            )
        widths, tp_sizes = (parse_sizes(getattr(arguments, name), name) for name in ("widths", "tp_sizes"))
        checks = arguments.checks.split(",")
        if unknown := [check for check in checks if check not in CHECKS]:
            raise UserError(
                f"--checks: {unknown[0]!r}; must be some of {', '.join(CHECKS)}, with commas; correct the name"
            )
        if len(widths) < 2:
            raise UserError(f"--widths: {arguments.widths}; an exponent needs at least two widths; add one")
        for name in ("seeds", "updates", "octaves"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name}: {getattr(arguments, name)}; must be at least 1; change it")
        if "decay" in checks:
            weight_decay.require_weight_decay(config)
        steps = Timeline(config.schedule).total_steps
        if "coordinates" in checks and arguments.updates > steps:
            raise UserError(f"--updates: {arguments.updates}; the schedule has {steps} steps; ask for fewer")
        devices = torch.cuda.device_count()
        if "coordinates" in checks and devices and max(tp_sizes) > devices:
            raise UserError(
                f"--tp-sizes: {arguments.tp_sizes}; this machine has {devices} GPUs and each rank takes one; "
                "name smaller sizes, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        for width in widths:
            for tp_size in tp_sizes if "coordinates" in checks else [1]:
                proxy_config(config, width, tp_size=tp_size)
        folder = arguments.output or Path(config.run.root) / config.run.name / "mup"
        return CheckRequest(config, widths, checks, tp_sizes, folder, arguments)


def parse_sizes(text: str, option: str) -> list[int]:
    """The distinct whole numbers of a list with commas, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(
            f"--{option.replace('_', '-')}: {text!r}; whole numbers with commas between; for example 64,128,256"
        )
    return found


def check_coordinates(request: CheckRequest) -> list[Measurement]:
    """Coordinates at every tensor-parallel size; sizes above 1 are launched as ranks of their own."""
    records = []
    for tp_size in request.tp_sizes:
        if tp_size == 1:
            measure_coordinates(request, 1)
        else:
            launch_coordinate_ranks(request, tp_size)
        records += json.loads(records_file(request, tp_size).read_text())
    from tandem.trainer.tools.mup.plots import draw_coordinates

    draw_coordinates(records, request.folder)
    return coordinates.judge(records)


def measure_coordinates(request: CheckRequest, tp_size: int) -> None:
    """The records of this launch's tensor-parallel size are in its file."""
    arguments = request.arguments
    proxy_configs = coordinates.proxy_configs(request.config, request.widths, arguments.seeds, tp_size)
    with mesh_context(tp_size) as mesh:
        records = coordinates.measure(proxy_configs, arguments.updates, mesh)
    if launch_rank() == 0:
        atomic_write(records_file(request, tp_size), json.dumps(records) + "\n")


def records_file(request: CheckRequest, tp_size: int) -> Path:
    return request.folder / f"coordinates-tp{tp_size}.json"


def launch_coordinate_ranks(request: CheckRequest, tp_size: int) -> None:
    """This command again as `tp_size` ranks on this machine, which measure coordinates and end.

    Raises: RuntimeError when they fail; what they said stands above it.
    """
    arguments, file = request.arguments, records_file(request, tp_size)
    file.unlink(missing_ok=True)
    launcher = [
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={tp_size}",
        "-m",
        "tandem.trainer",
        "mup-check",
    ]
    options = {
        "widths": arguments.widths, "checks": "coordinates", "tp-sizes": tp_size, "output": request.folder,
        "seeds": arguments.seeds, "updates": arguments.updates,
    }  # fmt: skip
    command = [sys.executable, "-m", *launcher, str(arguments.config), *arguments.overrides]
    command += [f"--{name}={value}" for name, value in options.items()] + ["--as-ranks"]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"the {tp_size} ranks of the coordinate check failed")


def check_transfer(request: CheckRequest) -> list[Measurement]:
    """The sweep, as far as it is not in the ledger yet."""
    trials = lr_transfer.build_trials(request.config, request.widths, request.arguments.octaves)
    with mesh_context(1) as mesh:
        losses = lr_transfer.run_sweep(trials, request.folder / "transfer.jsonl", mesh)
    from tandem.trainer.tools.mup.plots import draw_transfer

    draw_transfer(losses, request.folder)
    print(f"{lr_transfer.format_table(losses)}\n")
    return lr_transfer.judge(losses)


def check_decay(request: CheckRequest) -> list[Measurement]:
    """Decay at every width."""
    with mesh_context(1) as mesh:
        return weight_decay.measure(request.config, request.widths, mesh)


CHECKS: dict[str, Callable[[CheckRequest], list[Measurement]]] = {
    "coordinates": check_coordinates,
    "transfer": check_transfer,
    "decay": check_decay,
}


def print_summary(measurements: list[Measurement], request: CheckRequest) -> int:
    """One line for each check, the likely culprit where it failed; the exit code."""
    for check in request.checks:
        failure = first_failure(finding for finding in measurements if finding.check == check)
        print(f"FAILED {failure.failure_message()}" if failure else f"passed {check}")
    print(f"result and plots: {request.folder}")
    return 1 if first_failure(measurements) else 0
