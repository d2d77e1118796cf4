# SPDX-License-Identifier: Apache-2.0
"""`embedrl report`: one page about a run or an evaluation, from what its folder holds."""

import json
import re
from pathlib import Path

import pytest
import torch

from embedrl_verl.cli import main
from embedrl_verl.plan.preflight import probe_batch
from embedrl_verl.report.chart import HEIGHT, MAX_POINTS, WIDTH, draw
from embedrl_verl.rewards.dump import note_pairs, write_reward_dump
from tests.report.conftest import BOXES, Seen, tcot

pytestmark = pytest.mark.usefixtures("file")
HOSTILE = "</p></script><script>owned = 1</script>\"' onerror=alert(1) <img src=http://x.example/y> {{ 7 }}"
KEYWORDS = tcot({"text_keywords": ["red bus"]}, "After.")
RANKS = {  # raw, before, after
    ("words", "odd"): (1, 0, 2),
    ("image", "vqa"): (2, 1, 3),
    ("clip", "videos"): (1, 2, 1),
}


def lines_of(entries):
    return "".join(json.dumps(one) + "\n" for one in entries)


def evaluate(folder, views=("before", "after"), **facts):
    """The files of an evaluation of three pairs."""
    names, lines = ("raw", *views), []
    for (pair, source), ranks in RANKS.items():
        for view, rank in list(zip(names, ranks, strict=False))[1:]:
            one = {"view": view, "data_source": source, "pair_id": pair, "tcot": BOXES, "well_formed": True}
            lines += [one | {"side": "query", "rank": rank}, one | {"side": "target", "tcot": KEYWORDS}]
    (folder / "tcots.jsonl").write_text(lines_of(lines))
    scored = {}
    for number, name in enumerate(names):
        ranks = {source: [found[number]] for (_, source), found in RANKS.items()}
        hits = {source: [int(rank == 1) for rank in found] for source, found in ranks.items()}
        hit1 = {source: float(one[0]) for source, one in hits.items()}
        hit1["all"] = sum(hit1.values()) / len(hit1)
        scored[name] = {"hit1": hit1, "hits": hits, "ranks": ranks, "failed_rows": 0}
    sources = {source: 1 for _, source in RANKS}
    result = {"pairs": len(RANKS), "queries": sources, "views": scored, **facts}
    (folder / "evaluation.json").write_text(json.dumps(result))


@pytest.fixture
def run():
    """30 steps on the records of pairs.parquet; in the dump of step 4 `form` is constant within all groups, `mixed`
    within those of queries."""
    folder = Path("run")
    files = {"train_files": ["pairs.parquet"], "val_files": ["pairs.parquet"], "media_root": None}
    note_pairs(folder / "rl/rollouts", files | {"embedrl": {"family": "qwen2_vl", "image_min_tokens": 4}})
    batch = probe_batch()
    side, rollout = batch.side.float(), batch.rollout.float()
    parts = {"score": rollout, "form": side, "mixed": side * rollout}
    rows = [{"pair_id": "image", "data_source": "vqa", "text": BOXES, "num_images": 1, "num_frames": 0}] * len(batch)
    write_reward_dump(folder / "rl/rollouts/4.rewards.safetensors", batch, parts, rows=rows, function="f.py:f")
    metrics = [{"step": 0, "data": {"val-core/all/hit@1": 0.25, "val-core/a%2Fb/hit@1": 0.25}}]
    for step in range(1, 31):
        data = {"embedrl/reward/mean": step / 30, "embedrl/unknown/form": 0.0, "embedrl/form/query": 0.5}
        data |= {"embedrl/hit@1/mean": 0.5, "timing_s/step": 60.0, "embedrl/total_steps": 30.0, "actor/kl_loss": None}
        metrics.append({"step": step, "data": data})
    metrics[-1]["data"] |= {"val-core/all/hit@1": 0.75, "val-core/a%2Fb/hit@1": 0.75}
    (folder / "metrics.jsonl").write_text(lines_of(metrics))
    told = {"step": 20, "base_model": "models/first", "data": [{"source": "vqa", "pairs": 7}]}
    for step, lr in ((9, 1.0), (20, 5e-5)):
        checkpoint = folder / f"rl/checkpoints/global_step_{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "training.json").write_text(json.dumps(told | {"step": step, "settings": {"lr": lr}}))
    evaluate(folder)
    return folder


