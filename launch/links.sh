#!/usr/bin/env bash
# Make FOLDER/tandem with a link to each package of this checkout: launch/links.sh FOLDER. With FOLDER on PYTHONPATH or MYPYPATH,
# a program imports tandem.trainer, tandem.kernels and tandem.data_prep from this checkout without an installation.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as sh launch/links.sh
set -euo pipefail
[[ $# -eq 1 ]] || { echo "links: give one folder for the links: launch/links.sh FOLDER" >&2 && exit 2; }
mkdir -p "$1/tandem"
folder=$(CDPATH='' cd -- "$1/tandem" && pwd)
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
for package in trainer kernels data_prep configs; do ln -sfn "$PWD/$package" "$folder/$package"; done
