#!/usr/bin/env bash
# Everything that one GPU can show, its raw lines and logs in a folder: launch/bench.sh FOLDER [stage...]
#
#   tests      what is marked gpu, and every kernel against its meaning on the GPU itself
#   kernels    every operation against its rivals, at our shapes and at theirs
#   btlm       BTLM-3B-8K whole, rows of 2,048 and of 8,192 tokens
#   stablelm   Stable LM 2 12B, six of its layers, which 80 GB hold with their optimizer
#
# Without a stage: all, in this order; a stage that fails does not stop the others.
# Uses the Python it finds where that one has what is needed, else .venv, which launch/install.sh makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ $# -gt 0 ]] || { echo "bench: name a folder for the results: launch/bench.sh FOLDER [stage...]" >&2 && exit 2; }
folder=$1
shift
stages=("$@")
[[ $# -gt 0 ]] || stages=(tests kernels btlm stablelm)
for stage in "${stages[@]}"; do
    case $stage in
    tests | kernels | btlm | stablelm) ;;
    *) echo "bench: unknown stage $stage; known: tests kernels btlm stablelm" >&2 && exit 2 ;;
    esac
done

no_gpu() {
    echo "bench: no CUDA device here: these are measurements of a GPU; python -m kernels.bench --resources needs none" >&2
    exit 2
}
[[ -e /dev/nvidiactl ]] || no_gpu
if ! python3 -c 'import deepspeed, megatron.core, omegaconf, torch, triton' 2>/dev/null; then launch/install.sh; fi
RANKS_PER_NODE=1
# shellcheck source=launch/env.sh
source launch/env.sh
python3 -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || no_gpu
mkdir -p "$folder"
out=$(cd "$folder" && pwd)

slice_depth=6
tests() { python3 -m pytest tests -m gpu; }
kernels() { python3 -m kernels.bench --json "$out/kernels.jsonl"; }
btlm() { phases configs/btlm-3b-8k.yaml "2k 8k" parallel.tp_size=1; }
stablelm() { phases configs/stablelm-2-12b.yaml 4k parallel.tp_size=1 --depth "$slice_depth"; }

# phases CONFIG "NAME..." argument...: one JSON line and one profile for each phase.
phases() {
    local config=$1 name
    for name in $2; do
        python3 -m trainer bench "$config" "${@:3}" \
            --phase "$name" --profile "$out/$(basename "$config" .yaml)-$name.trace.json" >>"$out/steps.jsonl"
    done
}

failed=()
for stage in "${stages[@]}"; do
    SECONDS=0
    printf '\n== %s\n' "$stage"
    # In a shell of its own: `if` would switch `set -e` off inside the stage.
    set +e
    (set -e && "$stage") 2>&1 | tee "$out/$stage.log"
    verdict=${PIPESTATUS[0]}
    set -e
    [[ $verdict -eq 0 ]] || failed+=("$stage")
    printf '== %s: exit %d, %d s\n' "$stage" "$verdict" "$SECONDS"
done
[[ ${#failed[@]} -eq 0 ]]
