#!/usr/bin/env bash
# Makes FOLDER/tandem, with a link to each of our folders: launch/links.sh FOLDER. A program with FOLDER on its path (PYTHONPATH,
# MYPYPATH) imports tandem.trainer, tandem.kernels and tandem.data_prep from this checkout without installing it.
set -euo pipefail
[[ $# -eq 1 ]] || { echo "links: name one folder for the links: launch/links.sh FOLDER" >&2 && exit 2; }
mkdir -p "$1/tandem"
folder=$(CDPATH='' cd -- "$1/tandem" && pwd)
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
for package in trainer kernels data_prep; do ln -sfn "$PWD/$package" "$folder/$package"; done