def page_of(*words, name="run"):
    assert main(["report", name, *words]) == 0
    return (Path(name) / "report.html").read_text()


def test_a_run_is_told_in_order_and_loads_nothing(run, capsys):
    html = page_of()
    assert capsys.readouterr().out.startswith("run/report.html: 2 of 2 records")
    seen = Seen(html)
    heads = ["Curves", "What the reward paid for", "Hit@1 by data source", "Cases"]
    places = [html.index(f"<h2>{head}</h2>") for head in heads] + [html.index("<article")]
    assert places == sorted(places)
    for said in ("models/first", "vqa 7", "5e-05", "30 of 30", "30.0 min, 60.0 s a step", "3 pairs of 3 sources"):
        assert said in seen.characters, said
    assert html.count("<b>missing</b>") == 3, "well-formed, length and KL were not logged"
    assert "KL to the first Reasoner: no step has actor/kl_loss." in seen.characters
    assert not re.search(r"https?:|url\(| style=|<link|@import", html)
    links = [value for _, one in seen.elements for key, value in one.items() if key in ("src", "href")]
    assert links and all(re.match("data:image/|#card-", link) for link in links)
    for line in seen.all("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_a_term_that_is_constant_within_all_groups_teaches_nothing_and_is_said_to(run):
    seen = Seen(page_of()).characters
    nothing = "is the same for all rollouts of every prompt"
    assert f"form {nothing}, so GRPO" in seen and f"mixed {nothing} on the query side, so GRPO" in seen
    assert f"score {nothing}" not in seen and "all rollouts have the same score" not in seen


def test_prompts_whose_rollouts_all_score_the_same_are_counted(run):
    batch = probe_batch()
    score = torch.where(batch.pair == 0, batch.rollout.float(), 1.0)
    rows = [{"pair_id": "image", "data_source": "vqa", "text": BOXES, "num_images": 1, "num_frames": 0}] * len(batch)
    path = run / "rl/rollouts/4.rewards.safetensors"
    write_reward_dump(path, batch, {"score": score}, rows=rows, function="f.py:f")
    assert "In 2 of 4 groups (50%) all rollouts have the same score" in Seen(page_of()).characters


def test_where_t_cots_do_not_help_is_said(run):
    seen = Seen(page_of()).characters
    assert "after against before: +0.000" in seen and "after against plain: -0.333" in seen
    assert "too few queries. T-CoTs have too few queries in odd, vqa, videos." in seen


def test_cases_that_rl_fixed_come_before_those_that_it_broke_with_their_ranks(run):
    seen = Seen(page_of())
    assert [one["data-source"] for one in seen.all("article")] == ["videos", "vqa"]
    fixed, broken = "Fixed: 1 of 3 pairs, 1 shown", "Broken: 1 of 3 pairs, 1 shown"
    assert seen.characters.index(fixed) < seen.characters.index(broken)
    assert "ranks: plain 1, before 2, after 1" in seen.characters and "plain 2, before 1, after 3" in seen.characters
    assert len(seen.all("g", "box")) == 4 and "before 1, after 1" in seen.characters, "one name hides no other"
    assert not Seen(page_of("--cases", "0")).all("article")


def test_an_evaluation_with_one_reasoner_is_compared_with_the_plain_input():
    Path("out").mkdir()
    prompts = {"mine": {"family": "qwen2_vl", "max_response_length": 9}}
    evaluate(Path("out"), ["mine"], prompts=prompts, files=["pairs.parquet"], media_root=None)
    seen = Seen(page_of(name="out"))
    assert [one["data-source"] for one in seen.all("article")] == ["vqa", "odd", "videos"], "fixed, broken, broken"
    assert "rank 1 with mine, but not with plain" in seen.characters and "not retrieved" in seen.characters
    assert "there is no metrics.jsonl, so this is the report of an evaluation alone" in seen.characters


def test_what_a_run_lacks_is_named(run):
    for name in ("evaluation.json", "tcots.jsonl", "rl/rollouts/4.rewards.safetensors"):
        (run / name).unlink()
    seen = Seen(page_of())
    for said in (
        "no evaluation.json; `embedrl eval --out FOLDER`",
        "no reward dump",
        "No case can be shown: there is no tcots.jsonl",
    ):
        assert said in seen.characters, said
    assert [re.sub(r"\s+", " ", row) for row in re.findall(r"a/b.*|all 0.*", seen.characters.replace("\n", " "))]
    assert "a/b0.2500.750" in seen.characters, "its own validation, first and last"


def test_cases_whose_pair_files_have_moved_need_them_named(run):
    Path("pairs.parquet").rename("moved.parquet")
    assert "No case can be shown: " in page_of()
    assert len(Seen(page_of("--data", "moved.parquet")).all("article")) == 2


def test_whatever_stands_in_a_run_is_only_shown(run):
    harmless = Seen(page_of())
    told = {"step": 21, "base_model": HOSTILE, "data": [{"source": HOSTILE, "pairs": 7}], "settings": {"lr": HOSTILE}}
    (run / "rl/checkpoints/global_step_20/training.json").write_text(json.dumps(told))
    tcots = (run / "tcots.jsonl").read_text().replace("After.", json.dumps(HOSTILE)[1:-1])
    (run / "tcots.jsonl").write_text(tcots)
    metrics = (run / "metrics.jsonl").read_text().replace("/form", json.dumps(f"/{HOSTILE}")[1:-1])
    (run / "metrics.jsonl").write_text(metrics)
    seen = Seen(page_of())
    assert seen.characters.count(HOSTILE) > 6
    for element in ("script", "img", "style"):
        assert len(seen.all(element)) == len(harmless.all(element))
    assert not [one for _, one in seen.elements if "onerror" in one]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["none"],
            3,
            "none has neither metrics.jsonl nor evaluation.json; name the folder of a run",
        ),
        (["run", "--out", "mine.html"], 2, "is not a page of `embedrl`; name another file with --out"),
        (["run", "--cases", "-1"], 2, "'--cases'"),
    ],
)
def test_a_mistake_is_refused_and_leaves_what_is_there(words, code, message, run, capsys):
    Path("mine.html").write_text("mine")
    assert main(["report", *words]) == code
    assert message in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine" and not (run / "report.html").exists()


