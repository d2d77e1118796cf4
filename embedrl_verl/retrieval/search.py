# SPDX-License-Identifier: Apache-2.0
"""`embedrl search`: one query against a folder of vectors, embedded as the folder was unless options say otherwise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.model import EmbedRLModel
from embedrl_verl.model.gate import ThinkGate
from embedrl_verl.model.options import PairOptions
from embedrl_verl.model.pair import Encoding, Think
from embedrl_verl.retrieval.gate_file import GATE_FILE, read_gate
from embedrl_verl.retrieval.index import Hit, Index, Kind

logger = logging.getLogger(__name__)


def search_folder(
    folder: str,
    query: dict[str, Any],
    *,
    top: int,
    think: Think | None,
    gate: str | None,
    kind: Kind,
    pair: dict[str, Any],
) -> tuple[Encoding, list[Hit]]:
    """The query as it was embedded, and the best rows. Arguments as the command's; `pair`: `PairOptions` that differ
    from the folder's.

    Raises:
        EmbedderError, MediaError: the query cannot be embedded. ConfigError, DataError: see `Index` and `read_gate`.
    """
    index = Index(folder, kind)
    options = PairOptions.of(index.settings, **pair)
    warn_of_another_embedder(index, options)
    how = options.think(think or (index.settings["think"] if options.reasoner else None))
    needed = gate_of(index, gate, options) if how == "when_needed" else None
    model = options.load(how, needed)
    query = {**query, "instruction": query.get("instruction") or index.settings["instruction"]}
    found = _encode(model, query, "never" if how == "when_needed" else how)
    scores, rows = index.search(_vector(found), max(top, 2), plain=how == "when_needed")
    if needed is not None and needs_tcot(needed, scores):
        found = _encode(model, query, "always")
        scores, rows = index.search(_vector(found), top)
    return found, index.hits(scores[0, :top], rows[0, :top])


def gate_of(index: Index, file: str | None, options: PairOptions) -> ThinkGate:
    """The gate of a file, None: of the folder, for the pair of `options`; ConfigError where the folder cannot be
    searched by one."""
    if not index.has_plain:
        raise ConfigError(
            f"--think when_needed first searches the vectors without T-CoTs, which {index.folder} does not have: "
            "embed it with --think always --with-plain"
        )
    return read_gate(Path(file or index.folder / GATE_FILE), options)


def needs_tcot(gate: ThinkGate, scores: torch.Tensor) -> bool:
    """Whether a query gets one, by the cosines (1, k), k >= 2, of its best rows, all without T-CoTs."""
    return bool(gate.thinks(scores.masked_fill(scores == -torch.inf, torch.nan)).item())


def warn_of_another_embedder(index: Index, options: PairOptions) -> None:
    """Tell the user if the Embedder is not as it was when the folder was embedded, or another one."""
    before = index.settings["embedder"]
    if options.named()["embedder"] != before:
        logger.warning(
            "the folder was embedded with %s; if %s is another model, hits mean nothing", before, options.embedder
        )
    elif options.stamps()["embedder"] != index.models["embedder"]:
        logger.warning(
            "%s has changed since the folder was embedded; if retrained, hits mean nothing", options.embedder
        )


def _encode(model: EmbedRLModel, query: dict[str, Any], think: Think) -> Encoding:
    return next(iter(model.encodings([query], "query", think=think)))


def _vector(found: Encoding) -> torch.Tensor:
    if found.vector is None:
        raise EmbedderError(f"the query has no vector: {found.problem}")
    return found.vector[None]
