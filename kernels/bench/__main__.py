"""The command `python -m tandem.kernels.bench [op ...]`."""

import sys
import time

import torch

from tandem.kernels.bench import command
from tandem.kernels.bench.compare import measure_shape
from tandem.kernels.bench.ops import OPERATIONS

PROGRAM = "tandem.kernels.bench"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 with one line on standard error if the request cannot be met."""
    start_time = time.monotonic()
    options = command.make_parser(PROGRAM, "Our operations next to plain torch.", OPERATIONS).parse_args(arguments)
    error = command.usage_error(options, OPERATIONS) or command.selection_error(options, OPERATIONS)
    if not error and options.device == "cuda" and not torch.cuda.is_available():
        error = "there is no GPU to measure; to run the harness itself on a CPU, use --device cpu --tokens N"
    if error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    device, deadline = torch.device(options.device), start_time + options.seconds
    ceilings = command.print_ceilings(device, options.json)
    for op in command.named_operations(options, OPERATIONS):
        for shape in command.select_shapes(op, options):
            rows = measure_shape(op, shape, device, ceilings, options.rival, deadline=deadline)
            command.print_rows(rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
