#!/usr/bin/env bash
# What one GPU can show, in few minutes: launch/bench.sh FOLDER [rehearse] [first|second|third|STAGE...]
#
#   first      tests     what is marked gpu: kernels against their meaning, whole small models
#              kernels   our kernels at the shapes of the two recipes
#              errors    error of each of our operations against fp64, beside plain torch's
#              btlm      BTLM-3B-8K whole, rows of 2,048 and of 8,192 tokens
#              stablelm  Stable LM 2 12B, six of its layers, with a profile
#   second     rivals    the same operations beside cuDNN, FlexAttention, Liger, torch.compile in one process
#              sweep     variants of the attention kernels
#              profile   BTLM's steps by kind of operation
#   third      states    each change of the step that can be switched off, on and off
#              memory    other micro-batches and recomputation
#   rehearse   the named stages, or all, on a CPU, at tiny shapes, in Triton's interpreter
#
# Each stage has a time limit and leaves what it has; one that fails or is cut does not stop the others. The folder gets at
# most eight files: log.txt.gz, *.jsonl (a line is added when its figure is there) and traces. One table is printed last;
# `python3 -m trainer.bench.figures FOLDER` prints it again. Exit code 1 if a stage failed or was cut.
#
# Uses .venv if launch/install.sh has made it, else the Python on the path, and installs nothing. A copy without git says its
# commit in TANDEM_COMMIT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

first=(tests kernels errors btlm stablelm)
second=(rivals sweep profile)
third=(states memory)

fail() { echo "bench: $1" >&2 && exit 2; }
[[ $# -gt 0 ]] || fail "name a folder for the results: launch/bench.sh FOLDER [rehearse] [first|second|third|STAGE...]"
folder=$1
shift
[[ $# -gt 0 ]] || fail "name what to measure: launch/bench.sh $folder [rehearse] [first|second|third|STAGE...]"
stages=()
rehearse=
for word in "$@"; do
    case $word in
    first | second | third) declare -n plan=$word && stages+=("${plan[@]}") ;;
    rehearse) rehearse=yes ;;
    tests | kernels | errors | btlm | stablelm | rivals | sweep | profile | states | memory) stages+=("$word") ;;
    *) fail "unknown stage $word; known: first second third rehearse ${first[*]} ${second[*]} ${third[*]}" ;;
    esac
