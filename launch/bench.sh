#!/usr/bin/env bash
# Measure one GPU in a few minutes: launch/bench.sh FOLDER [rehearse] [first|second|third|STAGE...]
#
#   first      tests     tests marked gpu: kernels against their definition, whole small models
#              kernels   our kernels at the shapes of the two recipes
#              errors    error of each of our operations against fp64, beside plain torch's
#              btlm      BTLM-3B-8K whole, rows of 2,048 and of 8,192 tokens
#              stablelm  Stable LM 2 12B, six of its layers, with a profile
#   second     rivals    the same operations beside cuDNN, FlexAttention, Liger, torch.compile in one process
#              sweep     variants of the attention kernels
#              profile   BTLM's steps by kind of operation
#   third      states    each optional optimization of the step, on and off
#              memory    other micro-batches and recomputation
#   rehearse   the named stages, or all, on a CPU, at tiny shapes, in Triton's interpreter
#
# Each stage has a time limit and keeps what it has measured; a stage that fails or is cut short does not stop the others. The folder
# gets at most eight files: log.txt.gz, *.jsonl (one line per figure, written at once) and traces. The last output is a table;
# `python3 -m tests.rivals.tables FOLDER` prints it again. The exit code is 1 if a stage failed or was cut short.
#
# It uses .venv if launch/install.sh has made it, otherwise the Python on the path, and installs nothing. In a copy without git, set
# TANDEM_COMMIT.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/bench.sh
set -euo pipefail
caller=$PWD
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

first=(tests kernels errors btlm stablelm)
second=(rivals sweep profile)
third=(states memory)

