#!/usr/bin/env bash
# Check everything before a change is shared: launch/test.sh [stage...]
#
#   lint     ruff: rules and format
#   types    mypy: strict for pure modules, ordinary for the others
#   arch     import contracts, one importer for each heavy library, lines per file
#   pins     constraints.txt has a solution for every Python in the public index; not checked if PIP_NO_INDEX is set
#   fast     tests of one process that take seconds        dist      tests of several processes, and slow ones
#   kernels  every op against its definition               cluster   several hosts, and Slurm
#   gpu      tests that need a CUDA device                  demo      launch/demo.sh
#   chaos    600 kills, at every call of a save; 80 signals; every move between layouts; failing hosts: half an hour
#   fresh    launch/demo.sh and the fast tests on a bare Debian (tests/launch/fresh.sh): as root, 25 minutes, 20 GB in $TMPDIR
#   random   every test that needs no GPU in a random order: SEED (default: a new one, which pytest prints) and PROCESSES
#            (default 4), which take whole files
#   full_size   import and export of BTLM with 2.65 billion parameters: some minutes, 22 GB in $TMPDIR
#
# Without a stage: lint, types, arch, pins and every test that needs no GPU in one pytest run, whose summary ends the output.
# All stages but gpu and demo hide the GPUs: the ranks of a test share one machine and communicate over gloo.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/test.sh
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
known="lint types arch pins tests fast dist kernels cluster gpu demo chaos fresh random full_size"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^set -/s/^# \?//p' launch/test.sh && exit; fi
for stage; do
    [[ " $known " == *" $stage "* ]] || { echo "test: unknown stage $stage; the stages are $known" >&2 && exit 2; }
done
unset PYTHONPATH PYTHONHOME   # they would hide the packages of .venv
unset PYTHONDONTWRITEBYTECODE # otherwise every process compiles our code again, and pytest rewrites its assertions again
launch/install.sh
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

lint() { ruff check . && ruff format --check .; }
types() { launch/links.sh .venv/links && mypy; } # mypy does not see an editable installation of folders with other names
arch() { lint-imports && lines_per_file; }
pins() { if [[ -n ${PIP_NO_INDEX:-} ]]; then echo "not checked: PIP_NO_INDEX is set"; else python launch/pins.py; fi; }
fast() { pytest tests --ignore tests/kernels --ignore tests/cluster -m 'not dist and not slow'; }
dist() { pytest tests --ignore tests/kernels --ignore tests/cluster -m 'dist or slow'; }
kernels() { pytest tests/kernels; }
cluster() { with_programs && pytest tests/cluster -m 'chaos or not chaos'; }
gpu() { pytest tests -m gpu; }
chaos() {
    with_programs && CHAOS_KILLS=600 pytest tests/chaos -s && SIGNAL_ROUNDS=3 pytest tests/promises/test_signal_windows.py -s &&
        pytest tests -m chaos -s
}
random() {
    with_programs && pytest tests -p randomly --randomly-seed "${SEED:-$RANDOM}" --randomly-dont-reset-seed \
        --numprocesses "${PROCESSES:-4}" --dist loadfile --no-loadscope-reorder
}
full_size() { pytest tests -m full_size -s; }
demo() { launch/demo.sh; }
fresh() { with_debootstrap && tests/launch/fresh.sh; }
# Three files at a time, in their order: tests of several ranks mostly wait, and the files with the longest waits come first.
tests() { with_programs && pytest tests --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 10; }

# Some tests need `ip`, Slurm and shellcheck. Install them in a container, as root. Do not install them on a machine that runs systemd,
# which would start Slurm's services; there the tests report what is missing.
with_programs() {
    local packages=()
    lacks ip && packages+=(iproute2)
    lacks slurmctld slurmd sbatch munged && packages+=(slurmctld slurmd slurm-client munge)
    lacks shellcheck && packages+=(shellcheck)
    apt_install_as_root "${packages[@]}"
}
with_debootstrap() { ! lacks debootstrap || apt_install_as_root debootstrap; }
apt_install_as_root() {
    [[ $# -gt 0 && $(id -u) -eq 0 && -n $(command -v apt-get) && ! -d /run/systemd/system ]] || return 0
    echo "test: installing $*"
    { apt_install "$@" || { apt-get update -qq && apt_install "$@"; }; } >/dev/null 2>&1 || true
}
lacks() { for program; do command -v "$program" >/dev/null || return 0; done && return 1; }
apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; }

lines_per_file() {
    find trainer kernels data_prep -name '*.py' -exec awk 'END { print NR, FILENAME }' {} \; | sort -k2 | awk '
        function row(lines, name) { printf "%6d  %s\n", lines, name }
        { row($1, $2); split($2, part, "/"); sum[part[1]] += $1; total += $1 }
        END { for (name in sum) row(sum[name], name "/"); row(total, "together") }'
}

stages=("$@")
[[ $# -gt 0 ]] || stages=(lint types arch pins tests)
failed=()
export CUDA_VISIBLE_DEVICES=
# These four use one core each and share nothing, so they run at the same time and print one after the other.
outputs=$(mktemp -d)
declare -A started=()
stop() { # a job in the background does not get Ctrl-C
    for job in "${started[@]}"; do kill -- "-$job" 2>/dev/null || true; done
    rm -rf "$outputs"
}
trap stop EXIT
trap 'exit 130' INT TERM
set -m # each job is a process group
for stage in "${stages[@]}"; do
    [[ -z ${started[$stage]:-} ]] || continue
    case $stage in lint | types | arch | pins) (
        SECONDS=0
        if "$stage"; then verdict=ok; else verdict=FAILED; fi
        printf '== %s %s (%d s)\n' "$stage" "$verdict" "$SECONDS"
        [[ $verdict == ok ]]
    ) </dev/null >"$outputs/$stage" 2>&1 & started[$stage]=$! ;; esac
done
set +m
for stage in "${stages[@]}"; do
    case $stage in gpu | demo) unset CUDA_VISIBLE_DEVICES ;; esac
    printf '\n== %s\n' "$stage"
    if [[ -n ${started[$stage]:-} ]]; then
        wait "${started[$stage]}" || failed+=("$stage")
        cat "$outputs/$stage"
        unset "started[$stage]" # another process may get its number
    else
        "$stage" || failed+=("$stage") # nothing follows the summary of pytest, which has its own verdict and time
    fi
    export CUDA_VISIBLE_DEVICES=
done
[[ ${#failed[@]} -eq 0 ]]
