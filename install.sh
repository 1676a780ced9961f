#!/usr/bin/env bash
# Install the packages of requirements.txt into the active environment, or into .venv if none is active.
# If requirements.txt has not changed since the last time, this does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -f .venv/bin/activate ] || { echo "creating .venv"; python3 -m venv .venv; }
    source .venv/bin/activate
fi
stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.svd_xtend_installed" # a copy of the requirements.txt that was installed
if cmp -s requirements.txt "$stamp"; then
    exit 0
fi
if ! python -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
    echo "Python 3.11 or newer is required; found $(python --version). Activate an environment with a newer Python." >&2
    exit 1
fi
echo "installing the packages of requirements.txt into ${VIRTUAL_ENV:-$CONDA_PREFIX}"
if ! command -v nvidia-smi >/dev/null && ! python -c "import torch" 2>/dev/null; then
    python -m pip install --quiet torch==2.13.0 # without a GPU: the version that the tests passed with
fi
python -m pip install --quiet -r requirements.txt
cp requirements.txt "$stamp"
