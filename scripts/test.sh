#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the test suite; sets up .venv first when it is missing or out of date. Arguments go to pytest:
#
#   bash scripts/test.sh                     # everything, the end-to-end tests too
#   bash scripts/test.sh -m "not e2e"        # without those that start Ray and vLLM
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
unset PYTHONDONTWRITEBYTECODE # compiled once, not in every process of the end-to-end tests
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$ROOT/.venv/bin/ruff" check .
"$ROOT/.venv/bin/ruff" format --check .
"$ROOT/.venv/bin/mypy"
exec "$ROOT/.venv/bin/python" -m pytest "$@"
