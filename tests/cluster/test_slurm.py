"""The launch scripts are sound as shell, and the Slurm jobs ask for machines their config divides over."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tandem.trainer import config
from tandem.trainer.__main__ import USER_ERROR_EXIT_CODE
from tandem.trainer.runtime import signals

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*")])
JOBS = sorted(LAUNCH.glob("slurm/*.sbatch"))
ANY_CONFIG = LAUNCH / "slurm" / "train.sbatch"
RECIPES = [job for job in JOBS if job != ANY_CONFIG]

every_job = pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
every_recipe = pytest.mark.parametrize("job", RECIPES, ids=lambda path: path.stem)


def directives(job: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", job.read_text(), re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.parametrize("name", ["local.sh", "multi_node.sh", "deepspeed.sh"])
def test_a_script_without_arguments_explains_itself(name: str) -> None:
    done = subprocess.run([LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 2
    assert "CONFIG [section.field=value...]" in done.stderr


@every_recipe
def test_the_world_divides(job: Path) -> None:
    asked = directives(job)
    world_size = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    config.check_world_size(config.load_config(ROOT / "configs" / f"{job.stem}.yaml"), world_size)


@every_recipe
def test_one_task_for_each_device_of_a_node(job: Path) -> None:
    asked = directives(job)
    hardware = config.load_config(ROOT / "configs" / f"{job.stem}.yaml").hardware
    assert hardware is not None
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == hardware.devices_per_node


@every_recipe
def test_the_job_runs_the_config_of_its_name(job: Path) -> None:
    assert f'exec launch/slurm/run.sh configs/{job.stem}.yaml "$@"' in job.read_text()
    assert directives(job)["job-name"] == job.stem


@every_job
def test_the_job_is_warned_in_time_and_may_be_requeued(job: Path) -> None:
    """Without B: Slurm would send the signal to the ranks and again, through the script, a second time."""
    asked = directives(job)
    assert asked["signal"] == "B:USR1@300"
    assert "requeue" in asked


def test_the_job_for_any_config_differs_from_the_recipes_in_name_size_and_config_only() -> None:
    own = ("job-name", "nodes")
    asked = [{name: value for name, value in directives(job).items() if name not in own} for job in JOBS]
    assert all(one == asked[0] for one in asked)
    assert ANY_CONFIG.read_text().endswith('\nexec launch/slurm/run.sh "$@"\n')


def test_the_script_and_the_trainer_agree_on_exit_codes() -> None:
    found = re.search(r"USER_ERROR_EXIT_CODE=(\d+) REQUEUE_EXIT_CODE=(\d+)", (LAUNCH / "slurm" / "run.sh").read_text())
    assert found is not None
    assert [int(code) for code in found.groups()] == [USER_ERROR_EXIT_CODE, signals.REQUEUE_EXIT_CODE]


def test_the_slurm_script_without_a_config_says_how_to_submit() -> None:
    done = subprocess.run([LAUNCH / "slurm" / "run.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "run.sh: no config is named; submit with sbatch launch/slurm/train.sbatch CONFIG [section.field=value...]\n"
    )


@every_job
def test_the_job_outside_the_repository_says_where_to_submit(job: Path, tmp_path: Path) -> None:
    done = subprocess.run(["bash", job, "x.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "submit from its root, or with --chdir=REPOSITORY" in done.stderr


PATIENCE_SECONDS, LITTLE_PATIENCE_SECONDS = 60, 2


def run_with(
    commands: dict[str, str], folder: Path, patience_seconds: int = PATIENCE_SECONDS, **functions: str
) -> subprocess.CompletedProcess[str]:
    """The script in a job, with these stand-ins for commands, some of them functions of its shells."""
    for name, lines in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (folder / name).chmod(0o755)
    environment = {
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_PATIENCE_SECONDS": str(patience_seconds),
        # Not on PATH: launch/env.sh puts the environment's python before all others there.
        **{f"BASH_FUNC_{name}%%": f"() {{ {lines} }}" for name, lines in functions.items()},
    }
    return subprocess.run(
        [LAUNCH / "slurm" / "run.sh", "config.yaml"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | environment | {"PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip


SHORT_SLEEP = "exec /bin/sleep 0.1"
ABSENT, BACK, REFUSED = 'echo "Unable to contact slurm controller" >&2; exit 1', "exit 0", "exit 1"


@pytest.mark.parametrize(
    ("tries", "requeue", "code", "said"),
    [
        ([ABSENT, ABSENT, BACK], "1", 0, "requeueing the job"),
        ([REFUSED], "0", USER_ERROR_EXIT_CODE, "Slurm refuses"),
        ([ABSENT] * 100, "1", signals.REQUEUE_EXIT_CODE, "submit the same command again"),
    ],
    ids=["away for a while", "not to be requeued", "away for good"],
)
def test_a_saved_run_goes_back_into_the_queue_also_when_slurm_answers_late(
    tries, requeue, code, said, tmp_path
) -> None:
    """Commands of Slurm are stand-ins here; the run has left with 85."""
    answers = "".join(f"{number}) {answer} ;;\n" for number, answer in enumerate(tries))
    commands = {
        "srun": f"exit {signals.REQUEUE_EXIT_CODE}",
        "sleep": SHORT_SLEEP,
        "scontrol": f"""
