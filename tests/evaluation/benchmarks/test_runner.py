# SPDX-License-Identifier: Apache-2.0
"""Every task of both benchmarks through the runner: known scores, failures, ties, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.benchmarks import mmeb_v2, uvrb
from embedrl_verl.evaluation.benchmarks.runner import BenchmarkRun, read_task
from embedrl_verl.evaluation.benchmarks.task import Rules, Source, Task
from embedrl_verl.evaluation.stamp import ModelFacts
from embedrl_verl.model import EmbedRLModel
from tests.evaluation.benchmarks.world import TASKS, FakeEmbedder, FakeReasoner, lines, make

DOCVQA, KINETICS, PAGES = (mmeb_v2.TASKS[name] for name in ("DocVQA", "K700", "ViDoRe_tabfquad"))


def run(benchmark: str, root: Path, out: Path, *names: str, collapsed: bool = False, **more: Any) -> dict[str, Any]:
    model = EmbedRLModel(FakeEmbedder(collapsed), FakeReasoner() if more.get("tcots") == "write" else None)
    return BenchmarkRun(benchmark, lambda: model, Source(root), out, **more).run(names)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("benchmark", "task"), TASKS, ids=[f"{name}-{task.name}" for name, task in TASKS])
def test_each_task_has_its_known_scores_with_written_and_given_tcots_and_plain_a_collapsed_model_has_chance(
    benchmark: str, task: Task, tmp_path: Path
) -> None:
    make(tmp_path, task)
    name, is_page = task.name, task.metric == "ndcg_linear@5"
    # A query that looks like another has its page last of three: 1 / log2(4).
    last = 0.5 if is_page else 0.0
    written = run(benchmark, tmp_path, tmp_path / "written", name, tcots="write")[name]["cells"]
    known = {"plain-plain": (1 + 1 + last) / 3, "plain-tcot": last, "tcot-plain": 1.0, "tcot-tcot": last}
    assert {cell: one["score"] for cell, one in written.items()} == pytest.approx(known)
    given = run(benchmark, tmp_path, tmp_path / "given", name, tcots=tmp_path / "written" / "tcots")[name]["cells"]
    assert given == written
    found = run(benchmark, tmp_path, tmp_path / "plain", name, collapsed=True)[name]
    (cell,) = found["cells"].values()
    most = int(found["stamp"]["candidate_count"].split()[0])
    chance = (1 + 0.6309 + 0.5) / 3 if is_page else (10 if "@10" in task.metric else 1) / most
    assert cell["score"] <= chance and cell["optimistic"] == 1.0


def test_a_side_without_tcots_is_plain_only(tmp_path: Path) -> None:
    make(tmp_path, DOCVQA)
    run("mmeb_v2", tmp_path, tmp_path / "written", "DocVQA", tcots="write")
    (tmp_path / "written" / "tcots" / "DocVQA.candidate.jsonl").unlink()
    cells = run("mmeb_v2", tmp_path, tmp_path / "out", "DocVQA", tcots=tmp_path / "written" / "tcots")["DocVQA"][
        "cells"
    ]
    assert {cell: one["score"] for cell, one in cells.items()} == {"plain-plain": pytest.approx(2 / 3), "tcot-plain": 1}


def test_candidates_are_embedded_once_however_many_queries_list_them(tmp_path: Path) -> None:
    make(tmp_path, DOCVQA)
    embedder = FakeEmbedder()
    BenchmarkRun("mmeb_v2", lambda: EmbedRLModel(embedder), Source(tmp_path), tmp_path / "out").run(["DocVQA"])
    assert embedder.seen == 3 + 3


def test_a_task_named_twice_is_computed_once_and_no_model_is_loaded_for_what_is_there(
    tmp_path: Path,
) -> None:
    make(tmp_path, DOCVQA)
    loaded, said = [], list[str]()

    def load() -> EmbedRLModel:
        loaded.append(1)
        return EmbedRLModel(FakeEmbedder())

    for _ in range(2):
        run = BenchmarkRun("mmeb_v2", load, Source(tmp_path), tmp_path / "out", said=said.append)
        assert list(run.run(["DocVQA", "DocVQA"])) == ["DocVQA"]
    assert len(loaded) == 1
    assert said == ["DocVQA: 3 queries, 3 candidates", "DocVQA is done: 1 of 1"]


class Recording(FakeReasoner):
    """Keeps what it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.asked]

    def write(self, asks: Any) -> Any:
        self.asked.extend(asks)
        return super().write(asks)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("DiDeMo", {"query_text_to_video", "target_video"}),
        ("ViDoRe_tabfquad", {"query_text", "target_page"}),
        ("DocVQA", {"query_image", "target_text"}),
    ],
)
def test_the_reasoner_is_asked_as_in_training_and_tiny_pictures_are_made_larger(
    name: str, kinds: set[str], tmp_path: Path
) -> None:
    make(tmp_path, mmeb_v2.TASKS[name])
    if name == "DocVQA":
        for file in (tmp_path / DOCVQA.media / name).iterdir():
            Image.open(file).resize((40, 27)).save(file)
    reasoner = Recording()
    model = EmbedRLModel(FakeEmbedder(), reasoner)
    BenchmarkRun("mmeb_v2", lambda: model, Source(tmp_path), tmp_path / "out", tcots="write").run([name])
    assert set(reasoner.kinds) == kinds
    sizes = {image.size for _, item in reasoner.asked for image in item.images}
    assert sizes == {"DiDeMo": set(), "ViDoRe_tabfquad": {(32, 32)}, "DocVQA": {(56, 56)}}[name]


