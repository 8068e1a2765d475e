#!/usr/bin/env bash
# All CI checks, from a fresh clone: environment -> build -> lint -> types -> tests. It is safe to run again at any time.
# PYTHON=python3.12 picks the interpreter for a new environment; the pinned packages are in requirements-dev.txt.
set -euo pipefail
cd "$(dirname "$0")"
python=.venv/bin/python

[[ -x $python ]] || "${PYTHON:-python3}" -m venv .venv
stamp=.venv/installed.txt # torch's pin and requirements-dev.txt as last installed
torch=torch==2.13.0
wanted=$(echo "$torch" && cat requirements-dev.txt)
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  echo "== packages"
  "$python" -m pip install --quiet "$torch"
  "$python" -m pip install --quiet -r requirements-dev.txt
  echo "$wanted" >"$stamp"
fi

echo "== build"
"$python" -m pip install --quiet --disable-pip-version-check --editable .
"$python" -m yaongi.kernels

echo "== lint and types"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy

echo "== Triton kernels in the interpreter"
TRITON_INTERPRET=1 "$python" -m pytest -q -n 2 -m interpret tests/kernels

echo "== tests"
"$python" -m pytest -q -n 2 --durations 30 --hypothesis-profile ci -m "not gpu and not interpret and not long"
