#!/usr/bin/env bash
# Set up: the packages of requirements.txt into the active environment, or else into .venv. Does nothing the second time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -f .venv/bin/activate ] || { echo "creating .venv"; python3 -m venv .venv; }
    source .venv/bin/activate
fi
stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.svd_xtend_installed"
if cmp -s requirements.txt "$stamp"; then
    exit 0
fi
echo "installing the packages of requirements.txt into ${VIRTUAL_ENV:-$CONDA_PREFIX}"
if ! command -v nvidia-smi >/dev/null && ! python -c "import torch" 2>/dev/null; then
    python -m pip install --quiet torch==2.13.0  # no GPU: the release the tests passed with
fi
python -m pip install --quiet -r requirements.txt
cp requirements.txt "$stamp"
