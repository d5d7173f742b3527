#!/usr/bin/env bash
# Afterwards .venv holds Tandem (editable) and what it needs, at the versions of constraints.txt. Says nothing when that
# is so already.
#
# Torch comes first, alone: DeepSpeed has no wheel, and its build must see the torch that will be used instead of fetching
# another one. A machine with GPUs whose Python already has a CUDA torch keeps it: that build matches its driver and
# interconnect, and ours would not. Then the ranges of pyproject.toml hold and constraints.txt, made for the pinned torch,
# is left out. pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, ...) apply throughout; so does PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.installed
wanted=$({ pwd; cat pyproject.toml constraints.txt launch/install.sh; } | sha256sum)
if [[ -x .venv/bin/tandem && -f $stamp && $(<"$stamp") == "$wanted" ]]; then exit 0; fi

say() { printf 'install: %s (%d s)\n' "$1" "$SECONDS"; }
has_cuda_torch() { "$1" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }
quiet=(); [[ -t 1 ]] || quiet=(--quiet)
pip() { .venv/bin/python -m pip "$1" --disable-pip-version-check "${quiet[@]}" "${@:2}"; }

python=
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then python=$candidate && break; fi
done
[[ -n $python ]] || { echo "install: no Python 3.11 or newer found; name one with PYTHON=/path/to/python3" >&2; exit 2; }

rm -rf .venv
if has_cuda_torch "$python"; then
    "$python" -m venv --system-site-packages .venv
else
    "$python" -m venv .venv
fi
say "made .venv with $("$python" --version)"

export DS_BUILD_OPS=0 # DeepSpeed compiles no operators: none is used
constraints=.venv/constraints.txt
if has_cuda_torch .venv/bin/python; then
    .venv/bin/python -c 'import torch; print("torch==" + torch.__version__)' >"$constraints"
    say "keeping the $(<"$constraints") of this machine"
else
    cp constraints.txt "$constraints"
    say "installing torch"
    pip install --constraint "$constraints" torch
fi
pip install --constraint "$constraints" 'setuptools>=77'
say "installing the rest"
pip install --constraint "$constraints" --no-build-isolation --editable '.[dev]'
printf '%s' "$wanted" >"$stamp"
say "done"
