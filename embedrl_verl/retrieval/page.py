# SPDX-License-Identifier: Apache-2.0
"""The search page of `embedrl serve --page`: a query by text or picture, its T-CoT, and the best rows of a folder.

`/search` takes what `/v1/embeddings` takes, for one input, and answers with the query's card and row numbers;
`/rows/N` is the card of a row. Cards are HTML of report/, where every value is escaped; they hold their pictures.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, Response

from embedrl_verl.errors import ConfigError
from embedrl_verl.model import Ask
from embedrl_verl.model.gate import ThinkGate
from embedrl_verl.model.options import PairOptions
from embedrl_verl.model.pair import Encoding, Think
from embedrl_verl.report.page import search_page
from embedrl_verl.report.views import CardView
from embedrl_verl.retrieval.corpus import Corpus, rendered_card, side_view, tcot_reader
from embedrl_verl.retrieval.gate_file import GATE_FILE
from embedrl_verl.retrieval.index import Found, Index
from embedrl_verl.retrieval.requests import THINK, Refusal, Request
from embedrl_verl.retrieval.search import gate_of, needs_tcot, warn_of_another_embedder
from embedrl_verl.retrieval.service import Service, answered, unless_gone

TOP = 10
GATED: tuple[Think, ...] = (*THINK, "when_needed")
CARD_POLICY = {"Content-Security-Policy": "default-src 'none'; img-src data:"}


class SearchPage:
    """See the module. `gate`: of queries that think when it is needed; `options`: of the pair that serves."""

    def __init__(self, service: Service, index: Index, options: PairOptions, gate: ThinkGate | None = None) -> None:
        if service.dims[-1] != index.vectors.shape[1]:
            raise ConfigError(
                f"the folder's vectors have {index.vectors.shape[1]} numbers, the Embedder's {service.dims[-1]}; "
                "--embedder must be the one that the folder was embedded with"
            )
        self._service, self._index, self._gate = service, index, gate
        self._corpus = Corpus(index, options, service.model.max_frames)
        self._reader = tcot_reader(options)
        has_reasoner = service.model.reasoner is not None
        self._think: tuple[Think, ...] = ("never",) if not has_reasoner else THINK if gate is None else GATED

    def add_to(self, app: FastAPI) -> None:
        """The page's addresses."""
        facts = {"model": self._service.name, "rows": len(self._index.vectors)}
        html, policy = search_page(think=self._think, chosen=self._service.model.think, **facts)

        @app.get("/")
        async def page() -> Response:
            return HTMLResponse(html, headers={"Content-Security-Policy": policy})

        @app.post("/search")
        async def search(http: HttpRequest) -> Response:
            return await answered(self._service.metrics, lambda: self.search(http))

        @app.get("/rows/{row}")
        async def row(row: str) -> Response:
            return HTMLResponse(await asyncio.to_thread(self.card, row), headers=CARD_POLICY)

    def card(self, row: str) -> str:
        """HTML of a row; Refusal if there is none, or it has no vector."""
        last = len(self._index.vectors) - 1
        number = int(row) if row.isdecimal() and len(row) <= len(str(last)) else -1
        if not 0 <= number <= last or math.isnan(self._index.vectors[number, 0]):
            raise Refusal(404, f"row must be one that has a vector, from 0 to {last}; got {row}")
        return self._corpus.card(number)

    async def search(self, http: HttpRequest) -> dict[str, Any]:
        """The query as it was embedded, and the best rows."""
        request = await self._service.read(http, self._think)
        if len(request.inputs) != 1:
            raise Refusal(400, f"a search has one input; got {len(request.inputs)}", "input")
        (given,) = request.inputs
        instruction = given.get("instruction") or self._service.instruction or self._index.settings["instruction"]
        request = replace(request, inputs=[{**given, "instruction": instruction}])
        how = request.think or self._service.model.think
        first: Think = "never" if how == "when_needed" else how
        gated = how == "when_needed"
        ask, found, (scores, rows) = await unless_gone(http, self._nearest(request, first, plain=gated))
        if gated and self._gate is not None and needs_tcot(self._gate, scores):
            ask, found, (scores, rows) = await unless_gone(http, self._nearest(request, "always"))
        hits = await asyncio.to_thread(self._index.hits, scores[0], rows[0])
        view = CardView("Query", "", "", (side_view("As embedded", ask, found.tcot, self._reader),))
        return {
            "think": "never" if found.tcot is None else "always",
            "tcot": found.tcot,
            "html": await asyncio.to_thread(rendered_card, view, 0),
            "hits": [one._asdict() for one in hits],
        }

    async def _nearest(self, request: Request, think: Think, *, plain: bool = False) -> tuple[Ask, Encoding, Found]:
        (ask,), (one,) = await self._service.encodings(request, think)
        assert one.vector is not None
        return ask, one, await asyncio.to_thread(self._index.search, one.vector[None], TOP, plain=plain)


def open_page(service: Service, folder: str, options: PairOptions, gate: str | None) -> SearchPage:
    """The page over a folder; `gate`: file of the gate, None: the folder's, if it has one."""
    index = Index(folder)
    warn_of_another_embedder(index, options)
    has_gate = gate or (index.has_plain and (index.folder / GATE_FILE).is_file())
    return SearchPage(service, index, options, gate_of(index, gate, options) if has_gate else None)
