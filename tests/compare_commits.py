"""Train both demos at two commits and compare them bit by bit: python tests/compare_commits.py BEFORE AFTER

For a change that must not change what is computed. Each commit is checked out into a temporary folder and trains demo-btlm and
demo-stablelm for 60 steps, 30 in each phase, on two ranks: tensor parallel 2, then data parallel 2 with ZeRO-1. Losses and
gradient norms of every step and the final checkpoint (weights, fp32 masters, moments) must be the same bits. The corpus is
data/demo, which launch/demo.sh makes. Exit code 1 if anything differs. It takes some minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMOS = ("btlm", "stablelm")
LAYOUTS = {"tensor parallel 2": "parallel.tp_size=2", "data parallel 2": "parallel.tp_size=1"}
STEPS_PER_PHASE = 30
TOKENS_PER_STEP = 2_048
GRAD_NORM_NAMES = ("grad_norm", "gradient_norm")
"""Of today, and of commits before it was renamed."""


def main(commits: list[str]) -> int:
    if len(commits) != 2:
        print("compare_commits: name two commits: python tests/compare_commits.py BEFORE AFTER", file=sys.stderr)
        return 2
    corpus = ROOT / "data" / "demo"
    if not corpus.is_dir():
        print(f"compare_commits: {corpus} is missing; launch/demo.sh makes it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        checkouts = [check_out(commit, Path(folder) / str(index)) for index, commit in enumerate(commits)]
        differing = 0
        for demo in DEMOS:
            for layout, override in LAYOUTS.items():
                before, after = (train(checkout, demo, override, corpus) for checkout in checkouts)
                differing += report(f"demo-{demo}, {layout}", before, after)
    return int(differing > 0)


def check_out(commit: str, folder: Path) -> Path:
    """A copy of the commit's files."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def train(
    checkout: Path, demo: str, override: str, corpus: Path
) -> tuple[list[tuple[int, float, float]], dict[str, str]]:
    """Step, loss and gradient norm of every step; the SHA-256 of each file of the final checkpoint."""
    name = override.replace("=", "-")
    overrides = [
        override, f"run.root={checkout / 'runs'}", f"run.name={demo}-{name}", f"data.sources.corpus={corpus}",
        "log.wandb=disabled", *(f"schedule.phases[{n}].tokens={STEPS_PER_PHASE * TOKENS_PER_STEP}" for n in (0, 1)),
    ]  # fmt: skip
    module, path = "trainer", checkout
    if (links := checkout / "launch" / "links.sh").exists():
        subprocess.run([links, checkout / ".links"], check=True)
        module, path = "tandem.trainer", checkout / ".links"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module, "train",
        f"configs/demo-{demo}.yaml", *overrides,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare_commits: {' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    run = checkout / "runs" / f"{demo}-{name}"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [
        (record["step"], record["loss"], next(record[name] for name in GRAD_NORM_NAMES if name in record))
        for record in records
        if record["kind"] == "step"
    ]
    newest = max((run / "checkpoints").iterdir())
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return steps, {name: file["sha256"] for name, file in files.items()}


def report(what: str, before: tuple, after: tuple) -> bool:
    """Print one line; true if the two differ."""
    steps = [one for one, other in zip(before[0], after[0], strict=False) if one != other]
    files = sorted(name for name in before[1].keys() | after[1].keys() if before[1].get(name) != after[1].get(name))
    num_steps, differs = len(before[0]), bool(steps or files or len(before[0]) != len(after[0]) or not before[0])
    if differs:
        first = f"first differing step {steps[0][0]}" if steps else "no differing step"
        print(f"{what}: {first} of {num_steps}, differing files of the final checkpoint: {', '.join(files) or 'none'}")
    else:
        print(
            f"{what}: {num_steps} losses and norms and {len(before[1])} files of the final checkpoint are the same bits"
        )
    sys.stdout.flush()
    return differs


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
