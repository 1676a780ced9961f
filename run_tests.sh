#!/usr/bin/env bash
# Set up and test. Arguments go to pytest: bash run_tests.sh -k lora
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash install.sh
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then source .venv/bin/activate; fi
ruff check .
python -m pytest "$@"
