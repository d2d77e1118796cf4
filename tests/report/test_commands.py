# SPDX-License-Identifier: Apache-2.0
"""`embedrl data show` and `embedrl data stats`, from the choice of rows to what they print."""

import json
import subprocess
import sys
from array import array
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.cli import main
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.table import PairTable
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.report.lengths import LengthMeter, RecipeLimits, recipe_limits, summaries
from embedrl_verl.report.rows import choose
from recipes.tiny_digits.models import build_tiny_model
from tests.report.conftest import Seen

pytestmark = pytest.mark.usefixtures("file")
FILE = "pairs.parquet"
COUNTED = ("--prompt-style", "compact", "--image-min-tokens", 4)


def embedrl(*words):
    return main(["data", *map(str, words)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def shown(*options):
    """Data sources and text of the page that `embedrl data show` writes."""
    assert embedrl("show", FILE, "--out", "deep/p.html", *options) == 0
    seen = Seen(Path("deep/p.html").read_text())
    return [one["data-source"] for one in seen.all("article")], seen.characters


def test_show_needs_nothing_but_the_file(capsys):
    heavy = "any(name in sys.modules for name in ('torch', 'verl', 'ray', 'transformers'))"
    code = f"import sys; from embedrl_verl.cli import main; sys.exit(main(['data', 'show', {FILE!r}]) or {heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert embedrl("show", FILE) == 0 and "6 of 6 records, 2 with a fault" in capsys.readouterr().out
    Path("pairs.html").write_text("<p>mine</p>")
    assert embedrl("show", FILE) == 2 and Path("pairs.html").read_text() == "<p>mine</p>"
    assert "name another file with --out" in capsys.readouterr().err


def test_records_can_be_chosen(model):
    assert shown("--pair-id", "bare", "clip")[0] == ["videos", "text"]
    sources, text = shown("--only", "problems")
    assert sources == ["odd", "vqa"] and "6 records were looked through" in text
    assert shown("--only", "problems", "--limit", 1)[0] == ["odd"]
    assert "random in each source, seed 3" in shown("--seed", 3, "--limit", 5)[1]
    absolute = shown("--pair-id", "image", "--boxes", "absolute")
    assert absolute == shown("--pair-id", "image", "--family", "qwen2_5_vl") != shown("--pair-id", "image")
    counted = shown("--pair-id", "image", "--tokenizer", model, *COUNTED, "--max-response-length", 20)[1]
    assert "tokens; the recipe's limit is 20" in counted


def test_cards_have_the_verdicts_of_the_judge():
    assert "relevance" not in shown()[1]
    verdicts = pa.table({"pair_id": ["clip", "image", "elsewhere"], "verdict": ["mismatch", "match", "match"]})
    pq.write_table(verdicts, "other.parquet")
    assert "relevance mismatch" in shown("--verdicts", "other.parquet", "--pair-id", "clip")[1]
    Path("other.parquet").rename("verdicts.parquet")
    text = shown()[1]
    assert [text.count(f"relevance {verdict}") for verdict in ("match", "mismatch", "not judged")] == [1, 1, 4]


def test_what_cannot_work_is_told(capsys):
    write_pairs([], "empty.parquet")
    assert embedrl("show", FILE, "--seed", 1, "--pair-id", "clip") == embedrl("show", FILE, "--limit", 0) == 2
    assert embedrl("show", FILE, "--pair-id", "nobody") == embedrl("show", "empty.parquet") == 3
    err = capsys.readouterr().err
    assert "no row has the pair_id 'nobody'" in err and "no rows in empty.parquet" in err
    pq.write_table(pq.read_table(FILE).set_column(0, "pair_id", pa.array([None, *"abcde"])), FILE)
    assert "pairs.parquet, row 0: pair_id must not be empty" in shown()[1]


def test_stats_counts_tokens(model, capsys):
    assert embedrl("stats", FILE, "--tokenizer", model, *COUNTED, "--limit", 4) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "data source length side rows mean p50 p90 p99 max limit over share over"
    assert any(line.startswith("all prompt query 4 ") for line in lines) and "4 of 6 records counted" in lines[-1]
    limits = ["--set", "data.max_prompt_length=9", "data.max_response_length=8", "--max-prompt-length", 150]
    assert embedrl("stats", FILE, "--tokenizer", model, *COUNTED, *limits, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["counted"]) == (6, 5)
    assert "row 4, pair 'broken', field query: media path 'gone.png'" in report["first_unusable"][0]
    found = {(one["source"], one["measure"], one["side"]): one for one in report["lengths"] + report["all"]}
    assert found["vqa", "prompt", "query"]["limit"] == 150 and found["all", "prompt", "query"]["rows"] == 5
    assert found["odd", "tcot", "query"]["max"] == 2 and found["odd", "tcot", "query"]["limit"] == 8  # and end token
    assert ("text", "tcot", "query") not in found  # a side without one has no length


def test_every_source_is_shown_and_shares_follow_sizes():
    names = ["large"] * 300 + ["small"] * 30 + ["tiny"]
    write_pairs([PairRecord(str(row), name, "", Item("q"), Item("t")) for row, name in enumerate(names)], FILE)
    table = PairTable([FILE])
    assert Counter(names[row] for row in choose(table, 34)) == {"large": 30, "small": 3, "tiny": 1}
    assert choose(table, 7) == [0, 75, 150, 224, 299, 300, 330] and choose(table, 1000) == list(range(331))
    assert [len(choose(table, limit, seed)) for limit in (1, 2, 330) for seed in (None, 1)] == [1, 1, 2, 2, 330, 330]
    assert choose(table, 20, seed=1) == choose(table, 20, seed=1) != choose(table, 20, seed=2)


def test_percentiles_are_lengths_that_rows_have():
    tokens = {("b", "text", "query"): array("i", [3, 1, 2]), ("a", "prompt", "target"): array("i", range(100, 0, -1))}
    many, few = summaries(tokens, LengthMeter(RecipeLimits(max_prompt_length=95), None))
    assert list(many.values()) == ["a", "prompt", "target", 100, 50.5, 50, 90, 99, 100, 95, 5, 0.05]
    assert list(few.values()) == ["b", "text", "query", 3, 2.0, 2, 3, 3, 3, 480, 0, 0.0]


def test_limits_are_those_of_the_recipe_its_overrides_and_named_options():
    assert recipe_limits(["trainer.nnodes=1"], {}) == RecipeLimits()
    overrides = ["data.max_prompt_length=99", "data.embedrl.max_frames=3", "embedrl.evidence.max_items=2"]
    limits = recipe_limits(overrides, {"max_frames": 5, "media_root": "m"})
    assert (limits.max_prompt_length, limits.evidence.max_items) == (99, 2)
    assert (limits.data.max_frames, limits.media_root) == (5, "m")