def test_a_killed_run_goes_on_and_ends_with_the_files_of_one_that_was_not(tmp_path: Path) -> None:
    for task in (DOCVQA, KINETICS, PAGES):
        make(tmp_path / "data", task)
    names = [task.name for task in (DOCVQA, KINETICS, PAGES)]
    run("mmeb_v2", tmp_path / "data", tmp_path / "whole", *names, tcots="write")

    class Killed(FakeEmbedder):
        def vectors(self, inputs: Any, side: str) -> Any:
            if self.seen > 20:  # among the candidates of the second task
                raise KeyboardInterrupt
            return super().vectors(inputs, side)

    model = EmbedRLModel(Killed(), FakeReasoner())
    with pytest.raises(KeyboardInterrupt):
        BenchmarkRun("mmeb_v2", lambda: model, Source(tmp_path / "data"), tmp_path / "killed", tcots="write").run(names)
    before = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in files(tmp_path / "killed")}
    assert "DocVQA.json" in before and "K700.json" not in before
    run("mmeb_v2", tmp_path / "data", tmp_path / "killed", *names, tcots="write")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert (tmp_path / "killed" / "DocVQA.json").stat().st_mtime_ns == before["DocVQA.json"]
    kept = "tcots/K700.query.jsonl"
    assert (tmp_path / "killed" / kept).stat().st_mtime_ns == before[kept]


