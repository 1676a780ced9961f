#!/usr/bin/env bash
# Set up, check style and types, run the tests. Arguments go to pytest:
#     bash run_tests.sh                    # everything
#     bash run_tests.sh -m "not slow"      # only the fast tests, for every edit
#     bash run_tests.sh -k lora
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash install.sh
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then source .venv/bin/activate; fi

ruff check .
ruff format --check .
mypy

# Two processes with one thread each, a test file at a time, are faster than one process with all threads.
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
