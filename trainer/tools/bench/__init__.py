"""`tandem bench`: how fast a config trains here, by the run's own steps on synthetic rows: no corpus, no run folder.

Every step is `train.timed_train_step` on the engine that `startup.build_engine` makes: accumulation, reduction, clipping,
ZeRO and AdamW at the schedule's learning rate, timed as `tandem train` times it. `plan` says which steps,
`synthetic_batch` what they read, `measure` makes them and one line of them; `part_timing` and `step_profile` say where the
time goes, in steps of their own.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path

from tandem.trainer.config import load_config
from tandem.trainer.metrics.throughput import measure_peak_flops
from tandem.trainer.tools.bench.plan import ALL_PHASES, DEFAULT_NUM_MICRO_BATCHES, build_plans


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tandem bench`."""
    parser.add_argument("config", type=Path, help="YAML file of a run; its corpus is not needed")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--phase", metavar="NAME", help=f"phase to time, or {ALL_PHASES} (default: the first)")
    parser.add_argument("--num-layers", type=int, help="layers, at the config's width (default: the config's)")
    parser.add_argument(
        "--global-batch-size",
        type=int,
        help=f"rows of a global step (default: {DEFAULT_NUM_MICRO_BATCHES} forward passes on every replica)",
    )
    parser.add_argument("--micro-batch-size", type=int, help="rows in one forward pass (default: the phase's)")
    parser.add_argument("--warmup-steps", type=int, default=3, help="steps before those that count (default 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (default 10)")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE",
        help="make one more step under torch.profiler: its trace in FILE (small if it ends in .json.gz; with --phase all one "
        "for each phase, FILE-PHASE), a table by kind of operation on standard error, and kind_seconds in the JSON line",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Prints one JSON line for each phase on standard output, on rank 0; progress goes to standard error."""
    # Here, so that --help, which measures nothing, needs no torch.
    from tandem.trainer import runtime
    from tandem.trainer.config.schedule import Timeline
    from tandem.trainer.distributed.coordination import Coordinator
    from tandem.trainer.distributed.mesh import mesh_context
    from tandem.trainer.guard import Guard
    from tandem.trainer.run_state import StepContext
    from tandem.trainer.runtime import launch_world_size
    from tandem.trainer.startup import build_engine
    from tandem.trainer.tools.bench.measure import measure_phase

    config, plans = build_plans(load_config(arguments.config, arguments.overrides), arguments, launch_world_size())
    runtime.set_parent_death_signal()
    with closing(runtime.StopSignal()) as stop_signal, mesh_context(config.parallel.tp_size) as mesh:
        stop_signal.mark_rendezvous_done()
        runtime.start_logging(mesh.rank)
        if config.debug.deterministic:
            runtime.make_deterministic()
        matmul_flops = measure_peak_flops(mesh.device)
        peak_flops = config.hardware.peak_flops if config.hardware else matmul_flops
        engine = build_engine(config, mesh, None)
        context = StepContext(config, mesh, Timeline(config.schedule), engine, peak_flops, Guard(config.guard))
        try:
            for plan in plans:
                result = measure_phase(context, plan, matmul_flops, Coordinator(mesh, stop_signal))
                if mesh.rank == 0:
                    print(json.dumps(result, allow_nan=False), flush=True)
        except runtime.StopRequested:
            raise SystemExit(f"bench: stopped by {stop_signal.signal_name or runtime.REMOTE_STOP_NAME}") from None
