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

from embedrl_verl.data.parquet import SCHEMA
from recipes.tiny_digits.models import build_tiny_model
from tests.report.inputs import Seen

Command = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def shown(embedrl: Command, file: Path, tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Data sources and text of the page that `embedrl data show` writes."""

    def show(*options: object) -> tuple[list[str], str]:
        assert embedrl("data", "show", file, "--out", tmp_path / "deep" / "p.html", *options) == 0
        seen = Seen((tmp_path / "deep" / "p.html").read_text(encoding="utf-8"))
        return [one["data-source"] for one in seen.all("article")], seen.characters

    return show


def test_show_needs_nothing_but_the_file(embedrl: Command, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = file.with_suffix(".html")
    assert embedrl("data", "show", file) == embedrl("data", "show", file, "--limit", 5) == 0  # its own may be replaced
    out = capsys.readouterr().out
    assert "6 of 6 records, 2 with a fault" in out and "5 of 6 records" in out and page.exists()
    page.write_text("<p>mine</p>")
    assert embedrl("data", "show", file) == 2
    assert "name another file with --out" in capsys.readouterr().err and page.read_text() == "<p>mine</p>"


def test_records_can_be_chosen(shown: Callable[..., tuple[list[str], str]], model: Path) -> None:
    assert shown("--pair-id", "bare", "clip")[0] == ["videos", "text"]
    sources, text = shown("--only", "problems")
    assert sources == ["odd", "vqa"] and "6 records were looked through" in text
    assert shown("--only", "problems", "--limit", 1)[0] == ["odd"]
    assert "random in each source, seed 3" in shown("--seed", 3, "--limit", 5)[1]
    boxes = [
        shown("--pair-id", "image", *units)[1] for units in (["--family", "qwen2_5_vl"], ["--boxes", "absolute"], [])
    ]
    assert boxes[0] == boxes[1] != boxes[2]
    options = ["--tokenizer", model, "--prompt-style", "compact", "--max-response-length", 20, "--image-min-tokens", 4]
    assert "tokens; the recipe's limit is 20" in shown("--pair-id", "image", *options)[1]


def test_cards_have_the_verdicts_of_the_judge(shown: Callable[..., tuple[list[str], str]], tmp_path: Path) -> None:
    assert "relevance" not in shown()[1]
    verdicts = pa.table({"pair_id": ["clip", "image", "elsewhere"], "verdict": ["mismatch", "match", "match"]})
    pq.write_table(verdicts, tmp_path / "other.parquet")
    assert "relevance mismatch" in shown("--verdicts", tmp_path / "other.parquet", "--pair-id", "clip")[1]
    (tmp_path / "other.parquet").rename(tmp_path / "verdicts.parquet")
    text = shown()[1]
    assert [text.count(f"relevance {verdict}") for verdict in ("match", "mismatch", "not judged")] == [1, 1, 4]


def test_a_row_that_is_no_record_is_shown(shown: Callable[..., tuple[list[str], str]], file: Path) -> None:
    rows = pq.read_table(file).to_pylist()[:2]
    rows[1]["target"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    sources, text = shown()
    assert sources == ["vqa", "docs"] and "pairs.parquet, row 1: field target: null" in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--limit", 0], 2, "'--limit': Input should be greater than or equal to 1"),
        (["--max-mib", 0.1], 2, "'--max-mib': Input should be greater than or equal to 0.25"),
        (["--max-response-length", 0], 2, "'--max-response-length': Input should be greater than or equal to 1"),
        (["--seed", 1, "--pair-id", "clip"], 2, "give one of the two"),
        (["--pair-id", "nobody"], 3, "no row has the pair_id 'nobody'"),
        (["--set", "data.max_promt_length=5"], 2, "max_promt_length"),
        (["--tokenizer", "nowhere"], 2, "--tokenizer nowhere"),
    ],
)
def test_what_cannot_work_is_told(
    embedrl: Command, file: Path, capsys: pytest.CaptureFixture[str], options: list[object], code: int, message: str
) -> None:
    assert embedrl("data", "show", file, *options) == code and message in capsys.readouterr().err


def test_stats_counts_tokens(embedrl: Command, file: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokenizer", model, "--prompt-style", "compact", "--image-min-tokens", 4]
    assert embedrl("data", "stats", file, *options, "--limit", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()).endswith("length side rows mean p50 p90 p99 max limit over share over")
    assert any(line.split()[:3] == ["all", "prompt", "query"] for line in lines)
    assert "4 of 6 records counted" in lines[-1]
    options += ["--set", "data.max_prompt_length=9", "data.max_response_length=8", "--max-prompt-length", 150]
    assert embedrl("data", "stats", file, *options, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["counted"], report["unusable"]) == (6, 5, 1)
    assert "row 4, pair 'broken', field query: media path 'gone.png'" in report["first_unusable"][0]
    found = {(one["source"], one["measure"], one["side"]): one for one in report["lengths"] + report["all"]}
    assert found["vqa", "prompt", "query"]["limit"] == 150 and found["all", "prompt", "query"]["rows"] == 5
    assert (
        found["odd", "tcot", "query"]["max"] == 2 and found["odd", "tcot", "query"]["limit"] == 8
    )  # with its end token
    assert ("text", "tcot", "query") not in found  # a side without one has no length


def test_pages_need_neither_torch_nor_verl(file: Path) -> None:
    code = (
        "import sys; from embedrl_verl.report import stats; from embedrl_verl.cli import main; "
        f"assert main(['data', 'show', {str(file)!r}, '--limit', '2', '--out', {str(file) + '.html'!r}]) == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'verl', 'ray', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
