"""`tandem bench`: measure how fast a config trains on this machine. It needs no corpus and writes no run folder.

Every step is a real run's step, `train.timed_train_step` on an engine from `startup.build_engine`; only its rows are synthetic.
`plan` decides which steps to run, `synthetic_batch` draws their rows, `measure` runs them and builds one JSON line per phase.
`part_timing` and `step_profile` run additional steps that show how the time is divided.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path

from tandem.trainer.config import load_config
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.metrics.throughput import measure_peak_flops
from tandem.trainer.runtime import launch
from tandem.trainer.tools.bench.plan import ALL_PHASES, DEFAULT_NUM_MICRO_BATCHES, build_plans


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rows_default = f"{DEFAULT_NUM_MICRO_BATCHES} micro-batches on every replica"
    add("config", type=Path, help="YAML file of a run, or a shipped config; its corpus is not read")
    add("overrides", nargs="*", help="section.field=value replaces this field of the file")
    add("--phase", metavar="NAME", help=f"phase to measure, or {ALL_PHASES} (default: the first)")
    add("--num-layers", type=int, help="number of layers; the width does not change (default: as in the config)")
    add("--global-batch-size", type=int, help=f"rows per step, over all replicas (default: {rows_default})")
    add("--micro-batch-size", type=int, help="rows per micro-batch (default: as in the phase)")
    add("--warmup-steps", type=int, default=3, help="number of steps before the timed ones (default: 3)")
    add("--steps", type=int, default=10, help="number of timed steps (default: 10)")
    add(
        "--profile", type=Path, metavar="FILE",
        help="run one more step under torch.profiler; write its trace to FILE (compressed if the name ends in .json.gz), print "
        "a table by kind of operation to standard error, and add kind_seconds to the JSON line; with --phase all, write one "
        "file per phase, named FILE-PHASE",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print one JSON line per phase on rank 0's standard output, and progress on standard error."""
    world_size = launch.current_launch().world_size
    config, plans = build_plans(load_config(arguments.config, arguments.overrides), arguments, world_size)
    # Imported here because they import torch, which `tandem bench --help` and a refusal do not need.
    from tandem.trainer.distributed.coordination import Coordinator
    from tandem.trainer.distributed.mesh import mesh_context
    from tandem.trainer.guard import Guard
    from tandem.trainer.run_state import StepContext
    from tandem.trainer.runtime import process, signals
    from tandem.trainer.startup import build_engine
    from tandem.trainer.tools.bench.measure import measure_phase

    process.set_parent_death_signal()
    with closing(signals.StopSignal()) as stop_signal, mesh_context(config.parallel.tp_size) as mesh:
        stop_signal.mark_rendezvous_done()
        process.start_logging(mesh.rank)
        if config.debug.deterministic:
            process.make_deterministic()
        matmul_flops = measure_peak_flops(mesh.device)
        peak_flops = config.hardware.peak_flops if config.hardware else matmul_flops
        engine = build_engine(config, mesh, None)
        context = StepContext(config, mesh, Timeline(config.schedule), engine, peak_flops, Guard(config.guard))
        try:
            for plan in plans:
                result = measure_phase(context, plan, matmul_flops, Coordinator(mesh, stop_signal))
                if mesh.rank == 0:
                    print(json.dumps(result, allow_nan=False), flush=True)
        except signals.StopRequested:
            raise SystemExit(f"bench: stopped by {stop_signal.signal_name or signals.REMOTE_STOP_NAME}") from None
