#!/usr/bin/env bash
# Set up and test. Arguments go to pytest: bash run_tests.sh -k lora
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash install.sh
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then source .venv/bin/activate; fi
ruff check .
export OMP_NUM_THREADS=1 # two processes, a file of tests each, are faster than one process with all threads
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
