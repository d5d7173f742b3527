"""`tandem bench`: how fast a config trains here, by the run's own steps on synthetic rows: no corpus, no run folder.

Every step is `train.timed_step` on the engine that `setup.build_engine` makes: accumulation, reduction, clipping, ZeRO and
AdamW at the schedule's learning rate, timed as `tandem train` times it. `plan` says which steps, `rows` what they read,
`measure` makes them and one line of them; `parts` and `kinds` say where the time goes, in steps of their own.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path

from tandem.trainer.config import load
from tandem.trainer.metrics.throughput import measured_peak_flops
from tandem.trainer.tools.bench.plan import EVERY_PHASE, MICRO_BATCHES, planned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tandem bench`."""
    parser.add_argument("config", type=Path, help="YAML file of a run; its corpus is not needed")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--phase", metavar="NAME", help=f"phase to time, or {EVERY_PHASE} (default: the first)")
    parser.add_argument("--depth", type=int, help="layers, at the config's width (default: the config's)")
    parser.add_argument(
        "--rows", type=int, help=f"rows of a global step (default: {MICRO_BATCHES} forward passes on every replica)"
    )
    parser.add_argument("--micro-rows", type=int, help="rows in one forward pass (default: the phase's)")
    parser.add_argument("--warmup-steps", type=int, default=3, help="steps before those that count (default 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (default 10)")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE",
        help="make one more step under torch.profiler: its trace in FILE (small if it ends in .json.gz; with --phase all one "
        "for each phase, FILE-PHASE), a table by kind of operation on standard error, and kind_seconds in the JSON line",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Prints one JSON line for each phase on standard output, on rank 0; progress goes to standard error."""
    # Here, so that `figures` and --help, which measure nothing, need no torch.
    from tandem.trainer import runtime
    from tandem.trainer.config.schedule import Timeline
    from tandem.trainer.distributed.coordination import Agreement
    from tandem.trainer.distributed.mesh import launched_world_size, started
    from tandem.trainer.guard import Guard
    from tandem.trainer.run_state import Stepper
    from tandem.trainer.startup import build_engine
    from tandem.trainer.tools.bench.measure import measure

    config, plans = planned(load(arguments.config, arguments.overrides), arguments, launched_world_size())
    runtime.stop_with_launcher()
    with closing(runtime.StopSignal()) as stop_signal, started(config.parallel.tp_size) as mesh:
        stop_signal.met()
        runtime.start_logging(mesh.rank)
        if config.debug.deterministic:
            runtime.make_deterministic()
        matmul_flops = measured_peak_flops(mesh.device)
        peak_flops = config.hardware.peak_flops if config.hardware else matmul_flops
        engine = build_engine(config, mesh, None)
        stepper = Stepper(config, mesh, Timeline(config.schedule), engine, peak_flops, Guard(config.guard))
        try:
            for plan in plans:
                line = measure(stepper, plan, matmul_flops, Agreement(mesh, stop_signal))
                if mesh.rank == 0:
                    print(json.dumps(line, allow_nan=False), flush=True)
        except runtime.Stopped:
            raise SystemExit(f"bench: stopped by {stop_signal.name or runtime.ELSEWHERE}") from None
