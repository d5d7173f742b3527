#!/usr/bin/env bash
# Make .venv with Tandem (editable) and its dependencies, at the versions of constraints.txt. Do nothing if .venv is up to date.
#
#   PYTHON=python3.12     the Python to make .venv with; later calls keep it. Else python3, or the newest that fits.
#   TORCH_BUILD=cpu|cuda  the build of torch. Else the CPU build if this machine has no GPU and the index offers one.
#
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, ...) set where packages come from.
# pip writes to .venv/install.log. After a failure the next call continues. After a change of the versions it installs the new
# ones into the same .venv. It makes .venv again only if Python, the build of torch or the place of this folder has changed.
#
# Torch comes first, alone: DeepSpeed has no wheel, and its build must see the torch that will be used instead of
# fetching another one. A machine with GPUs whose Python already has a CUDA torch keeps it: that build matches its
# driver and network, and ours would not. Then the ranges of pyproject.toml hold and constraints.txt, made for the
# pinned torch, is left out.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/install.sh
set -euo pipefail
say() { printf 'install: %s (%d s)\n' "$1" "$SECONDS"; }
refuse() { printf 'install: %s\n' "$1" >&2; exit 2; }
fail() { printf 'install: %s; log: %s; run launch/install.sh again to continue\n' "$1" "$log" >&2; exit 1; }
content() { cat -- "$1" 2>/dev/null || true; }

