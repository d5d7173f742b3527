"""`tandem mup-check`: measure on proxies of several widths whether a config keeps the promises of muP.

There are three checks. `coordinates`: activations neither grow nor vanish with the width. `lr_transfer`: the best learning rate
is the same at every width. `weight_decay`: decay follows the learning rate. Each check states its laws again and does not use
the table in `models.mup`, from which the proxies are built. `request` validates the command, `checks` runs the checks,
`proxies` and `training` build and train a proxy, `measurement` compares numbers with laws, and `plots` draws.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tandem.trainer.config import load_config
from tandem.trainer.config.addresses import hide_secrets_in_tree
from tandem.trainer.config.outside import safe_print
from tandem.trainer.disk import atomic_write
from tandem.trainer.run_folder import describe_environment
from tandem.trainer.runtime import process
from tandem.trainer.runtime.launch import current_launch
from tandem.trainer.tools.mup.measurement import Measurement, first_failure, format_table, measurements_to_json
from tandem.trainer.tools.mup.request import CHECK_NAMES, CheckRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    folder_help = "folder for the plots and result.json (default: the folder mup in the run folder)"
    add("config", type=Path, help="YAML file of a run with muP, or a shipped config, for example mup-check")
    add("overrides", nargs="*", help="section.field=value replaces this field of the file")
    add("--widths", default="64,128,256,512", help="widths of the small models to train (default: 64,128,256,512)")
    add("--checks", default=",".join(CHECK_NAMES), help=f"checks to run, from {','.join(CHECK_NAMES)} (default: all)")
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
    # Imported here because it imports torch, which a refusal does not need.
    from tandem.trainer.tools.mup.checks import CHECKS, measure_coordinates

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
