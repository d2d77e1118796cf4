# SPDX-License-Identifier: Apache-2.0
"""Hub ids without the hub: `huggingface_hub` itself talks to a server of this process that has one repository."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest

from embedrl_verl.convert.inputs import RemoteRoot
from embedrl_verl.convert.rows import read_rows, survey
from embedrl_verl.data.files import pair_files
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.errors import ResourceError
from tests.convert.golden import conversions, records_of
from tests.convert.make_fixtures import write_all

ROOT = Path(__file__).parents[2]
REPOSITORY, COMMIT = "someone/pages", "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Answers the four questions that the client asks: repository, revision, list of files, bytes of a file."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.asked.append(f"{path} {self.headers.get('Range', '')}".strip())
        tree = f"/api/datasets/{REPOSITORY}/tree/{COMMIT}"
        files = f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path in (f"/api/datasets/{REPOSITORY}{rest}" for rest in ("", "/revision/main", f"/revision/{COMMIT}")):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        elif path.startswith(tree) and (folder := self.folder / path[len(tree) + 1 :]).is_dir():
            found = sorted(folder.rglob("*") if "recursive=True" in query else folder.iterdir())
            self._json([self._entry(entry) for entry in found])
        elif path.startswith(files) and (file := self.folder / path[len(files) :]).is_file():
            first, last = self.headers.get("Range", f"bytes=0-{file.stat().st_size - 1}")[6:].split("-")
            self._answer(206, file.read_bytes()[int(first) : int(last) + 1])
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if COMMIT in path else "RepoNotFound"})

    def _entry(self, path: Path) -> dict[str, Any]:
        entry = {"path": path.relative_to(self.folder).as_posix(), "oid": "0" * 40, "size": path.stat().st_size}
        if path.is_dir():
            return {**entry, "type": "directory"}
        large = {"oid": hashlib.sha256(path.read_bytes()).hexdigest(), "size": entry["size"], "pointerSize": 100}
        return {**entry, "type": "file", "lfs": large}

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("fixtures"), pairs=6)


@pytest.fixture(scope="module")
def hub(roots: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for) of a hub with the fixture of colpali_train_set."""
    handler = type("OneRepository", (Hub,), {"folder": roots["colpali"], "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()


def script(hub: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "data_preprocess/colpali_train.py", *options]
    outside = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(part) for part in command], env={**os.environ, **outside}, capture_output=True, text=True, timeout=300
    )


def test_a_hub_id_gives_the_records_of_the_local_copy_and_is_pinned_to_a_commit(
    hub: tuple[str, list[str]], roots: dict[str, Path], tmp_path: Path
) -> None:
    address, asked = hub
    done = script(address, "--input", f"{REPOSITORY}@main", "--out", tmp_path / "out", "--workers", 2)
    assert done.returncode == 0, done.stderr
    converter, root = conversions(roots)["colpali_answer"]
    found = [record for file in pair_files([tmp_path / "out"]) for record in read_pairs(file)]
    assert found == list(records_of(converter, root))
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert card["input"]["location"] == f"hf://datasets/{REPOSITORY}@{COMMIT}"
    for file in card["input"]["files"]:
        assert file["sha256"] == hashlib.sha256((root / file["file"]).read_bytes()).hexdigest()
    resolved = {line.split()[0] for line in asked if "/resolve/" in line}
    assert len(resolved) == 2  # the two files of the split train, and not those of the split test
    assert all(" bytes=" in line for line in asked if "/resolve/" in line)  # in pieces, never whole


@pytest.mark.parametrize(
    ("location", "code", "message"),
    [
        ("someone/nothing", 4, "the hub does not give a data set of this name (RepositoryNotFoundError"),
        ("a--b/c", 3, "and not a hub id (Cannot have -- or .. in repo_id"),
    ],
)
def test_a_wrong_hub_id_is_one_sentence(
    hub: tuple[str, list[str]], tmp_path: Path, location: str, code: int, message: str
) -> None:
    done = script(hub[0], "--input", location, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert message in done.stderr


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    done = script("http://127.0.0.1:9", "--input", REPOSITORY, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert "the hub does not give a data set of this name (ConnectError" in done.stderr


def test_a_hub_that_falls_silent_stops_the_job_and_rejects_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f.jsonl").write_text("{}\n")
    root = RemoteRoot("file", str(tmp_path), "hf://datasets/someone/pages@commit")

    def silent(*args: object, **kwargs: object) -> None:
        raise httpx.ReadTimeout("timed out")  # no OSError

    facts = survey(root, "f.jsonl")
    for name in ("glob", "info", "open"):
        monkeypatch.setattr(fsspec.filesystem("file"), name, silent)
    questions = (
        lambda: root.files("*.jsonl"),
        lambda: root.size("f.jsonl"),
        lambda: root.sha256("f.jsonl"),
        lambda: survey(root, "f.jsonl"),
        lambda: list(read_rows(root, "f.jsonl", np.arange(facts.rows))),
    )
    for question in questions:
        with pytest.raises(ResourceError, match=r"someone/pages@commit: .* cannot be read \(timed out\); run the comm"):
            question()


def test_a_stream_that_breaks_off_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.jsonl").write_text('{"n": 0}\n')

    class Broken:
        def seek(self, offset: int) -> None: ...
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *args: object) -> None: ...
        def readline(self, limit: int) -> bytes:
            raise httpx.RemoteProtocolError("peer closed connection")

    root = RemoteRoot("file", str(tmp_path), "hub")
    monkeypatch.setattr(root, "open", lambda name: Broken())
    with pytest.raises(ResourceError, match="cannot be read .peer closed connection"):
        list(read_rows(root, "f.jsonl", np.arange(1)))
