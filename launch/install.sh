#!/usr/bin/env bash
# Afterwards .venv holds Tandem (editable) and what it needs, at the versions of constraints.txt. Says nothing when
# that is so already.
#
# Torch comes first, alone: DeepSpeed has no wheel, and its build must see the torch that will be used instead of
# fetching another one. A machine with GPUs whose Python already has a CUDA torch keeps it: that build matches its
# driver and network, and ours would not. Then the ranges of pyproject.toml hold and constraints.txt, made for the
# pinned torch, is left out. pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, ...) apply; PYTHON
# names the interpreter to start from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.installed
wanted=$({ pwd; cat pyproject.toml constraints.txt launch/install.sh; } | sha256sum)
if [[ -x .venv/bin/tandem && -f $stamp && $(<"$stamp") == "$wanted" ]]; then exit 0; fi

say() { printf 'install: %s (%d s)\n' "$1" "$SECONDS"; }
has_cuda_torch() { "$1" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }
quiet=()
[[ -t 1 ]] || quiet=(--quiet)
install() { .venv/bin/python -m pip install --disable-pip-version-check "${quiet[@]}" --constraint "$constraints" "$@"; }

python=
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then python=$candidate && break; fi
done
if [[ -z $python ]]; then
    echo "install: no Python 3.11 or newer on this machine; name one with PYTHON=/path/to/python3" >&2
    exit 2
fi

rm -rf .venv
system=()
if has_cuda_torch "$python"; then system=(--system-site-packages); fi
"$python" -m venv "${system[@]}" .venv
touch .venv/.tandem
say "made .venv with $("$python" --version)"

export DS_BUILD_OPS=0 # DeepSpeed compiles no operators: none is used
constraints=.venv/constraints.txt
if has_cuda_torch .venv/bin/python; then
    .venv/bin/python -c 'import torch; print("torch==" + torch.__version__)' >"$constraints"
    say "keeping the $(<"$constraints") of this machine"
else
    cp constraints.txt "$constraints"
    say "installing torch"
    install torch
fi
install 'setuptools>=77'
say "installing the rest"
install --no-build-isolation --editable '.[dev]'

# Commands of packages that the machine already had start the machine's Python, which does not see this environment.
.venv/bin/python - torchrun pytest mypy lint-imports <<'PYTHON'
import importlib.metadata, pathlib, sys

for name in sys.argv[1:]:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    script = pathlib.Path(sys.executable).with_name(name)
    if not script.exists():
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom {command.module} import {command.attr}\n"
                          f"sys.exit({command.attr}())\n")
        script.chmod(0o755)
PYTHON
printf '%s' "$wanted" >"$stamp"
say "done"
