#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the newest verl in the package registry has moved of its inside that this package uses (platforms/compat.py).
#
# It tells, and ends with 0 whatever it finds: a release that somebody else makes must not break this project's tests,
# and a registry that cannot be reached is no fault of the code. verl goes into a throw-away folder, without what it
# depends on, and is read, not imported. At most 50 s.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! timeout 50 "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary :all: \
    --retries 0 --timeout 10 --target "$folder" verl 2>"$folder/log"; then
    echo "[newest verl] not compared: the package registry cannot be reached or has no verl ($(tail -n 1 "$folder/log" | cut -c 1-200))"
    exit 0
fi
PYTHONPATH="$ROOT" "$PYTHON" - "$folder" <<'PY' || echo "[newest verl] not compared: see the error above"
import sys
from importlib.metadata import distributions
from pathlib import Path

from embedrl_verl.platforms.compat import VERL_VERSION, moved

folder = Path(sys.argv[1])
(newest,) = (one.version for one in distributions(path=[str(folder)]) if one.metadata["Name"] == "verl")
if newest == VERL_VERSION:
    print(f"[newest verl] {newest}, the pinned version: nothing to compare")
else:
    lines = moved("verl", folder)
    print(f"[newest verl] {newest} (pinned: {VERL_VERSION}) has moved {len(lines)} of the names that we use")
    print(*(f"[newest verl]   {line}" for line in lines), sep="\n", end="\n" if lines else "")
PY
exit 0
