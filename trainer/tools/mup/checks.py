"""Run the checks of `tandem mup-check` on the ranks that they need."""

import json
import subprocess
import sys

from tandem.trainer.config.outside import read_json, safe_print
from tandem.trainer.disk import atomic_write
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.runtime.launch import current_launch
from tandem.trainer.tools.mup import coordinates, lr_transfer, weight_decay
from tandem.trainer.tools.mup.measurement import Measurement
from tandem.trainer.tools.mup.request import CHECK_NAMES, CheckRequest


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


CHECKS = dict(zip(CHECK_NAMES, (check_coordinates, check_transfer, check_decay), strict=True))
