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


def titles(page: Seen) -> list[str]:
    """The data sources of the records that a page shows."""
    return [str(one["data-source"]) for one in page.all("article")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def shown(embedrl: Command, file: Path, tmp_path: Path) -> Callable[..., Seen]:
    """The page that `embedrl data show` writes."""

    def show(*options: object) -> Seen:
        assert embedrl("data", "show", file, "--out", tmp_path / "deep" / "p.html", *options) == 0
        return Seen((tmp_path / "deep" / "p.html").read_text(encoding="utf-8"))

    return show


def test_show_needs_nothing_but_the_file(embedrl: Command, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = file.with_suffix(".html")
    assert embedrl("data", "show", file) == 0
    assert "6 of 6 records, 2 with a fault" in capsys.readouterr().out
    assert len(titles(Seen(page.read_text()))) == 6
    assert embedrl("data", "show", file, "--limit", 5) == 0  # its own page may be replaced
    assert len(titles(Seen(page.read_text()))) == 5
    page.write_text("<p>mine</p>")
    assert embedrl("data", "show", file) == 2
    assert "name another file with --out" in capsys.readouterr().err and page.read_text() == "<p>mine</p>"


def test_records_can_be_chosen(shown: Callable[..., Seen]) -> None:
    assert titles(shown("--pair-id", "clip", "bare")) == ["videos", "text"]
    faulty = shown("--only", "problems")
    assert len(titles(faulty)) == 2 and "6 records were looked through" in faulty.characters
    assert len(titles(shown("--only", "problems", "--limit", 1))) == 1
    assert "random in each source, seed 3" in shown("--seed", 3, "--limit", 5).characters


def test_cards_have_the_verdicts_of_the_judge(shown: Callable[..., Seen], tmp_path: Path) -> None:
    verdicts = pa.table({"pair_id": ["clip", "image", "elsewhere"], "verdict": ["mismatch", "match", "match"]})
    assert "relevance" not in shown().characters
    pq.write_table(verdicts, tmp_path / "other.parquet")
    named = shown("--verdicts", tmp_path / "other.parquet", "--pair-id", "clip")
    assert "relevance mismatch" in named.characters
    (tmp_path / "other.parquet").rename(tmp_path / "verdicts.parquet")
    seen = shown().characters
    found = [seen.count(f"relevance {verdict}") for verdict in ("match", "mismatch", "not judged")]
    assert found == [1, 1, 4] and str(tmp_path / "verdicts.parquet") in seen


def test_a_row_that_is_no_record_is_shown_with_its_reason(shown: Callable[..., Seen], file: Path) -> None:
    rows = pq.read_table(file).to_pylist()[:2]
    rows[1]["target"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    seen = shown()
    assert seen.all("article")[1]["data-flags"] == "unreadable"
    assert "pairs.parquet, row 1: field target: null" in seen.characters


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--limit", 0], 2, "'--limit': Input should be greater than or equal to 1"),
        (["--max-mib", 0.1], 2, "'--max-mib': Input should be greater than or equal to 0.25"),
        (["--seed", 1, "--pair-id", "clip"], 2, "give one of the two"),
        (["--max-response-length", 0], 2, "--max-response-length must be at least 1; got 0"),
        (["--family", "llava"], 2, "llava"),
        (["--pair-id", "nobody"], 3, "no row has the pair_id 'nobody'"),
        (["--set", "data.max_promt_length=5"], 2, "max_promt_length"),
    ],
)
def test_what_cannot_work_is_told(
    embedrl: Command, file: Path, capsys: pytest.CaptureFixture[str], options: list[object], code: int, message: str
) -> None:
    assert embedrl("data", "show", file, *options) == code
    assert message in capsys.readouterr().err


def test_show_reads_boxes_in_the_units_that_are_named(shown: Callable[..., Seen]) -> None:
    options = (["--family", "qwen2_5_vl"], ["--boxes", "absolute"], [])
    pages = [shown("--pair-id", "image", *some).all("rect", "line")[0] for some in options]
    assert pages[0] == pages[1] != pages[2]


def test_show_with_a_tokenizer_says_what_is_too_long(shown: Callable[..., Seen], model: Path) -> None:
    options = ["--tokenizer", model, "--prompt-style", "compact", "--max-response-length", 20, "--image-min-tokens", 4]
    seen = shown("--pair-id", "image", *options)
    assert seen.all("article")[0]["data-flags"] == "too_long"
    assert "The T-CoT has " in seen.characters and "the recipe's limit is 20" in seen.characters


def test_stats_counts_what_training_counts(
    embedrl: Command, file: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from verl.utils.tokenizer import hf_processor, hf_tokenizer

    from embedrl_verl.config.schema import MediaConfig
    from embedrl_verl.data.inspection import PairInspector, locate_pairs
    from embedrl_verl.data.lengths import PromptMeter

    options = ["--tokenizer", model, "--prompt-style", "compact", "--image-min-tokens", 4]
    options += ["--set", "data.max_prompt_length=9", "data.max_response_length=8", "--max-prompt-length", 150]
    assert embedrl("data", "stats", file, *options, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["counted"], report["unusable"]) == (6, 5, 1)
    assert "row 4, pair 'broken', field query: media path 'gone.png'" in report["first_unusable"][0]
    tokenizer, processor = hf_tokenizer(str(model)), hf_processor(str(model))
    settings = MediaConfig(prompt_style="compact", image_min_tokens=4)
    meter = PromptMeter(tokenizer, processor, "qwen2_vl", {})
    pairs, _ = locate_pairs([str(file)])
    facts = PairInspector(settings, "qwen2_vl", None, meter).inspect(pairs[0])
    found = {(one["source"], one["measure"], one["side"]): one for one in report["lengths"]}
    assert found["vqa", "prompt", "query"]["max"] == facts.tokens["query"]
    assert found["vqa", "tcot", "query"]["max"] == len(tokenizer(pairs[0].record.query.tcot)["input_ids"]) + 1
    assert found["vqa", "prompt", "query"]["limit"] == 150 and found["vqa", "tcot", "query"]["limit"] == 8
    assert ("text", "tcot", "query") not in found  # a side without one has no length
    assert {one["source"] for one in report["all"]} == {"all"}


def test_stats_prints_a_table(embedrl: Command, file: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokenizer", model, "--prompt-style", "compact", "--limit", 4]
    assert embedrl("data", "stats", file, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data source") and lines[0].endswith(
        "p50     p90     p99     max   limit    over  share over"
    )
    assert any(line.startswith("all ") for line in lines) and "4 of 6 records counted" in lines[-1]


def test_stats_refuses_a_folder_without_a_tokenizer(
    embedrl: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedrl("data", "stats", file, "--tokenizer", tmp_path) == 2
    assert f"--tokenizer {tmp_path}" in capsys.readouterr().err


def test_check_takes_a_data_set_folder_with_its_own_media(
    embedrl: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    (folder / "media").mkdir(parents=True)
    rows = pq.read_table(file).slice(4, 2)
    pq.write_table(rows, folder / "part-00000.parquet")
    assert embedrl("data", "check", folder) == 3
    assert f"no such file in the media root {folder / 'media'}" in capsys.readouterr().out


def test_pages_need_neither_torch_nor_verl(file: Path) -> None:
    modules = "card, evidence, examine, lengths, page, recipe, rows, show"
    code = (
        f"import sys; from embedrl_verl.report import {modules}; from embedrl_verl.cli import main; "
        f"assert main(['data', 'show', {str(file)!r}, '--limit', '2', '--out', {str(file) + '.html'!r}]) == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'verl', 'ray', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