def test_a_side_that_was_killed_asks_only_for_the_tcots_that_are_not_there(tmp_path: Path) -> None:
    make(tmp_path / "data", DOCVQA)
    run("mmeb_v2", tmp_path / "data", tmp_path / "whole", "DocVQA", tcots="write")
    lines = (tmp_path / "whole" / "tcots" / "DocVQA.query.jsonl").read_text().splitlines(keepends=True)
    part = tmp_path / "out" / "tcots" / "DocVQA.query.part"
    part.parent.mkdir(parents=True)
    part.write_bytes((lines[1] + lines[0][:20]).encode() + "鸟".encode()[:2])  # torn while it was written, in a letter
    reasoner = Recording()
    model = EmbedRLModel(FakeEmbedder(), reasoner)
    BenchmarkRun("mmeb_v2", lambda: model, Source(tmp_path / "data"), tmp_path / "out", tcots="write").run(["DocVQA"])
    assert reasoner.kinds.count("query_image") == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rules": Rules(frames=4)}, "its frames is 8, not 4"),
        ({"rules": Rules(pool="global")}, "its pool is 'table', not 'global'"),
        ({"facts": ModelFacts(hidden_state="before the last norm")}, "its hidden_state is 'unknown', not 'before"),
        ({"tcots": "write"}, "its tcots is 'none', not 'written'"),
        ({"made_by": {"embedder": "b"}}, "its embedder is 'a', not 'b'"),
    ],
)
def test_a_folder_of_another_run_is_refused(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    make(tmp_path, DOCVQA)
    mine: dict[str, Any] = {"made_by": {"embedder": "a"}}
    run("mmeb_v2", tmp_path, tmp_path / "out", "DocVQA", **mine)
    with pytest.raises(ConfigError, match=what):
        run("mmeb_v2", tmp_path, tmp_path / "out", "DocVQA", **mine | change)


def test_items_that_fail_are_misses_and_are_named(tmp_path: Path) -> None:
    make(tmp_path, KINETICS)
    media = tmp_path / KINETICS.media
    for frame in (media / "v0").iterdir():
        frame.unlink()
    found = run("mmeb_v2", tmp_path, tmp_path / "out", "K700")["K700"]
    cell = found["cells"]["plain-plain"]
    assert cell["score"] == pytest.approx(1 / 3) and cell["failed"] == {"query": 1, "candidate": 0}
    assert cell["problems"][0].startswith("query 0: frames") and cell["metrics"]["num_data"] == 3
    rows = pq.read_table(tmp_path / "out" / "K700.parquet").to_pylist()
    assert [row["rank"] for row in rows] == [0, 1, 3] and [row["hit@1"] for row in rows] == [0, 1, 0]
    assert rows[0]["problem"] and not rows[1]["problem"]


@pytest.mark.parametrize("side", ["query", "candidate"])
def test_a_task_of_which_a_side_has_no_vector_is_refused_with_the_first_problem(side: str, tmp_path: Path) -> None:
    task = replace(DOCVQA, form=("I", "T") if side == "query" else ("T", "I"))
    make(tmp_path, task)
    (tmp_path / task.media).rename(tmp_path / "elsewhere")
    model = EmbedRLModel(FakeEmbedder(), FakeReasoner())
    task_run = BenchmarkRun(
        "mmeb_v2", lambda: model, Source(tmp_path), tmp_path / "out", tcots="write", tasks={"DocVQA": task}
    )
    with pytest.raises(DataError, match=rf"^DocVQA: no {side} has a vector: media path .*no such file.* first of 3"):
        task_run.run()
    assert "DocVQA.json" not in files(tmp_path / "out") and "DocVQA.parquet" not in files(tmp_path / "out")


def test_failed_items_are_computed_again_with_retry_failed_and_kept_tcots_are_not_asked_again(tmp_path: Path) -> None:
    make(tmp_path / "data", DOCVQA)
    run("mmeb_v2", tmp_path / "data", tmp_path / "whole", "DocVQA", tcots="write")
    picture, out = tmp_path / "data" / DOCVQA.media / "DocVQA" / "q1.png", tmp_path / "out"
    picture.rename(tmp_path / "q1.png")
    first = run("mmeb_v2", tmp_path / "data", out, "DocVQA", tcots="write")
    assert first["DocVQA"]["cells"]["tcot-tcot"]["failed"] == {"query": 1, "candidate": 0}
    (tmp_path / "q1.png").rename(picture)
    assert run("mmeb_v2", tmp_path / "data", out, "DocVQA", tcots="write") == first
    reasoner = Recording()
    model = EmbedRLModel(FakeEmbedder(), reasoner)
    again = BenchmarkRun("mmeb_v2", lambda: model, Source(tmp_path / "data"), out, tcots="write", retry_failed=True)
    again.run(["DocVQA"])
    assert reasoner.kinds == ["query_image"] and files(out) == files(tmp_path / "whole")
    again.run(["DocVQA"])
    assert reasoner.kinds == ["query_image"], "nothing failed: the task is finished"


def test_a_candidate_without_a_vector_is_never_retrieved(tmp_path: Path) -> None:
    make(tmp_path, DOCVQA)
    lines(tmp_path / "tcots" / "DocVQA.candidate.jsonl", [{"id": f"this #{one}@9", "tcot": f"{one}"} for one in (1, 2)])
    cells = run("mmeb_v2", tmp_path, tmp_path / "out", "DocVQA", tcots=tmp_path / "tcots")["DocVQA"]["cells"]
    assert cells["plain-plain"]["score"] == pytest.approx(2 / 3)
    assert cells["plain-tcot"]["score"] == pytest.approx(1 / 3)  # the first candidate is gone
    assert cells["plain-tcot"]["problems"] == ["candidate this #0@9: no T-CoT is given for it"]
    with pytest.raises(DataError, match=r"must have T-CoTs of K700"):
        make(tmp_path, KINETICS)
        run("mmeb_v2", tmp_path, tmp_path / "out", "K700", tcots=tmp_path / "tcots")


def test_global_labels_are_those_of_the_file_too_and_the_count_is_stamped(tmp_path: Path) -> None:
    make(tmp_path, KINETICS)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "K700.txt").write_text("other #8@9\nlabel #0@9\n")
    found = run("mmeb_v2", tmp_path, tmp_path / "out", "K700")["K700"]
    assert found["stamp"]["candidate_count"] == "4 of 700" and found["stamp"]["queries"] == "3 of 1000"


def test_a_local_task_can_be_ranked_globally_and_says_so(tmp_path: Path) -> None:
    task = uvrb.TASKS["MS-TI"]
    make(tmp_path, task)
    folder = tmp_path / task.repo / "MS_TI" / "jsonl"
    rows = [json.loads(line) for line in (folder / "instances.jsonl").read_text().splitlines()]
    lines(folder / "instances.jsonl", [{"qid": row["qid"], "pos": row["pos"]} for row in rows])
    with pytest.raises(DataError, match=r"must have the columns qid, pos, neg"):
        run("uvrb", tmp_path, tmp_path / "local", "MS-TI")
    found = run("uvrb", tmp_path, tmp_path / "global", "MS-TI", rules=Rules(pool="global"))["MS-TI"]
    assert found["stamp"]["candidates"] == "global" and found["cells"]["plain-plain"]["score"] == pytest.approx(2 / 3)