[[ $(uname -s) == Linux ]] || refuse "this system is $(uname -s), but Tandem runs only on Linux"
[[ ${PYTHON:-} != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

# 10^9 bytes, x86_64. launch/pins.py checks cuda_fetched and rest_fetched; a CPU build is not in the public index.
cuda_fetched=3.0 cuda_unpacked=5.5
rest_fetched=0.4
cpu_fetched=0.6 cpu_unpacked=2.5

log=.venv/install.log
stamp=.venv/.installed
place=$(pwd -P)
started=.venv/.tandem # the marker of a .venv that this script made; holds the place that its programs name
wanted=$({ echo "$place"; cat pyproject.toml constraints.txt launch/install.sh; } | sha256sum)

# The minor versions of a range in pyproject.toml: the first that fits and the first that does not.
minors_of() { sed -nE "s/^ *$1>=[0-9]+\.([0-9]+),<[0-9]+\.([0-9]+)\".*/\1 \2/p" pyproject.toml; }
pythons=$(minors_of 'requires-python = "')
torches=$(minors_of '"torch')

# --- Python

# Prints why a Python cannot be used, or nothing. Runs on any Python from 2.7 on.
why_not() {
    "$1" - "$pythons" 2>/dev/null <<'PYTHON' || echo "does not start"
import platform, sys
low, high = sys.argv[1].split()
wrong = None
if not (3, int(low)) <= sys.version_info[:2] < (3, int(high)):
    wrong = "is Python %d.%d" % sys.version_info[:2]
elif sys.maxsize < 2**32:
    wrong = "is a 32-bit program"
elif platform.libc_ver()[0] != "glibc":
    wrong = "does not use glibc, for which torch is built"
elif [int(part) for part in platform.libc_ver()[1].split(".")[:2]] < [2, 28]:
    wrong = "runs on glibc %s; torch needs 2.28" % platform.libc_ver()[1]
else:
    try:
        import ensurepip, venv
    except ImportError:
        wrong = "cannot make environments (on Debian and Ubuntu: apt install python3-venv)"
if wrong:
    print(wrong)
PYTHON
}

# The program behind links and environments: two names of one Python are the same.
identity() { "$1" -c 'import os, sys; print(os.path.realpath(sys._base_executable), "%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || true; }

choose_python() {
    local known lowest end reason rejected=()
    read -r lowest end <<<"$pythons"
    local versions="Tandem needs Python 3.$lowest to 3.$((end - 1))"
    known=$(sed -n 's/^executable = //p' .venv/pyvenv.cfg 2>/dev/null || true)
    if [[ -n ${PYTHON:-} ]]; then
        reason=$(why_not "$PYTHON")
        [[ -z $reason ]] || refuse "PYTHON=$PYTHON $reason; $versions; name another, or unset PYTHON"
        python=$PYTHON
        # The same Python may be named by a program in .venv, which is removed if .venv is made again.
        if [[ -n $known && $(identity "$known") == "$(identity "$python")" ]]; then python=$known; fi
        return
    fi
    if [[ -n $known ]]; then
        reason=$(why_not "$known")
        if [[ -z $reason ]]; then python=$known && return; fi
        say "the Python of .venv, $known, $reason; looking for another"
    fi
    local candidate minor
    for candidate in python3 $(for ((minor = end - 1; minor >= lowest; minor--)); do echo "python3.$minor"; done); do
        command -v "$candidate" >/dev/null || continue
        reason=$(why_not "$candidate")
        if [[ -z $reason ]]; then python=$candidate && return; fi
        rejected+=("$candidate $reason")
    done
    printf -v reason '%s; ' "${rejected[@]:-no python3 on the path}"
    refuse "$reason$versions; install one, or name it: PYTHON=/path/to/python3 launch/install.sh"
}

# --- steps of pip

# Runs pip and shows how far it is; a failure ends the script with one line. With --maybe it only returns 3 if no index that
# answered has the version, or if pip's own settings forbid it.
pip_install() {
    local title=$1 maybe='' first status=0
    shift
    [[ $1 != --maybe ]] || { maybe=yes && shift; }
    first=$(wc -l <"$log")
    mkdir -p .venv/tmp
    TMPDIR=$PWD/.venv/tmp .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
        --constraint "$constraints" "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    show_progress "$title"
    wait "$child" || status=$?
    child=
    rm -rf .venv/tmp
    [[ $status -ne 0 ]] || return 0
    local said
    said=$(tail -n +"$((first + 1))" "$log")
    if [[ -n $maybe ]] && ! unreachable "$said"; then
        ! grep -q 'No matching distribution found for torch==' <<<"$said" || return 3
        [[ -n ${TORCH_BUILD:-} ]] || ! grep -q 'Cannot install torch==' <<<"$said" || return 3
    fi
    fail "$title: $(explain "$status" "$said")"
}

# Every two seconds on a terminal, on one line; else a line every 20 seconds. pip downloads to TMPDIR, then unpacks.
show_progress() {
    local pause=20 next
    [[ ! -t 1 ]] || pause=2
    next=$((SECONDS + pause))
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2
        [[ $SECONDS -ge $next ]] || continue
        next=$((SECONDS + pause))
        [[ ! -t 1 ]] || printf '\r\033[K'
        printf 'install: %s: %d MB fetched, %d MB unpacked (%d s)' "$1" "$(megabytes .venv/tmp)" "$(megabytes .venv/lib)" "$SECONDS"
        [[ -t 1 ]] || printf '\n'
    done
    [[ ! -t 1 ]] || printf '\r\033[K'
}
megabytes() { { du -sm -- "$1" 2>/dev/null || true; } | awk '{ n = $1 } END { print n + 0 }'; }

unreachable() {
    grep -qE 'NewConnectionError|ConnectTimeout|ConnectionError|ReadTimeout|ProxyError|IncompleteRead|Connection broken|RemoteDisconnected|name resolution|Network is unreachable' <<<"$1"
}

# The cause of pip's failure and the remedy, in one line: pip's exit status, what it wrote.
explain() {
    local said=$2 missing asked pin
    missing=$(sed -nE 's/^ERROR: No matching distribution found for ([^ ]+).*/\1/p' <<<"$said" | tail -n 1)
    # pip says contradiction if a pinned version has no file, and why an index gave no file only if it is asked to be verbose.
    while read -r pin; do
        asked=$(.venv/bin/python -m pip install -vv --dry-run --no-deps --no-input "$pin" 2>&1 </dev/null) || said+=$'\n'$asked
        ! grep -q 'No matching distribution found for' <<<"$asked" || missing=$pin
    done < <(sed -nE 's/^ *The user requested \(constraint\) ([^ ]+).*/\1/p' <<<"$said" | { grep -xFf constraints.txt || true; }; [[ -z $missing ]] || echo "$missing")
    if [[ $1 -ge 128 ]]; then
        echo "pip was killed (signal $(($1 - 128))); if memory ran out, free some"
    elif grep -qE 'No space left on device|Errno 28|Disk quota exceeded|Errno 122' <<<"$said"; then
        echo "no space left on the disk of $PWD, or of pip's cache ($(.venv/bin/python -m pip cache dir 2>/dev/null)); free some"
    elif grep -qE 'CERTIFICATE_VERIFY_FAILED|SSLError' <<<"$said"; then
        echo "the index's certificate is not trusted here; name your certificate authority's file in PIP_CERT"
    elif grep -qE '(401|403|407) (Client Error|Unauthorized|Forbidden|Proxy Auth)|Tunnel connection failed: (401|403|407)' <<<"$said"; then
        echo "the index or the proxy refuses access; give a name and a password in PIP_INDEX_URL or HTTPS_PROXY"
    elif unreachable "$said"; then
        echo "the package index does not answer; check the network, HTTPS_PROXY and PIP_INDEX_URL"
    elif [[ -n $missing && -n ${PIP_NO_INDEX:-} ]]; then
        echo "PIP_FIND_LINKS=${PIP_FIND_LINKS:-} has no file for $missing; add it (see \"Installing\" in launch/README.md)"
    elif [[ -n $missing ]]; then
        echo "the index has no file of $missing for this Python and machine; use an index with every package of constraints.txt, or another PYTHON"
    elif grep -qE 'ResolutionImpossible|conflicting dependencies' <<<"$said"; then
        echo "versions contradict each other:$(grep -m 1 -A 3 'The conflict is caused by' <<<"$said" | tail -n +2 | tr -s ' \n' ' '); $(whose_constraints)"
    elif grep -qE "command '[^']*(cc|[gc]\+\+|clang)' failed|No such file or directory: '[^']*(cc|[gc]\+\+|clang)'|Python\.h" <<<"$said"; then
        echo "a package must be compiled: install a C compiler and Python's headers (on Debian and Ubuntu: apt install gcc python3-dev)"
    elif grep -qE 'Permission denied|Errno 13' <<<"$said"; then
        echo "$(grep -m 1 -oE "Permission denied: '[^']*'" <<<"$said" || echo 'Permission denied'); make it writable for $(id -un)"
    else
        sed -nE 's/^ *(ERROR|error): //p' <<<"$said" | tail -n 1
    fi
}

whose_constraints() {
    local files
    files=$(.venv/bin/python -m pip config list 2>/dev/null | sed -nE "s/^[^=]*\.constraint='(.*)'$/\1/p" | tr '\n' ' ')
    if [[ -n $files ]]; then echo "pip's settings on this machine add constraints; allow these versions in ${files% }"; else echo "report this"; fi
}

# A setting of pip's files that leads packages away from .venv. No variable overrules these. With /dev/null pip reads no file.
misleading_setting() {
    [[ ${PIP_CONFIG_FILE:-} != /dev/null ]] || return 0
    { PIP_QUIET=0 .venv/bin/python -m pip --python '' config list 2>/dev/null || true; } |
        sed -nE "s/^((global|install)\.(target|prefix|root|python)='.+')$/\1/p" | tail -n 1
}

# --- the machine

has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg ]]; }
has_cuda_torch() { env -u CUDA_VISIBLE_DEVICES "$1" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; }