def test_files_of_two_evaluations_are_not_mixed(run):
    result = json.loads((run / "evaluation.json").read_text())
    result["views"]["raw"]["ranks"]["vqa"].append(1)
    (run / "evaluation.json").write_text(json.dumps(result))
    assert "No case can be shown: " in (seen := Seen(page_of()).characters) and "must be of the same pairs" in seen


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([0.31, 0.58], ["0.3", "0.4", "0.5", "0.6"]),
        ([5.0, 5.0], ["4.4", "4.6", "4.8", "5", "5.2", "5.4", "5.6"]),
        ([0.0, 0.0], ["-0.1", "-0.05", "0", "0.05", "0.1"]),
        ([-2e-7, 1e-7], ["-2e-07", "-1e-07", "0", "1e-07"]),
        ([12.0, 96.0], ["0", "20", "40", "60", "80", "100"]),
    ],
)
def test_an_axis_has_few_round_ticks_around_all_values(values, ticks):
    chart = draw("title", {"line": dict(enumerate(values))})
    assert [label for _, label in chart.y_ticks] == ticks
    assert [label for _, label in chart.x_ticks] == ["0", "1"]


def test_long_lines_are_thinned_and_keep_their_ends():
    assert draw("title", {"none": {}}) is None
    chart = draw("title", {"long": {step: float(step) for step in range(1, 10_001)}, "short": {1: 0.0, 10_000: 1e4}})
    long, short = chart.lines
    assert len(long.faint.split()) <= MAX_POINTS and long.last == "1e+04" and not long.marks
    assert len(short.marks) == 2 and short.strong.split() == [f"{x:.1f},{y:.1f}" for x, y in short.marks]
    assert long.faint.split()[0][:2] == short.strong.split()[0][:2]
