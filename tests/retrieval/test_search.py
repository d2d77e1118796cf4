# SPDX-License-Identifier: Apache-2.0
"""Search: the best rows by cosine, the same by blocks and by the command; a graph that finds nearly all of them; the
gate from its file."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from embedrl_verl import cli
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.retrieval import index as index_module
from embedrl_verl.retrieval.gate_file import MARGINS
from embedrl_verl.retrieval.index import Index, exact
from tests.embedder.inputs import picture
from tests.retrieval.conftest import LIMITS, rows_of, words, write_corpus


@pytest.fixture
def corpus(embed, tmp_path):
    file = write_corpus(tmp_path / "in", 30)
    with open(file, "a") as lines:
        lines.write('{"id": "bad", "image": "gone.png"}\n{"id": "last", "text": "document last"}\n')
    assert embed(file, tmp_path / "out", "--rows-per-part", "7", "--max-failed-share", "0.5") == 0
    return tmp_path / "out"


def printed(capsys):
    found = capsys.readouterr()
    return [(float(line.split("\t")[0]), line.split("\t")[1]) for line in found.out.splitlines()], found.err


def test_the_command_prints_the_best_rows_of_the_folder(corpus, model, capsys):
    capsys.readouterr()
    rows = [row for row in rows_of(corpus) if row["vector"]]
    vectors = np.array([row["vector"] for row in rows], np.float32)
    picture(99).save(corpus.parent / "q.png")
    for options, query in (
        (["--query", "document 3"], "document 3"),
        (["--image", str(corpus.parent / "q.png")], picture(99)),
    ):
        for _ in range(2):  # the second time the vectors are there
            assert cli.main(["search", str(corpus), *options, "--top", "5", "--device", "cpu"]) == 0
            hits, error = printed(capsys)
            cosines = vectors @ model.encode_query(query, think="never")
            best = np.argsort(-cosines)[:5]
            assert [name for _, name in hits] == [rows[i]["id"] for i in best] and "thought" not in error
            assert [score for score, _ in hits] == pytest.approx(cosines[best].tolist(), abs=1e-4)
    assert len(list(corpus.glob("vectors-*.npy"))) == 1


def test_a_row_without_a_vector_is_never_found(corpus):
    found = Index(corpus)
    assert found.vectors.shape == (32, 128) and np.isnan(found.vectors[30]).all()
    scores, rows = found.search(torch.from_numpy(found.vectors[31:32].copy()), 40)
    assert rows[0, 0] == 31 and 30 not in rows and (rows[0, 31:] == -1).all() and (scores[0, 31:] == -torch.inf).all()
    hits = found.hits(scores[0], rows[0])
    assert len(hits) == 31 and hits[0].id == "last" and "bad" not in {hit.id for hit in hits}


def test_blocks_do_not_change_what_is_found(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(101, 16, generator=generator), dim=1)
    queries, want = vectors[::10] + 0.01, (vectors[::10] + 0.01) @ vectors.T
    for block in (1, 7, 101, 500):
        monkeypatch.setattr(index_module, "BLOCK", block)
        scores, rows = exact(vectors, queries, 9)
        assert torch.equal(rows, want.topk(9, dim=1).indices) and torch.allclose(scores, want.topk(9, dim=1).values)


def test_a_graph_finds_nearly_what_comparing_all_finds(corpus):
    pytest.importorskip("faiss")
    exactly, graph = Index(corpus), Index(corpus, "hnsw")
    queries = torch.from_numpy(exactly.vectors[:8].copy())
    want, found = exactly.search(queries, 10)[1], graph.search(queries, 10)[1]
    shared = sum(len(set(a) & set(b)) for a, b in zip(want.tolist(), found.tolist(), strict=True))
    assert shared >= 0.95 * want.numel() and 30 not in found


def test_a_graph_that_finds_too_little_is_warned_of(tmp_path, monkeypatch, caplog):
    pytest.importorskip("faiss")
    vectors = torch.nn.functional.normalize(torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    index_module._graph(tmp_path / "good.faiss", vectors.numpy())
    assert not caplog.text
    for name, value in (("NEIGHBOURS", 2), ("BUILD_WIDTH", 1), ("SEARCH_WIDTH", 1)):
        monkeypatch.setattr(index_module, name, value)
    index_module._graph(tmp_path / "bad.faiss", vectors.numpy())
    assert "--index exact finds all" in caplog.text


def test_what_cannot_be_searched_is_refused(corpus, tmp_path, capsys, monkeypatch):
    def refused(*options: str) -> str:
        assert cli.main(["search", *options, "--device", "cpu"]) in (2, 3)
        return capsys.readouterr().err.splitlines()[-1]

    assert "--query TEXT" in refused(str(corpus))
    assert "gone.png" not in refused(str(tmp_path / "gone"), "--query", "a")
    write_pairs([PairRecord("p", "s", "", Item("q"), Item("t"))], tmp_path / "part-00000.parquet")
    (tmp_path / "data_card.json").write_text('{"format": "embedrl pair records 1"}')
    assert "not vectors" in refused(str(tmp_path), "--query", "a")
    assert "--with-plain" in refused(str(corpus), "--query", "a", "--think", "when_needed", "--reasoner", "x")
    assert "needs a Reasoner" in refused(str(corpus), "--query", "a", "--think", "always")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install faiss-cpu" in refused(str(corpus), "--query", "a", "--index", "hnsw")
    with pytest.raises(index_module.ConfigError, match="128 numbers a vector; the Embedder gives 3"):
        Index(corpus).search(torch.ones(1, 3), 1)


def test_a_gate_is_fitted_on_pairs_and_decides_which_query_thinks(corpus, pair, model, tmp_path, capsys):
    records = [PairRecord(f"p{i}", f"s{i % 2}", "Find it.", Item(f"query {i}"), Item(f"target {i}")) for i in range(10)]
    write_pairs(records, tmp_path / "pairs.parquet")
    file = corpus / "gate.json"
    given = [str(tmp_path / "pairs.parquet"), "--out", str(file), *words(pair, reasoner=True)]
    assert cli.main(["gate", "fit", *given]) == 0
    gate, out = json.loads(file.read_text()), capsys.readouterr().out
    assert gate["queries"] == 10 and gate["failed"] == 0 and f"{gate['share']:.1%} of 10 queries think" in out
    assert gate["hit1"]["gated"] >= max(gate["hit1"]["never"], gate["hit1"]["always"])
    others = [PairRecord(f"o{i}", "s", "Find it.", Item(f"query {i}"), Item(f"target {i}")) for i in range(4)]
    write_pairs(others, tmp_path / "others.parquet")
    scored = [str(tmp_path / "others.parquet"), "--gate", str(file), *words(pair, reasoner=True)]
    assert cli.main(["gate", "score", *scored]) == 0
    assert f"of 4 queries think (margin below {gate['threshold']:.4f})" in capsys.readouterr().out
    assert json.loads(file.read_text()) == gate, "it is only scored"
    for name in ("never", "always"):
        targets = model.encode_document([f"target {i}" for i in range(10)], think=name)
        queries = model.encode_query([f"query {i}" for i in range(10)], prompt="Find it.", think=name)
        of_source = [targets[i % 2 :: 2] @ queries[i] for i in range(10)]
        hits = [int(np.argmax(cosines)) == i // 2 for i, cosines in enumerate(of_source)]
        assert gate["hit1"][name] == pytest.approx(np.mean(hits))
    search = ["search", str(corpus), "--query", "document 3", "--think", "when_needed", "--device", "cpu"]
    assert cli.main([*search, "--reasoner", str(pair / "reasoner"), "--set", *LIMITS]) == 2
    assert "embed it with --think always --with-plain" in capsys.readouterr().err


def test_a_gated_query_is_compared_with_vectors_of_its_own_kind(embed, model, tmp_path, capsys):
    """Without T-CoT on both sides, or with them on both."""
    file, folder = write_corpus(tmp_path / "in", 9), tmp_path / "out"
    with open(file, "a") as lines:
        lines.write('{"id": "bad", "image": "gone.png"}\n')
    given = ("--rows-per-part", "4", "--max-failed-share", "0.5", "--with-plain")
    assert (
        embed(file, tmp_path / "never", *given) == 2 and "without thinking they are the same" in capsys.readouterr().err
    )
    assert embed(file, folder, *given, reasoner=True) == 0
    rows = [row for row in rows_of(folder) if row["vector"]]
    assert len(rows) == 9 and all(row["plain"] is None for row in rows_of(folder) if not row["vector"])
    search = ["search", str(folder), "--query", "document 3", "--think", "when_needed", "--device", "cpu"]
    for threshold, think, column in ((9.0, "always", "vector"), (-1.0, "never", "plain")):
        gate = {"threshold": threshold, "margins": MARGINS}
        (folder / "gate.json").write_text(json.dumps(gate))
        capsys.readouterr()
        assert cli.main([*search, "--top", "1"]) == 0
        hits, error = printed(capsys)
        cosines = np.array([row[column] for row in rows], np.float32) @ model.encode_query("document 3", think=think)
        assert hits == [(pytest.approx(float(cosines.max()), abs=1e-4), rows[int(cosines.argmax())]["id"])]
        assert ("thought: " in error) == (think == "always")
    assert not np.allclose([row["vector"] for row in rows], [row["plain"] for row in rows])
    (folder / "gate.json").write_text(json.dumps({"threshold": 0.1}))
    assert cli.main(search) == 3 and "another version fitted it" in capsys.readouterr().err


def test_another_model_at_the_folders_path_is_told(pair, tmp_path, caplog):
    shutil.copytree(pair / "embedder", tmp_path / "embedder")
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    given = ["embed", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*given, "--embedder", str(tmp_path / "embedder"), "--set", *LIMITS]) == 0
    search = ["search", str(tmp_path / "out"), "--query", "a", "--device", "cpu"]
    assert cli.main(search) == 0 and "has changed" not in caplog.text
    os.utime(next((tmp_path / "embedder").glob("*.safetensors")), (1, 1))
    assert cli.main(search) == 0 and "has changed" in caplog.text