def test_missing_data_columns_and_tasks_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the data root must be a folder"):
        run("mmeb_v2", tmp_path / "nowhere", tmp_path / "out", "DocVQA")
    with pytest.raises(ConfigError, match=r"Nothing are not"):
        run("mmeb_v2", tmp_path, tmp_path / "out", "Nothing")
    lines(tmp_path / DOCVQA.repo / "DocVQA" / "test.jsonl", [{"qry_text": "V1"}])
    with pytest.raises(DataError, match=r"qry_img_path, qry_inst, tgt_img_path, tgt_inst, tgt_text are missing"):
        run("mmeb_v2", tmp_path, tmp_path / "out", "DocVQA")
    make(tmp_path, PAGES)
    with pytest.raises(DataError, match=r"must have its relevant candidates among its candidates; '7' is not"):
        data_without_a_page = replace(PAGES, repo="short")
        make(tmp_path, data_without_a_page)
        _name_page(tmp_path / "short", 7)
        read_task(data_without_a_page, Source(tmp_path), Rules())


def _name_page(repo: Path, page: int) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"query-id": ["q0"], "corpus-id": [page], "score": [1]})
    table.to_parquet(repo / "qrels" / "test-00000-of-00001.parquet")


class Separating(FakeReasoner):
    def write(self, asks: Any) -> Any:
        return [replace(one, text=f"\u2028\x85{one.text}") for one in super().write(asks)]


def test_tcots_with_separators_of_lines_are_read_again(tmp_path: Path) -> None:
    make(tmp_path, DOCVQA)
    model = EmbedRLModel(FakeEmbedder(), Separating())
    found = []
    for _ in range(2):
        found.append(
            BenchmarkRun("mmeb_v2", lambda: model, Source(tmp_path), tmp_path / "out", tcots="write").run(["DocVQA"])
        )
        (tmp_path / "out" / "DocVQA.json").unlink()
    assert found[0] == found[1] and found[0]["DocVQA"]["cells"]["tcot-plain"]["score"] == 1.0


def test_what_is_there_of_another_entry_other_rows_or_other_tcots_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "data", DOCVQA)

    def compute(task: Task, tcots: str | Path | None) -> Any:
        model, source = EmbedRLModel(FakeEmbedder(), FakeReasoner()), Source(tmp_path / "data")
        return BenchmarkRun("own", lambda: model, source, tmp_path / "out", tcots=tcots, tasks={task.name: task}).run()

    compute(DOCVQA, "write")
    for change, what in ({"instruction": "Look."}, "its task is"), ({"metric": "hit@10"}, "its metric is 'hit@1', not"):
        with pytest.raises(ConfigError, match=rf"DocVQA\.json must be of this task; {what}"):
            compute(replace(DOCVQA, **change), "write")
    (tmp_path / "out" / "DocVQA.json").unlink()  # killed before its end, and then
    (rows,) = (tmp_path / "data" / DOCVQA.repo).rglob("*.jsonl")
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    with pytest.raises(ConfigError, match=r"tcots/DocVQA\.json must be of this task; its data is"):
        compute(DOCVQA, "write")
    given = tmp_path / "given"
    (tmp_path / "out" / "tcots").rename(given)
    (tmp_path / "out" / "run.json").unlink()
    compute(DOCVQA, given)
    (given / "DocVQA.query.jsonl").write_text('{"id": "0", "tcot": "it is 3"}\n')
    with pytest.raises(ConfigError, match="its T-CoTs of query is"):
        compute(DOCVQA, given)


def test_a_limited_local_task_that_is_ranked_globally_keeps_all_candidates(tmp_path: Path) -> None:
    make(tmp_path, DOCVQA)
    names = list(read_task(DOCVQA, Source(tmp_path), Rules(pool="global")).items)
    assert list(read_task(DOCVQA, Source(tmp_path), Rules(pool="global", limit=1)).items) == names


def test_a_side_that_was_killed_asks_again_for_what_had_failed(tmp_path: Path) -> None:
    make(tmp_path, DOCVQA)
    part = tmp_path / "out" / "tcots" / "DocVQA.query.part"
    part.parent.mkdir(parents=True)
    part.write_text('{"id": "0", "tcot": null, "seen_sizes": null, "problem": "the server is away"}\n')
    cells = run("mmeb_v2", tmp_path, tmp_path / "out", "DocVQA", tcots="write")["DocVQA"]["cells"]
    assert cells["tcot-plain"]["score"] == 1.0 and not cells["tcot-plain"]["failed"]["query"]
