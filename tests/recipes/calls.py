# SPDX-License-Identifier: Apache-2.0
"""Runs recipes with a script in place of Python, which writes its calls down and leaves what later stages look for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Stages run at once, and one printf is two writes, before and after the line feed: hence the lock.
STAND_IN = f"""#!/usr/bin/env bash
[[ "${{2:-}}" != embedrl_verl.platforms.forkserver ]] || exit 0
exec 9>>"$CALLS.lock" && flock 9
printf '%s\\0' "$@" $'\\n' >>"$CALLS"
exec 9>&-
if [[ "$1" == - ]]; then # a script on standard input: has the model <emb>, or what a configuration says
    [[ -n "${{HAS_EMB:-}}" ]] && exit "$HAS_EMB" || exec {sys.executable} "$@"
fi
if [[ "${{WRITES:-}}" && "$2" == embedrl_verl.train ]]; then # what verl, vLLM and Ray leave
    mkdir -p "$RAY_TMPDIR/ray/session_1/logs"
    ln -sfn session_1 "$RAY_TMPDIR/ray/session_latest"
    printf 'of this run' >"$RAY_TMPDIR/ray/session_1/logs/worker.out"
    touch "$TMPDIR/ckpt_1.lock"
fi
[[ "${{2##*.}}" != "${{FAIL:-}}" ]] || exit 1
if [[ "${{2##*.}}" == "${{INTERRUPT:-}}" ]]; then # Ctrl-C reaches the whole group
    [[ "$INTERRUPT" != train ]] || printf 'step 3: update' >"${{VERL_FILE_LOGGER_PATH%jsonl}}stage"
    kill -INT 0
    exec sleep 60
fi
for word in "$@"; do
    case "$word" in
        trainer.default_local_dir=*) made=${{made:-${{word#*=}}}} ;;
        contrastive.out=*) made=${{word#*=}}/checkpoints ;;
    esac
    [[ "${{previous:-}}" != --out ]] || exported=$word
    previous=$word
done
made=${{made//\\'/}}
case "$*" in
    *"-m embedrl_verl.train "* | *"-m embedrl_verl.stage1 "*)
        mkdir -p "$made/global_step_7/actor" ${{EMBEDDER:+"$made/global_step_7/embedder"}}
        echo 7 >"$made/latest_checkpointed_iteration.txt"
        ;;
    *"export "*"--kind embedder"*) mkdir -p "$exported" ;;
esac
"""


class Recipe:
    """A recipe with an environment that holds only what is named (and PATH, HOME), and OUT in a folder of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.out, self.said, self.cwd = folder / "out", "", ROOT
        self._calls, self._python = folder / "calls", folder / "python"
        self._command = ["bash", str(ROOT / "recipes" / name)]
        self._python.write_text(STAND_IN)
        self._python.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> tuple[int, list[list[str]]]:
        """Exit code, and the arguments of each call of Python; what was printed is in `said`."""
        self._calls.unlink(missing_ok=True)
        env = {name: os.environ[name] for name in ("PATH", "HOME")}
        env |= {"OUT": str(self.out), "PYTHON": str(self._python), "CALLS": str(self._calls), **variables}
        done = subprocess.run(
            [*self._command, *arguments],
            env=env,
            cwd=self.cwd,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            start_new_session=True,
        )
        self.said = done.stdout + done.stderr
        calls = self._calls.read_text().split("\0\n\0")[:-1] if self._calls.exists() else []
        return done.returncode, [call.split("\0") for call in calls]

    def modules(self, *arguments: str, **variables: str) -> list[str]:
        """Last names of the modules that a run without error calls."""
        code, calls = self.run(*arguments, **variables)
        assert code == 0, self.said
        return modules_of(calls)


def modules_of(calls: list[list[str]]) -> list[str]:
    """`train` of `-m embedrl_verl.train`, `table` of `table.py`; scripts on standard input are left out."""
    return [call[1].split(".")[-1] if call[0] == "-m" else Path(call[0]).stem for call in calls if call[0] != "-"]
