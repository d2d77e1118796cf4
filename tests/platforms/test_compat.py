# SPDX-License-Identifier: Apache-2.0
"""What the package uses of the inside of verl and others is all in `compat.TABLE`, and is there as the table says."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

import embedrl_verl
from embedrl_verl.errors import PluginError
from embedrl_verl.platforms import compat
from embedrl_verl.platforms.compat import TABLE, installed_version, moved, parameters_of, require_version

PACKAGE = Path(embedrl_verl.__file__).parent
UPSTREAM = ("verl.", "vllm.", "transfer_queue.", "transformers.")
STATED = {(row.owner, row.name) for row in TABLE}
NOT_UPSTREAM = {"_SubParsersAction", "_asdict", "_exit", "_private", "_initializing"}
"""Underscores of the standard library, and the module `ray._private`."""


def test_upstream_still_has_every_row_as_it_is_stated():
    """The message names our files that need another look."""
    assert not moved(), "\n".join(moved())


def test_every_row_is_used_by_its_files():
    """When a file is moved, its rows go with it; when nobody uses a name any more, its row goes."""
    rows_of = sorted(TABLE, key=lambda row: (row.owner, row.files))
    for (owner, files), rows in groupby(rows_of, lambda row: (row.owner, row.files)):
        names = [owner.rpartition(".")[2] if row.name.startswith("__") else row.name for row in rows]
        texts = [(PACKAGE / file).read_text() if (PACKAGE / file).is_file() else "" for file in files]
        unused = [name for name in names if not any(name in text for text in texts)]
        idle = [file for file, text in zip(files, texts, strict=True) if not any(name in text for name in names)]
        assert not unused and not idle, f"platforms/compat.py, {owner}: nobody uses {unused}; {idle} use none of them"


def test_every_file_that_uses_a_private_name_is_named():
    private = {row.name for row in TABLE if row.name.startswith("_") and not row.name.startswith("__")}
    named = {(row.name, file) for row in TABLE for file in row.files}
    used = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", None)
            if name in private:
                used.add((name, file.relative_to(PACKAGE).as_posix()))
    left = sorted(used - named)
    assert not left, f"add files to the rows of platforms/compat.py: {left}"


def overrides() -> Iterator[tuple[str, str, str]]:
    """(our class, upstream class, method) of what our classes, mixins too, override and upstream has a body for."""
    for module in pkgutil.walk_packages(embedrl_verl.__path__, "embedrl_verl."):
        if not module.name.endswith(("__main__", "megatron_engine")) and ".forkserver" not in module.name:
            importlib.import_module(module.name)
    pending, seen = [object], set()
    while pending:
        cls = pending.pop()
        new = [one for one in type.__subclasses__(cls) if one not in seen and "<locals>" not in one.__qualname__]
        pending += new
        seen.update(new)
        for place, own in enumerate(cls.__mro__ if str(cls.__module__).startswith("embedrl_verl.") else ()):
            for name in vars(own) if own.__module__.startswith("embedrl_verl.") else ():
                above = (one for one in cls.__mro__[place + 1 :] if name in vars(one))
                upstream = next((one for one in above if one.__module__.startswith(UPSTREAM)), None)
                if upstream is None or (name.startswith("__") and name not in ("__init__", "__new__")):
                    continue
                if name != "_abc_impl" and not getattr(vars(upstream)[name], "__isabstractmethod__", False):
                    yield own.__qualname__, f"{upstream.__module__}.{upstream.__qualname__}", name


def test_every_method_of_upstream_that_our_classes_override_is_stated():
    optional = {"is_platform_available"}  # of verl's platforms, with a default
    left = {one for one in overrides() if one[1:] not in STATED and one[2] not in optional}
    assert not left, f"add rows to platforms/compat.py (our class, upstream class, method): {sorted(left)}"


def test_the_engine_that_cannot_be_imported_here_is_stated_too():
    tree = ast.parse((PACKAGE / "embedder" / "megatron_engine.py").read_text())
    classes = (one for one in ast.walk(tree) if isinstance(one, ast.ClassDef))
    methods = {one.name for cls in classes for one in cls.body if isinstance(one, ast.FunctionDef)}
    base = "verl.workers.engine.megatron.transformer_impl.MegatronEngine"
    left = {name for name in methods if parameters_of(base, name) is not None and (base, name) not in STATED}
    assert methods and not left, f"add rows to platforms/compat.py: {base} {sorted(left)}"


def test_every_private_name_of_others_that_the_package_reads_is_stated():
    own, read = set(), {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            own.add(getattr(node, "name", None))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
                read.setdefault(node.attr, set()).add(str(file.relative_to(PACKAGE)))
            elif isinstance(node, ast.ImportFrom) and "._" in (node.module or ""):
                for one in node.names:
                    read.setdefault(one.name, set()).add(str(file.relative_to(PACKAGE)))
    left = {name: files for name, files in read.items() if name not in own | NOT_UPSTREAM}
    missing = {name: files for name, files in left.items() if name not in {row.name for row in TABLE}}
    assert not missing, f"add rows to platforms/compat.py: {missing}"


def test_a_release_that_has_moved_something_is_told_with_our_files(tmp_path):
    folder = tmp_path / "verl" / "trainer"
    folder.mkdir(parents=True)
    (folder / "constants_ppo.py").write_text("def get_ppo_ray_runtime_env(config, extra=()): ...\n")
    lines = moved("verl", tmp_path)
    assert len(lines) == sum(row.owner.startswith("verl") for row in TABLE)
    (changed,) = [line for line in lines if "is gone" not in line]
    assert "has now the parameters (config, extra=()), not (config=None)" in changed
    assert "embedrl_verl/platforms/cluster.py" in changed


@pytest.mark.parametrize("found", ["0.24.0", "0.24.0+cpu", "0.24.0+cu130"])
def test_the_same_release_passes_whatever_its_build(found):
    require_version("vllm", found, "0.24.0", "the test")


@pytest.mark.parametrize("found", ["0.24.1", "0.25.0+cpu", None])
def test_another_release_is_named_with_the_fix(found):
    with pytest.raises(PluginError) as caught:
        require_version("vllm", found, "0.24.0", "the test")
    assert f"the test is written for vllm 0.24.0; found {found or 'none'}. Install vllm==0.24.0" in str(caught.value)


def test_a_distribution_that_is_not_installed_has_no_version():
    assert installed_version("no-such-distribution-of-any-name") is None
    assert parameters_of("no_such_package.module", "name") is None


STUB = f"""#!/bin/sh
if [ "$2" != pip ]; then exec {sys.executable} "$@"; fi
[ -n "$VERSION" ] || {{ echo "no route to host" >&2; exit 1; }}
eval folder="\\${{$(($# - 1))}}"
mkdir -p "$folder/verl-$VERSION.dist-info"
printf 'Metadata-Version: 2.1\\nName: verl\\nVersion: %s\\n' "$VERSION" >"$folder/verl-$VERSION.dist-info/METADATA"
"""


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("", "not compared: the package registry cannot be reached or has no verl (no route to host)"),
        (compat.VERL_VERSION, f"{compat.VERL_VERSION}, the pinned version: nothing to compare"),
        ("9.9.9", "run_ppo is gone; look at embedrl_verl/train.py"),
    ],
)
def test_the_newest_verl_is_told_of_and_never_fails_the_run(version, says, tmp_path):
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o700)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "VERSION": version}
    command = ["bash", str(PACKAGE.parent / "scripts" / "newest_verl.sh")]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