fail() { echo "bench: $1" >&2 && exit 2; }
[[ $# -gt 0 ]] || fail "give a folder for the results: launch/bench.sh FOLDER [rehearse] [first|second|third|STAGE...]"
folder=$1
shift
[[ $# -gt 0 ]] || fail "give the stages to run: launch/bench.sh $folder [rehearse] [first|second|third|STAGE...]"
[[ $folder == /* ]] || folder=$caller/$folder
stages=()
rehearse=
for word in "$@"; do
    case $word in
    first | second | third) declare -n plan=$word && stages+=("${plan[@]}") ;;
    rehearse) rehearse=yes ;;
    tests | kernels | errors | btlm | stablelm | rivals | sweep | profile | states | memory) stages+=("$word") ;;
    *) fail "unknown stage $word; the stages are first second third rehearse ${first[*]} ${second[*]} ${third[*]}" ;;
    esac
done
[[ ${#stages[@]} -gt 0 ]] || stages=("${first[@]}" "${second[@]}" "${third[@]}")

no_gpu="this machine has no CUDA device, which these measurements need; launch/bench.sh FOLDER rehearse runs without one"
has_device_file() { compgen -G '/dev/nvidia*' >/dev/null || [[ -e /dev/dxg || -e /proc/driver/nvidia ]]; }
[[ $rehearse ]] || has_device_file || fail "$no_gpu"
RANKS_PER_NODE=1
# shellcheck source=launch/env.sh
source launch/env.sh
export PYTHONSAFEPATH= # `python3 -m tests.rivals` imports from here
# Install nothing: on a machine that is borrowed for minutes there is no time.
missing=$(python3 -c 'from importlib.util import find_spec
needed = "torch triton deepspeed megatron omegaconf orjson jaxtyping beartype pytest xdist pytest_timeout"
print(*(name for name in needed.split() if not find_spec(name)))') || fail "python3 does not start; put a working python3 on the PATH"
[[ -z $missing ]] || fail "python3 has no $missing; run $PWD/launch/install.sh, or unpack wheels and name their folder in PYTHONPATH"
[[ $rehearse ]] || python3 -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "$no_gpu"
mkdir -p "$folder"
out=$(cd "$folder" && pwd)
# Measure this checkout, even if another one is installed or none.
imported=$(python3 -c 'import tandem.trainer; print(tandem.trainer.__path__[0])' 2>/dev/null) || imported=
if [[ ! $imported -ef trainer ]]; then
    links=$(mktemp -d)
    trap 'rm -rf "$links"' EXIT
    launch/links.sh "$links"
    export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}
fi

# Python must load compiled code only from folders that no other user can change, as in every tandem command.
folders=$(python3 -c 'import os, shlex
from tandem.trainer.runtime.private_folder import CODE_FOLDERS, set_private_folders
set_private_folders()
for name in ("TMPDIR", *CODE_FOLDERS): print(f"export {name}={shlex.quote(os.environ[name])}")') || exit 2
eval "$folders"

btlm_config=configs/btlm-3b-8k.yaml stablelm_config=configs/stablelm-2-12b.yaml
slice=(--num-layers 6)
counted=(--warmup-steps 2 --steps 6)
short=(--warmup-steps 2 --steps 3)
order=(true false true false)
kernel_options=(--production)
error_options=(--production)
own_seconds=55 sweep_seconds=70
rival_seconds=120
sweep_options=()
workers=8
if [[ $rehearse ]]; then
    export CUDA_VISIBLE_DEVICES='' TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    btlm_config=configs/demo-btlm.yaml stablelm_config=configs/demo-stablelm.yaml
    slice=(--num-layers 1)
    counted=(--warmup-steps 1 --steps 1)
    short=("${counted[@]}")
    order=(true false)
    kernel_options=(--device cpu --tokens 8 --production)
    error_options=(--device cpu --tokens 8 --shape demo-stablelm) # fp64 at full width needs gigabytes and minutes
    own_seconds=8 rival_seconds=8 sweep_seconds=6
    sweep_options=(--device cpu --tokens 64)
    workers=0
    : "${VISIT_SECONDS:=3600}" # a rehearsal on a CPU is slow
fi
: "${VISIT_SECONDS:=420}"

# The time limit of each stage in seconds: together 420 in the first visit, 300 in the second, 250 in the third. All stages of a call
# share VISIT_SECONDS, so a late stage may get less than its limit.
declare -A limits=(
    [tests]=100 [kernels]=70 [errors]=50 [btlm]=110 [stablelm]=90
    [rivals]=150 [sweep]=80 [profile]=70
    [states]=150 [memory]=100
)
if [[ $rehearse ]]; then for stage in "${!limits[@]}"; do limits[$stage]=$VISIT_SECONDS; done; fi

# --- the stages

tests() {
    # -W default: on a new machine, libraries raise warnings that our list of exceptions does not have.
    python3 -m pytest tests/kernels tests/promises/test_kernels.py tests/promises/test_step.py \
        -m gpu -W default -n "$workers" -p no:cacheprovider -q --tb=short --maxfail=30
}
kernels() { python3 -m tandem.kernels.bench --rival ours "${kernel_options[@]}" --seconds "$own_seconds" --json "$out/kernels.jsonl"; }
errors() { python3 -m tests.rivals.kernels --errors "${error_options[@]}" --json "$out/errors.jsonl"; }
btlm() { steps "$btlm_config" --phase all "${counted[@]}"; }
stablelm() { steps "$stablelm_config" "${slice[@]}" "${counted[@]}" --profile "$out/stablelm.trace.json.gz"; }
rivals() { # the most important first
    python3 -m tests.rivals.kernels attention linear_cross_entropy swiglu qkv residual_norm cross_entropy swiglu_linear \
        "${kernel_options[@]}" --seconds "$rival_seconds" --json "$out/kernels.jsonl"
}
sweep() { python3 -m tests.rivals.kernels.attention_sweep --seconds "$sweep_seconds" "${sweep_options[@]}" --json "$out/sweep.jsonl"; }
profile() { steps "$btlm_config" --phase all "${short[@]}" --profile "$out/btlm.trace.json.gz"; }
states() { # both states in one log, because cards and days differ
    local state
    for state in "${order[@]}"; do
        steps "$stablelm_config" debug.immediate_gradients="$state" "${slice[@]}" "${short[@]}"
    done
}
memory() { # cost and gain of recomputation and of larger micro-batches
    steps "$stablelm_config" parallel.recompute=selective "${slice[@]}" "${short[@]}"
    steps "$stablelm_config" "${slice[@]}" "${short[@]}" --micro-batch-size 2 --global-batch-size 8
}

steps() { python3 -m tandem.trainer bench "$1" parallel.tp_size=1 "${@:2}" >>"$out/steps.jsonl"; }

run_limited() { # NAME SECONDS: in a separate shell, so that its whole process group can be ended
    export -f "${1?}" steps
    local settings
    settings=$(declare -p out btlm_config stablelm_config slice counted short order workers kernel_options error_options \
        sweep_options own_seconds rival_seconds sweep_seconds)
    echo "$BASHPID" >"$out/.stage"
    exec timeout --signal=INT --kill-after=10 "$2" bash -euo pipefail -c "$settings; $1"
}

# timeout runs in its own process group, which Ctrl-C does not reach; it forwards the signals that it receives.
interrupted=
stop() {
    interrupted=yes
    kill -INT "$(<"$out/.stage")" 2>/dev/null || true
}
trap stop INT TERM

failed=()
SECONDS=0
for stage in "${stages[@]}"; do
    begun=$SECONDS
    left=$((VISIT_SECONDS - SECONDS))
    limit=$((limits[$stage] < left ? limits[$stage] : left))
    printf '\n== %s\n' "$stage"
    exit_code=124
    if [[ $limit -gt 0 ]]; then
        exit_code=0
        (run_limited "$stage" "$limit" 2>&1 | tee -a "$out/log.txt") & # a trap runs during `wait` alone
        wait "$!" || exit_code=$?
        [[ -z $interrupted ]] || wait "$!" || exit_code=$?
    fi
    [[ $exit_code -eq 0 ]] || failed+=("$stage")
    cut=$([[ $exit_code -ne 124 && $exit_code -ne 137 ]] || echo ", cut at its limit of $((limit > 0 ? limit : 0)) s")
    printf '== %s: exit %d, %d s%s\n' "$stage" "$exit_code" "$((SECONDS - begun))" "$cut" | tee -a "$out/log.txt"
    [[ -z $interrupted ]] || break
done
rm -f "$out/.stage"
gzip --stdout "$out/log.txt" >>"$out/log.txt.gz" # append to the log of an earlier visit
rm "$out/log.txt"
printf '\n'
python3 -m tests.rivals.tables "$out" || failed+=(table)
[[ -z $interrupted ]] || { echo "bench: interrupted in $stage" >&2 && exit 130; }
[[ ${#failed[@]} -eq 0 ]] || { echo "bench: these stages failed or were cut short: ${failed[*]}" >&2 && exit 1; }