case "$*" in
*hostnames*) echo here ;;
*"show node"*) echo " NodeAddr=127.0.0.1 " ;;
*"show job"*) echo " Requeue={requeue} Restarts=0 " ;;
requeue*) tries=$(cat {tmp_path}/tries 2>/dev/null || echo 0); echo $((tries + 1)) >{tmp_path}/tries
    case $tries in {answers} esac ;;
esac""",
    }
    for_good = len(tries) == 100
    done = run_with(commands, tmp_path, LITTLE_PATIENCE_SECONDS if for_good else PATIENCE_SECONDS)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    tried = int((tmp_path / "tries").read_text())
    assert 2 <= tried < len(tries) if for_good else tried == len(tries)


def test_a_head_node_whose_own_name_is_its_loopback_interface_has_an_address_for_the_others(tmp_path) -> None:
    """Commands of Slurm and Python are stand-ins here."""
    scontrol = """
case "$*" in
*hostnames*) printf 'here\\nthere\\n' && seq 20000 ;;
*"node here") echo " NodeAddr=localhost " ;;
*"node there") echo " NodeAddr=10.1.2.4 " ;;
esac"""
    commands = {"srun": """while [[ $1 == --* ]]; do shift; done; exec "$@" """, "scontrol": scontrol}
    asked = '[[ $1 != -c ]] || { [[ $2 != *local_address* ]] || echo "10.1.2.3 to $3"; return; };'
    done = run_with(commands, tmp_path, python=f'{asked} echo "$MASTER_ADDR" >{tmp_path}/address; return 2;')
    assert done.returncode == USER_ERROR_EXIT_CODE, done.stderr
    assert (tmp_path / "address").read_text() == "10.1.2.3 to 10.1.2.4\n"


@pytest.mark.parametrize(("misses", "code"), [(3, USER_ERROR_EXIT_CODE), (100, 1)], ids=["for a while", "for good"])
def test_a_job_begins_and_a_mistake_ends_it_also_when_slurm_answers_late(misses, code, tmp_path) -> None:
    """Commands of Slurm are stand-ins here: where the head node is it says late or never, and late what a rank tells it."""
    later = f"""
tries() {{ cat {tmp_path}/$1 2>/dev/null || echo 0; }}
late() {{ local tries; tries=$(tries "$1"); echo $((tries + 1)) >{tmp_path}/$1; ((tries >= $2)) || {{ {ABSENT}; }}; }}
case "$*" in
*hostnames*) echo here ;;
*"show node"*) late node {misses}; echo " NodeAddr=10.1.2.3 " ;;
*Requeue=0) late update 2 ;;
*) echo "not asked for: $*" >&2; exit 1 ;;
esac"""
    commands = {
        "srun": """while [[ $1 == --* ]]; do shift; done; exec "$@" """,
        "sleep": SHORT_SLEEP,
        "scontrol": later,
    }
    python = f'[[ $1 == -c ]] || {{ echo "$MASTER_ADDR" >{tmp_path}/address; return 2; }};'
    done = run_with(commands, tmp_path, LITTLE_PATIENCE_SECONDS if misses == 100 else PATIENCE_SECONDS, python=python)
    assert done.returncode == code, done.stderr
    assert "not asked for" not in done.stderr
    if code == USER_ERROR_EXIT_CODE:
        assert (tmp_path / "address").read_text() == "10.1.2.3\n"
        assert (tmp_path / "update").read_text() == "3\n"
    else:
        assert "run.sh: Slurm does not know the address of here" in done.stderr
