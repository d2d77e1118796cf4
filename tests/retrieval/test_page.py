# SPDX-License-Identifier: Apache-2.0
"""The search page: what it shows is of the query and of the folder's own rows, and nothing in them can run."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.model import Written
from embedrl_verl.model.gate import ThinkGate
from embedrl_verl.model.options import PairOptions
from embedrl_verl.retrieval.index import Index
from embedrl_verl.retrieval.page import SearchPage, open_page
from embedrl_verl.retrieval.service import Limits, Service, application
from tests.embedder.inputs import picture
from tests.model.tiny_pair import LIMITS
from tests.retrieval.conftest import rows_of, words, write_corpus
from tests.retrieval.test_service import chat, data_url, listening

SCRIPT = "<script>alert(1)</script>"
TCOT = '<thinking>{"bbox_2d": [[100, 100, 900, 800]]} ' + SCRIPT + "</thinking><rethink>ok</rethink><answer>x</answer>"


@pytest.fixture(scope="module")
def options(pair):
    return PairOptions(str(pair / "embedder"), str(pair / "reasoner"), overrides=tuple(LIMITS), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair):
    from embedrl_verl import cli

    place = tmp_path_factory.mktemp("page")
    corpus = write_corpus(place / "in", 14)
    with open(corpus, "a") as lines:
        lines.write(json.dumps({"id": "<b>odd</b>", "text": SCRIPT}) + '\n{"id": "gone", "image": "gone.png"}\n')
    run = ["embed", str(corpus), "--out", str(place / "out"), "--rows-per-part", "6", "--max-failed-share", "0.5"]
    assert cli.main([*run, "--think", "always", "--with-plain", *words(pair, reasoner=True)]) == 0
    return place / "out"


@pytest.fixture(scope="module")
def page(model, folder, options):
    return SearchPage(Service(model, "tiny", Limits()), Index(folder), options, ThinkGate(3.0))


@pytest.fixture(scope="module")
def client(page):
    app = application(page._service)
    page.add_to(app)
    with listening(app) as found:
        yield found


def test_a_search_shows_the_query_with_its_boxes_and_the_best_rows_with_their_media(client, model, folder, monkeypatch):
    image = {"type": "image_url", "image_url": {"url": data_url(picture(4))}}
    with monkeypatch.context() as patch:
        patch.setattr(model.reasoner, "write", lambda asks: [Written(TCOT, ((56, 56),))] * len(asks))
        found = client.post("/search", json={"messages": chat(image, {"type": "text", "text": SCRIPT})}).json()
        want = next(model.encodings([{"text": SCRIPT, "image": picture(4)}], "query")).vector.numpy()
    assert found["tcot"] == TCOT and found["think"] == "always" and "data:image/png;base64," in found["html"]
    assert re.search(r'<rect class="line" x="\d+" y="\d+" width="[1-9]', found["html"])
    assert SCRIPT not in found["html"] and "&lt;script&gt;alert(1)&lt;/script&gt;" in found["html"]
    rows = rows_of(folder)
    vectors = np.array([row["vector"] or [np.nan] * 128 for row in rows], np.float32)
    best = np.argsort(-np.nan_to_num(vectors @ want, nan=-2))[:10]
    assert [hit["row"] for hit in found["hits"]] == best.tolist()
    assert [hit["score"] for hit in found["hits"]] == pytest.approx((vectors @ want)[best].tolist(), abs=1e-4)
    for hit in found["hits"]:
        card = client.get(f"/rows/{hit['row']}").text
        assert (hit["id"], hit["tcot"]) == (rows[hit["row"]]["id"], rows[hit["row"]]["tcot"])
        assert ("data:image/png" in card) == (hit["row"] % 4 == 0 and hit["row"] < 14)
        assert f"document {hit['row']} " in card or hit["row"] == 14


def test_a_query_thinks_as_it_is_told(client, page, monkeypatch):
    def think(how):
        return client.post("/search", json={"input": "a", "think": how}).json()["think"]

    assert (think("never"), think("always"), think("when_needed")) == ("never", "always", "always")
    monkeypatch.setattr(page, "_gate", ThinkGate(-1.0))
    assert think("when_needed") == "never"
    assert client.post("/v1/embeddings", json={"input": "a", "think": "when_needed"}).status_code == 400


def test_only_rows_that_can_be_found_are_served_and_as_text(client):
    card = client.get("/rows/14")
    assert SCRIPT not in card.text and "&lt;script&gt;" in card.text and "<b>odd</b>" not in card.text
    assert card.headers["Content-Security-Policy"] == "default-src 'none'; img-src data:"
    for row in (15, 16, -1, 10**30):
        assert client.get(f"/rows/{row}").status_code == 404, row
    for path in ("..%2f..%2fetc%2fpasswd", "0.png", "../in/0.png"):
        assert client.get(f"/rows/{path}").status_code == 404
    answer = client.post("/search", json={"input": ["a", "b"]})
    assert answer.status_code == 400 and "one input" in answer.json()["error"]["message"]


def test_the_page_loads_nothing_from_elsewhere_and_offers_what_can_be_done(client):
    answer = client.get("/")
    assert not re.search(r"(src|href)=\"(?!data:,)", answer.text) and "http" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert re.findall(r"<option[^>]*>(\w+)", answer.text) == ["always", "never", "when_needed"]


def test_a_folder_that_does_not_fit_is_refused(page, folder, options, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(page._service, "dims", [64])
        with pytest.raises(ConfigError, match="have 128 numbers, the Embedder's 64"):
            open_page(page._service, str(folder), options, None)
    corpus = folder.parent / "in" / "corpus.jsonl"
    text = corpus.read_text()
    try:
        corpus.write_text(text + '{"text": "more"}\n')
        with pytest.raises(DataError, match="have changed since they were embedded"):
            open_page(page._service, str(folder), options, None)
    finally:
        corpus.write_text(text)


BROWSER = """
import sys
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWidgets import QApplication
from PyQt6.QtWebEngineWidgets import QWebEngineView
app, view = QApplication(sys.argv[:1]), QWebEngineView()
view.resize(1280, 1000)
ask = "document.querySelector('[name=text]').value = 'document 3'; document.querySelector('#ask button').click()"
read = "JSON.stringify([document.querySelectorAll('#hits article').length, document.querySelector('output').value," \\
       " document.querySelectorAll('#query article').length])"
def look(text=None):
    if text and '"searching' not in text and '""' not in text:
        print(text, flush=True)
        app.quit()
    else:
        QTimer.singleShot(200, lambda: view.page().runJavaScript(read, look))
view.loadFinished.connect(lambda good: (view.page().runJavaScript(ask), look()))
view.load(QUrl(sys.argv[1]))
view.show()
app.exec()
"""


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("PyQt6.QtWebEngineWidgets") is None if find_spec("PyQt6") else True, reason="no browser")
def test_a_browser_shows_the_hits_of_a_query(client):
    flags = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}
    run = [sys.executable, "-c", BROWSER, f"{client.base_url}/"]
    done = subprocess.run(run, env={**os.environ, **flags}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [10, "10 rows, with a T-CoT", 1], done.stderr