done
[[ ${#stages[@]} -gt 0 ]] || stages=("${first[@]}" "${second[@]}" "${third[@]}")

no_gpu="no CUDA device here: these are measurements of a GPU; launch/bench.sh FOLDER rehearse needs none"
has_device_file() { compgen -G '/dev/nvidia*' >/dev/null || [[ -e /dev/dxg || -e /proc/driver/nvidia ]]; }
[[ $rehearse ]] || has_device_file || fail "$no_gpu"
RANKS_PER_NODE=1
# shellcheck source=launch/env.sh
source launch/env.sh
# Nothing is installed here: a machine that is lent for minutes has none to spare.
missing=$(python3 -c 'from importlib.util import find_spec
needed = "torch triton deepspeed megatron omegaconf orjson jaxtyping beartype pytest xdist pytest_timeout"
print(*(name for name in needed.split() if not find_spec(name)))') || fail "python3 does not start; name one on the PATH"
[[ -z $missing ]] || fail "python3 has no $missing; run launch/install.sh, or unpack wheels and name their folder in PYTHONPATH"
[[ $rehearse ]] || python3 -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "$no_gpu"
mkdir -p "$folder"
out=$(cd "$folder" && pwd)

btlm_config=configs/btlm-3b-8k.yaml stablelm_config=configs/stablelm-2-12b.yaml
slice=(--depth 6)
counted=(--warmup-steps 2 --steps 6)
short=(--warmup-steps 2 --steps 3)
kernel_options=(--production)
error_options=(--production)
rival_seconds=165
sweep_options=()
workers=8
if [[ $rehearse ]]; then
    export CUDA_VISIBLE_DEVICES='' TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    btlm_config=configs/demo-btlm.yaml stablelm_config=configs/demo-stablelm.yaml
    slice=(--depth 1)
    counted=(--warmup-steps 1 --steps 1)
    short=("${counted[@]}")
    kernel_options=(--device cpu --tokens 8 --production)
    error_options=(--device cpu --tokens 8 --shape demo-stablelm) # fp64 at full width takes gigabytes and minutes
    rival_seconds=20
    sweep_options=(--device cpu --tokens 64)
    workers=2
fi

# Seconds, together well inside nine minutes a visit on an H200; STAGE_SECONDS sets one for all.
declare -A limits=(
    [tests]=110 [kernels]=90 [errors]=60 [btlm]=130 [stablelm]=100
    [rivals]=180 [sweep]=90 [profile]=100
    [states]=150 [memory]=150
)
limit() { echo "${STAGE_SECONDS:-${limits[$1]}}"; }

# --- the stages

tests() {
    # Foreign libraries warn about themselves in ways that no list of ours foresees.
    python3 -m pytest tests/kernels tests/promises/test_kernels.py tests/promises/test_step.py \
        -m gpu -W default -n "$workers" -p no:cacheprovider -q --tb=short --maxfail=30
}
kernels() { python3 -m kernels.bench --rival ours "${kernel_options[@]}" --json "$out/kernels.jsonl"; }
errors() { python3 -m kernels.bench --errors "${error_options[@]}" --json "$out/errors.jsonl"; }
btlm() { steps "$btlm_config" --phase all "${counted[@]}"; }
stablelm() { steps "$stablelm_config" "${slice[@]}" "${counted[@]}" --profile "$out/stablelm.trace.json.gz"; }
rivals() { python3 -m kernels.bench "${kernel_options[@]}" --seconds "$rival_seconds" --json "$out/kernels.jsonl"; }
sweep() { python3 -m kernels.bench.sweep --seconds 80 "${sweep_options[@]}" --json "$out/sweep.jsonl"; }
profile() { steps "$btlm_config" --phase all "${short[@]}" --profile "$out/btlm.trace.json.gz"; }
states() { # with both states in one log, as cards and days differ
    local state
    for state in true false true false; do
        steps "$stablelm_config" "${slice[@]}" "${short[@]}" debug.immediate_gradients=$state
    done
}
memory() {
    steps "$stablelm_config" "${slice[@]}" "${short[@]}" parallel.recompute=selective
    steps "$stablelm_config" "${slice[@]}" "${short[@]}" --micro-rows 2 --rows 8
}

steps() { python3 -m trainer bench "$1" parallel.tp_size=1 "${@:2}" >>"$out/steps.jsonl"; }

run_limited() { # NAME: in a shell of its own, so that its whole process group can be ended
    export -f "${1?}" steps
    timeout --signal=INT --kill-after=10 "$(limit "$1")" bash -euo pipefail -c "$(declare -p out btlm_config stablelm_config slice counted short \
        kernel_options error_options rival_seconds sweep_options workers); $1"
}

failed=()
for stage in "${stages[@]}"; do
    SECONDS=0
    printf '\n== %s\n' "$stage"
    verdict=0
    run_limited "$stage" 2>&1 | tee -a "$out/log.txt" || verdict=${PIPESTATUS[0]}
    [[ $verdict -eq 0 ]] || failed+=("$stage")
    cut=$([[ $verdict -ne 124 && $verdict -ne 137 ]] || echo ", cut at its limit of $(limit "$stage") s")
    printf '== %s: exit %d, %d s%s\n' "$stage" "$verdict" "$SECONDS" "$cut" | tee -a "$out/log.txt"
done
gzip -f "$out/log.txt"
printf '\n'
python3 -m trainer.bench.figures "$out"
[[ ${#failed[@]} -eq 0 ]] || { echo "bench: failed or cut: ${failed[*]}" >&2 && exit 1; }
