# SPDX-License-Identifier: Apache-2.0
"""`embedrl data show` and `embedrl data stats` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.cli import main
from embedrl_verl.data.parquet import SCHEMA
from recipes.tiny_digits.models import build_tiny_model
from tests.report.conftest import Seen

Show = Callable[..., tuple[list[str], str]]
COUNTED = ("--prompt-style", "compact", "--image-min-tokens", 4)


def embedrl(*words: object) -> int:
    return main(["data", *map(str, words)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def shown(file: Path, tmp_path: Path) -> Show:
    """Data sources and text of the page that `embedrl data show` writes."""

    def show(*options: object) -> tuple[list[str], str]:
        assert embedrl("show", file, "--out", tmp_path / "deep" / "p.html", *options) == 0
        seen = Seen((tmp_path / "deep" / "p.html").read_text(encoding="utf-8"))
        return [one["data-source"] for one in seen.all("article")], seen.characters

    return show


def test_show_needs_nothing_but_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embedrl("show", file) == embedrl("show", file, "--limit", 5) == 0  # its own page may be replaced
    out = capsys.readouterr().out
    assert "6 of 6 records, 2 with a fault" in out and "5 of 6 records" in out
    file.with_suffix(".html").write_text("<p>mine</p>")
    assert embedrl("show", file) == 2 and file.with_suffix(".html").read_text() == "<p>mine</p>"
    assert "name another file with --out" in capsys.readouterr().err


def test_records_can_be_chosen(shown: Show, model: Path) -> None:
    assert shown("--pair-id", "bare", "clip")[0] == ["videos", "text"]
    sources, text = shown("--only", "problems")
    assert sources == ["odd", "vqa"] and "6 records were looked through" in text
    assert shown("--only", "problems", "--limit", 1)[0] == ["odd"]
    assert "random in each source, seed 3" in shown("--seed", 3, "--limit", 5)[1]
    units: tuple[tuple[str, ...], ...] = (("--family", "qwen2_5_vl"), ("--boxes", "absolute"), ())
    boxes = [shown("--pair-id", "image", *some)[1] for some in units]
    assert boxes[0] == boxes[1] != boxes[2]
    counted = shown("--pair-id", "image", "--tokenizer", model, *COUNTED, "--max-response-length", 20)[1]
    assert "tokens; the recipe's limit is 20" in counted


def test_cards_have_the_verdicts_of_the_judge(shown: Show, tmp_path: Path) -> None:
    assert "relevance" not in shown()[1]
    verdicts = pa.table({"pair_id": ["clip", "image", "elsewhere"], "verdict": ["mismatch", "match", "match"]})
    pq.write_table(verdicts, tmp_path / "other.parquet")
    assert "relevance mismatch" in shown("--verdicts", tmp_path / "other.parquet", "--pair-id", "clip")[1]
    (tmp_path / "other.parquet").rename(tmp_path / "verdicts.parquet")
    text = shown()[1]
    assert [text.count(f"relevance {verdict}") for verdict in ("match", "mismatch", "not judged")] == [1, 1, 4]


def test_what_cannot_work_is_told(file: Path, shown: Show, capsys: pytest.CaptureFixture[str]) -> None:
    assert embedrl("show", file, "--max-response-length", 0) == embedrl("show", file, "--limit", 0) == 2
    assert embedrl("show", file, "--seed", 1, "--pair-id", "clip") == 2
    assert embedrl("show", file, "--pair-id", "nobody") == 3
    assert "no row has the pair_id 'nobody'" in capsys.readouterr().err
    rows = pq.read_table(file).to_pylist()[:2]
    rows[1]["target"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    sources, text = shown()
    assert sources == ["vqa", "docs"] and "pairs.parquet, row 1: field target: null" in text


def test_stats_counts_tokens(file: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embedrl("stats", file, "--tokenizer", model, *COUNTED, "--limit", 4) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "data source length side rows mean p50 p90 p99 max limit over share over"
    assert any(line.startswith("all prompt query 4 ") for line in lines) and "4 of 6 records counted" in lines[-1]
    limits = ["--set", "data.max_prompt_length=9", "data.max_response_length=8", "--max-prompt-length", 150]
    assert embedrl("stats", file, "--tokenizer", model, *COUNTED, *limits, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["counted"], report["unusable"]) == (6, 5, 1)
    assert "row 4, pair 'broken', field query: media path 'gone.png'" in report["first_unusable"][0]
    found = {(one["source"], one["measure"], one["side"]): one for one in report["lengths"] + report["all"]}
    assert found["vqa", "prompt", "query"]["limit"] == 150 and found["all", "prompt", "query"]["rows"] == 5
    assert found["odd", "tcot", "query"]["max"] == 2 and found["odd", "tcot", "query"]["limit"] == 8  # and end token
    assert ("text", "tcot", "query") not in found  # a side without one has no length


def test_pages_need_neither_torch_nor_verl(file: Path) -> None:
    code = (
        "import sys; from embedrl_verl.report import stats; from embedrl_verl.cli import main; "
        f"assert main(['data', 'show', {str(file)!r}, '--limit', '2', '--out', {str(file) + '.html'!r}]) == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'verl', 'ray', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
