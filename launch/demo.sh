#!/usr/bin/env bash
# Show everything Tandem does, on this machine, in a few minutes, from nothing: launch/demo.sh
#
# 1. Install into .venv. 2. Prepare a corpus from Python's own source. 3. Train a small Stable LM (tensor parallel 2 x ZeRO-1), kill it
# and resume it. 4. Train a small BTLM (data parallel 2). Both change their row length. 5. Evaluate, export to Hugging Face, reload the
# export, generate text and write a report. It downloads only packages. The results are in data/demo, runs/demo-* and
# exports/demo-*; a second call trains again.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/demo.sh
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
launch/install.sh
export RANKS_PER_NODE=2 WANDB_SILENT=true
# shellcheck source=launch/env.sh
source launch/env.sh

# With fewer than two GPUs, both ranks train on the CPU.
if ! python -c 'import torch; raise SystemExit(torch.cuda.device_count() < 2)'; then export CUDA_VISIBLE_DEVICES=; fi

say() { printf '\n=== %4d s  %s\n' "$SECONDS" "$1"; }
fail() { printf 'demo: %s\n' "$1" >&2; exit 1; }
steps_done() { grep -c '"kind": "step"' "$1/metrics.jsonl" 2>/dev/null || true; }

corpus=data/demo
say "preparing a corpus from the source of Python's standard library"
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
mapfile -t inputs < <(find -L "$stdlib" -mindepth 1 -maxdepth 1 \( -name '*.py' -o -type d \) \
    -not -name 'site-packages' -not -name 'dist-packages' -not -name 'test' -not -name '__pycache__' -not -name 'config-*' \
    -not -name 'lib2to3' -not -name 'idlelib' | sort)
tandem prepare --input "${inputs[@]}" --glob '*.py' --skip-undecodable --vocab-size 4096 --held-out 0.02 --output $corpus
tandem verify $corpus

rm -rf runs/demo-stablelm runs/demo-btlm exports/demo-stablelm exports/demo-btlm

say "training demo-stablelm: tensor parallel 2 x ZeRO-1; this script kills it after step 110"
launch/local.sh 2 configs/demo-stablelm.yaml &
training=$!
# torchrun gives every rank its own session, so find the ranks by their command line, and by this folder because another checkout
# may run the same. Read /proc, because a minimal system has no pkill.
kill_training() {
    local process
    for process in /proc/[0-9]*; do
        { tr '\0' ' ' <"$process/cmdline" | grep -q 'trainer train.* configs/demo-stablelm\.yaml'; } 2>/dev/null || continue
        [[ $(readlink "$process/cwd") != "$PWD" ]] || kill -KILL "${process#/proc/}" 2>/dev/null || true
    done
}
trap kill_training EXIT
while [[ $(steps_done runs/demo-stablelm) -lt 110 ]]; do
    kill -0 $training 2>/dev/null || fail "training ended before it could be killed"
    sleep 0.2
done
kill_training
wait $training 2>/dev/null || true
trap - EXIT
say "killed with SIGKILL; the same command continues from the last checkpoint"
launch/local.sh 2 configs/demo-stablelm.yaml

grep '"kind": "start"' runs/demo-stablelm/metrics.jsonl | tail -n 1 | grep -q '"step": 100,' || fail "demo-stablelm did not continue at step 100"

say "training demo-btlm: data parallel 2 x ZeRO-1"
launch/local.sh 2 configs/demo-btlm.yaml parallel.tp_size=1

for name in stablelm btlm; do
    say "demo-$name: loss on held-out text, by position"
    table=$(tandem evaluate runs/demo-$name --data $corpus --seq-len 512)
    printf '%s\n' "$table"
    awk 'NR == 1 { exit !($2 < $(NF - 1) - 1) }' <<<"$table" || fail "demo-$name is not 1 nat below the unigram entropy"

    say "demo-$name: exporting to Hugging Face, reloading with transformers, comparing logits"
    tandem export-hf runs/demo-$name exports/demo-$name --dtype fp32 --check
    say "demo-$name: generating from the export"
    tandem generate exports/demo-$name --prompt 'def __init__(self' --max-new-tokens 48
    tandem report runs/demo-$name
done
say "done; open runs/demo-stablelm/report.html"
