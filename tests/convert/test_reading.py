# SPDX-License-Identifier: Apache-2.0
"""Raw rows of every kind of file, and the files of a repository of the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_preprocess.colpali_train import ColPaliTrain
from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.rows import as_arrow, count_rows, is_jsonl, read_rows
from embedrl_verl.errors import DataError, ResourceError
from tests.convert.conftest import records

COMMIT = "c0ffee" + "0" * 34


def read(folder: Path, name: str, wanted: Any = None) -> list[tuple[int, Any]]:
    """Rows as they are read; errors as their text."""
    arrow = as_arrow(name, folder / name, folder / "cache")
    found = read_rows(arrow, range(count_rows(name, arrow)) if wanted is None else wanted, is_jsonl(name))
    return [(row, str(values) if isinstance(values, RowError) else values) for row, values in found]


def table(count: int) -> pa.Table:
    return pa.table({"n": list(range(count)), "text": [f"row {index}\u2028\x85 " + "x" * 50 for index in range(count)]})


@pytest.mark.parametrize("name", ["a [1].jsonl", "b.jsonl.gz", "c.parquet", "data-0.arrow"])
@pytest.mark.parametrize("count", [0, 2000])
def test_every_kind_of_file_gives_the_wanted_rows(tmp_path: Path, name: str, count: int) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table(count).to_pylist())
    (tmp_path / "a [1].jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(table(count), tmp_path / "c.parquet", row_group_size=700)
    with pa.OSFile(str(tmp_path / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table(1).schema) as stream:
        stream.write_table(table(count), max_chunksize=500)
    expected = list(enumerate(table(count).to_pylist()))
    assert read(tmp_path, name) == expected
    if count:
        for wanted in ([0], [count - 1], [3, 699, 700, 1500], range(1000, 1100)):
            assert read(tmp_path, name, wanted) == [expected[row] for row in wanted]


@pytest.mark.parametrize("name", ["f.jsonl", "a::b.jsonl", ".cache/[x] *.jsonl", "hf:/x?.jsonl"])
def test_a_bad_line_is_named_and_the_others_are_read_in_a_file_of_any_name(tmp_path: Path, name: str) -> None:
    lines = [b'\xef\xbb\xbf{"n":\r0}\r', b"{broken", b"[1]", b'{"t": "\xff"}', b"", b"  \r", b'{"n": "\xe2\x80\xa8"}']
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"\n".join([*lines, b"[" * 100_000, b'{"n": "\0"}', b'{"torn": ']))
    found = dict(read(tmp_path, name))
    assert (found[0], found[6]) == ({"n": 0}, {"n": "\u2028"})
    assert found[4] is found[5] is None  # blank lines are passed over, and count
    assert found[2] == "a line must be a JSON object; got [1] (list)"
    for line in (1, 3, 7, 8, 9):
        assert found[line].startswith("the line is not JSON in UTF-8 (")


def test_columns_of_any_arrow_type_are_read_whatever_features_the_file_claims(tmp_path: Path) -> None:
    words = pa.array([f"w{index // 90}" for index in range(300)])
    maps = pa.array([[("k", index)] for index in range(300)], pa.map_(pa.string(), pa.int64()))
    lists = pa.array([[word] for word in words.to_pylist()], pa.list_(pa.string()))
    kinds = {"d": words.dictionary_encode(), "v": words.cast(pa.string_view()), "l": words.cast(pa.large_string())}
    claim = {"huggingface": json.dumps({"info": {"features": {"d": {"_type": "OfALaterRelease"}}}})}
    found = pa.table({**kinds, "m": maps, "nested": lists}).replace_schema_metadata(claim)
    pq.write_table(found, tmp_path / "f.parquet", row_group_size=70)
    assert [row for _, row in read(tmp_path, "f.parquet")] == found.to_pylist()
    assert [row for row, _ in read(tmp_path, "f.parquet", [0, 69, 70, 299])] == [0, 69, 70, 299]


def test_a_string_column_that_is_no_unicode_costs_one_row(tmp_path: Path) -> None:
    values = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"t": values}), tmp_path / "f.parquet")
    found = read(tmp_path, "f.parquet")
    assert [found[0], found[2]] == [(0, {"t": "good"}), (2, {"t": "fine"})]
    assert found[1][1].startswith("field t: a string must be UTF-8")


def test_a_file_of_an_unknown_kind_or_with_two_columns_of_one_name_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"f\.csv: unknown kind of file; known are \.parquet, \.jsonl"):
        read(tmp_path, "f.csv")
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 2, ["n", "n"]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: cannot be read \(two columns have one name: n, n\)"):
        read(tmp_path, "d.parquet")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, roots: dict[str, Path]) -> list[str]:
    """A hub with one repository, the fixture of colpali_train_set; the files that were downloaded."""
    folder, asked = roots["colpali"], []

    class Hub:
        def dataset_info(self, repo: str, revision: str | None) -> SimpleNamespace:
            if repo != "someone/pages":
                raise httpx.ConnectError("no such host\nat all")
            return SimpleNamespace(sha=COMMIT)

        def list_repo_files(self, repo: str, repo_type: str, revision: str) -> list[str]:
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]

    def download(repo: str, name: str, repo_type: str, revision: str) -> str:
        asked.append(f"{name}@{revision}")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_hub_id_gives_the_records_of_the_local_copy_and_is_pinned_to_a_commit(
    hub: list[str], roots: dict[str, Path], tmp_path: Path
) -> None:
    given = ["--input", "someone/pages@main", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert convert_main(ColPaliTrain, "colpali", given) == 0
    local = ["--input", str(roots["colpali"]), "--out", str(tmp_path / "local"), "--workers", "1"]
    assert convert_main(ColPaliTrain, "colpali", local) == 0
    assert records(tmp_path / "out") == records(tmp_path / "local")
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert card["build"]["location"] == f"hf://datasets/someone/pages@{COMMIT}"
    # the two files of the split train, and not those of the split test
    assert set(hub) == {f"data/train-0000{number}-of-00002.parquet@{COMMIT}" for number in (0, 1)}


def test_files_of_the_hub_match_patterns_as_local_ones_do(
    hub: list[str], roots: dict[str, Path], tmp_path: Path
) -> None:
    local, remote = InputRoot(roots["colpali"]), InputRoot("someone/pages")
    for pattern in ("**/*.parquet", "data/train-*.parquet", "*.parquet", "**/data/*.parquet", "data/**/t*.parquet"):
        assert remote.files(pattern) == local.files(pattern), pattern
    for name in ("a-10", "a-2"):
        (tmp_path / name).touch()
    assert InputRoot(tmp_path).files("a-*", "a-2") == ["a-2", "a-10"]


def test_a_hub_that_does_not_answer_is_one_sentence(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"the hub does not give a data set of this name \(ConnectError: no such host\)$"
    with pytest.raises(ResourceError, match=f"someone/nothing: no such file or folder here, and {message}"):
        InputRoot("someone/nothing")
    with pytest.raises(DataError, match="no such file or folder, and not a hub id"):
        InputRoot("/gone")

    def silent(*_: object, **__: object) -> None:
        raise httpx.ReadTimeout("timed out")  # no OSError

    root = InputRoot("someone/pages")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", silent)
    with pytest.raises(ResourceError, match=r"f\.jsonl cannot be read; run the command again .*timed out"):
        root.path("f.jsonl")