# Whether this Python has a torch that runs on the GPU, that Tandem can use and that was not unwanted.
brings_torch() {
    [[ ${TORCH_BUILD:-} != cpu ]] && has_gpu && has_cuda_torch "$1" || return 1
    "$1" - "$torches" <<'PYTHON' || { say "the torch of $1 is outside pyproject.toml's range; installing another" && return 1; }
import sys, torch
low, end = map(int, sys.argv[1].split())
major, minor = map(int, torch.__version__.split(".")[:2])
raise SystemExit(not (major == 2 and low <= minor < end))
PYTHON
}

# Refuses if the disk cannot take this many 10^9 bytes beside what .venv holds already; pip keeps what it fetched until it has
# unpacked it.
needs_space() {
    local short
    short=$(df -Pk .venv/ | awk -v fetched="$1" -v unpacked="$2" -v have="$(megabytes .venv/)" '
        NR == 2 { free = $4 * 1024 / 1e9; left = fetched + unpacked - have / 1000 }
        END { if (free < left) printf "%.1f GB more and its disk has %.1f GB free", left, free }')
    [[ -z $short ]] ||
        refuse "$PWD/.venv needs $short; free some, or replace .venv with a link to an empty folder on another disk"
}

torch_pin() { sed -n 's/^torch==//p' constraints.txt; }

install_torch() {
    if [[ ${TORCH_BUILD:-} == cpu ]] || { [[ -z ${TORCH_BUILD:-} ]] && ! has_gpu; }; then
        needs_space "$cpu_fetched" "$cpu_unpacked"
        say "looking for a CPU build of torch; all packages together: about $cpu_fetched GB to download, $cpu_unpacked GB on disk"
        local status=0
        grep -v '^torch==' constraints.txt >"$constraints"
        pip_install "torch for CPUs" --maybe "torch==$(torch_pin)+cpu" || status=$?
        cp constraints.txt "$constraints"
        if [[ $status -eq 0 ]]; then
            say "installed the CPU build of torch $(torch_pin)"
            return
        fi
        [[ ${TORCH_BUILD:-} != cpu ]] ||
            fail "TORCH_BUILD=cpu: the index has no torch==$(torch_pin)+cpu; name PyTorch's CPU index in PIP_EXTRA_INDEX_URL, or unset TORCH_BUILD"
        say "the index has none: using the CUDA build, which also runs on CPUs (PyTorch's CPU index in PIP_EXTRA_INDEX_URL would save 3 GB on disk and 2.4 GB of download)"
    fi
    needs_space "$cuda_fetched" "$cuda_unpacked"
    say "installing torch with CUDA's libraries; all packages together: about $cuda_fetched GB to download, $cuda_unpacked GB on disk"
    # To pip a local version such as +cpu is the newer one.
    pip_install "torch" "torch!=$(torch_pin)+cpu"
}

# What Triton and torch need on a GPU, found now instead of at the first step.
warn_about_gpu() {
    has_gpu || return 0
    has_cuda_torch .venv/bin/python ||
        say "WARNING: $(.venv/bin/python -c 'import torch; print("torch", torch.__version__, "for CUDA", torch.version.cuda)') does not see the GPU of this machine; update its driver, or name an index with a build for the driver in PIP_INDEX_URL and remove .venv"
    local lacks=()
    command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || lacks+=("a C compiler")
    .venv/bin/python -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        lacks+=("Python's headers")
    [[ ${#lacks[@]} -eq 0 ]] || say "WARNING: kernels will not start on this GPU without ${lacks[0]}${lacks[1]:+ and ${lacks[1]}} (on Debian and Ubuntu: apt install gcc python3-dev)"
}

# --- the run

# Prints why .venv cannot stay, or nothing. A Python that was removed or upgraded leaves links behind that lead nowhere.
outdated() {
    local made_at
    made_at=$(content "$started")
    if [[ $made_at != "$place" ]]; then
        [[ -z $made_at ]] || echo ".venv was made in $made_at"
    elif ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        [[ ! -e .venv/pyvenv.cfg ]] || echo "the Python of .venv does not start"
    elif [[ -n ${PYTHON:-} && $(identity "$PYTHON") != "$(identity .venv/bin/python)" ]]; then
        echo ".venv was made with $(identity .venv/bin/python)"
    elif [[ -n ${TORCH_BUILD:-} && $(torch_build) != "$TORCH_BUILD" && -n $(torch_build) ]]; then
        echo ".venv has the $(torch_build) build of torch"
    else
        return 1
    fi
}
torch_build() {
    if compgen -G '.venv/lib/python3*/site-packages/torch-*+cpu.dist-info' >/dev/null; then
        echo cpu
    elif keeps_torch || compgen -G '.venv/lib/python3*/site-packages/torch-*.dist-info' >/dev/null; then
        echo cuda
    fi
}
keeps_torch() { grep -q 'include-system-site-packages = true' .venv/pyvenv.cfg 2>/dev/null; }
is_done() { [[ -x .venv/bin/tandem && $(content "$stamp") == "$wanted" ]] && ! outdated >/dev/null; }

[[ -z ${TORCH_BUILD:-} || $TORCH_BUILD =~ ^(cpu|cuda)$ ]] || refuse "TORCH_BUILD=$TORCH_BUILD is not valid; use cpu or cuda, or unset it"
# What would lead Python or pip to other packages, or away from .venv.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_NO_DEPENDENCIES
export PIP_USER=0 PIP_NO_DEPS=0 PIP_DRY_RUN=0 PIP_REQUIRE_HASHES=0 # which overrule pip's files
if is_done; then exit 0; fi

[[ $place != *$'\n'* ]] || refuse "the path of this folder contains a line break, which is not possible in a script's first line; rename the folder"
[[ -w . ]] || refuse "$(id -un) may not write to $PWD, where .venv is made; copy the repository to a folder of your own"
[[ ! -L .venv || -d .venv ]] || refuse ".venv is a link to $(readlink .venv), which is not a folder; make that folder, or remove the link"
[[ ! -e .venv || -e $started || -z $(ls -A .venv) ]] || refuse "$PWD/.venv was not made by this script; move it away"

child=
stop() {
    [[ -z $child ]] || kill "$child" 2>/dev/null || true
    printf '\ninstall: interrupted; run launch/install.sh again to continue\n' >&2
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

# One installation at a time: a second one waits, then finds the work done.
exec 9<.
flock --nonblock 9 || {
    holder=$(awk -v file=":$(stat -c %i .)\$" '$2 == "FLOCK" && $6 ~ file { print $5; exit }' /proc/locks 2>/dev/null) || true
    say "another launch/install.sh is working on .venv; waiting for it${holder:+ (process $holder of user $(stat -c %U "/proc/$holder" 2>/dev/null))}"
    flock 9
}
if is_done; then exit 0; fi

if reason=$(outdated); then
    choose_python
    [[ -z $reason ]] || say "$reason; making it again with $python"
    options=()
    if brings_torch "$("$python" -c 'import sys; print(sys._base_executable)')"; then options=(--system-site-packages); fi
    # Emptied, not removed: it may be a link to another disk. The marker stays, by which the next call knows a .venv half emptied.
    mkdir -p .venv
    { : >"$started" && find -H .venv -mindepth 1 ! -path "$started" -delete; } 2>/dev/null ||
        refuse "$(id -un) may not remove what is in $PWD/.venv; remove it as its owner"
    "$python" -m venv "${options[@]}" "$(cd .venv && pwd -P)" >"$log" 2>&1 9<&- ||
        fail "$python cannot make .venv: $(grep -v '^ *$' "$log" | tail -n 1)"
    printf '%s' "$place" >"$started"
    say "made .venv with $("$python" --version) ($(command -v "$python"))"
elif [[ -e $stamp ]]; then
    say "updating .venv to the versions of constraints.txt, with $(.venv/bin/python --version)"
else
    say "continuing the installation into .venv, with $(.venv/bin/python --version)"
fi

setting=$(misleading_setting)
[[ -z $setting ]] ||
    refuse "pip's configuration files on this machine set $setting, which would install packages outside .venv; remove that setting (.venv/bin/python -m pip --python '' config debug lists the files), or ignore the files with PIP_CONFIG_FILE=/dev/null launch/install.sh, and set PIP_INDEX_URL and PIP_CERT as the files do"

export DS_BUILD_OPS=0 # DeepSpeed compiles no operators: none is used
constraints=.venv/constraints.txt
if keeps_torch; then
    .venv/bin/python -c 'import torch; print("torch==" + torch.__version__)' >"$constraints"
    say "keeping the $(<"$constraints") of this machine"
else
    cp constraints.txt "$constraints"
    install_torch
fi
pip_install "setuptools" 'setuptools>=77'
say "installing the other packages, at most $rest_fetched GB to download"
pip_install "other packages" --no-build-isolation --editable '.[dev]'

# Commands of packages that the machine already had start the machine's Python, which does not see this environment.
.venv/bin/python - torchrun pytest mypy lint-imports <<'PYTHON'
import importlib.metadata, pathlib, sys

for name in sys.argv[1:]:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    script = pathlib.Path(sys.executable).with_name(name)
    if not script.exists():
        # A shell starts Python, since a path with a space cannot stand in the first line.
        script.write_text("#!/bin/sh\n'''exec' \"$(dirname \"$0\")/python\" \"$0\" \"$@\"\n' '''\nimport sys\n"
                          f"from {command.module} import {command.attr}\nsys.exit({command.attr}())\n")
        script.chmod(0o755)
PYTHON
warn_about_gpu
printf '%s' "$wanted" >"$stamp"
say "done"
