# SPDX-License-Identifier: Apache-2.0
"""Reasoner and Embedder in one object, with the methods of sentence-transformers.

    model = EmbedRLModel.from_pretrained("runs/tiny_cpu/seed0/embedder", "runs/tiny_cpu/seed0/reasoner")
    queries = model.encode_query(["the number 35366"], prompt="Find the picture with these digits.")
    documents = model.encode_document([Image.open("scan.png")])
    model.similarity(queries, documents)

An input is embedded alone (think="never") or with the T-CoT that the Reasoner writes about it and the evidence that the
T-CoT points at, as in training (paper section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.schema import Side
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.errors import ConfigError, EmbedderError, EmbedRLError, ModelFailedError
from embedrl_verl.families import FAMILIES, Family
from embedrl_verl.model.embedders import Embeds, Vector
from embedrl_verl.model.gate import ThinkGate
from embedrl_verl.model.tcots import FAILURES, Ask, Writes, Written, ask_for

Think = Literal["always", "never", "when_needed"]
THINK: tuple[Think, ...] = ("always", "never", "when_needed")


@dataclass(frozen=True)
class Encoding:
    """One input: float32 (D,) of length 1, or None and `problem`; its T-CoT (None: it was embedded alone), how many
    pieces of evidence were cut for it, and (width, height) of its images as the Reasoner saw them. `is_input_fault`:
    the problem is of the input, and not of a model. `tokens`: that the Embedder read, T-CoT and evidence among them;
    `tcot_tokens`: that the Reasoner wrote; both None where nobody counted."""

    vector: torch.Tensor | None
    tcot: str | None = None
    evidence: int = 0
    problem: str = ""
    seen_sizes: tuple[tuple[int, int], ...] | None = None
    is_input_fault: bool = True
    tokens: int | None = None
    tcot_tokens: int | None = None


class EmbedRLModel:
    """See the module.

    Args:
        embedder: by any backend (`embedrl_verl.model.embedders`).
        reasoner: what writes T-CoTs; None: think must be "never".
        think: "always", "never", or "when_needed": queries by `gate`, documents always.
        gate: of "when_needed" (`ThinkGate.fit`).
        evidence: what may be cut.
        media_root: of paths; None: a path is the caller's own file.
        family: whose units the boxes of T-CoTs have that are given without a Reasoner.
    """

    def __init__(
        self,
        embedder: Embeds,
        reasoner: Writes | None = None,
        *,
        think: Think | None = None,
        gate: ThinkGate | None = None,
        evidence: EvidenceConfig | None = None,
        media_root: str | Path | None = None,
        max_frames: int = 8,
        family: Family = FAMILIES[-1],
    ) -> None:
        self.embedder, self.reasoner, self.gate = embedder, reasoner, gate
        self.family: Family = family if reasoner is None else reasoner.family
        self.evidence, self.media_root, self.max_frames = evidence or EvidenceConfig(), media_root, max_frames
        self.think: Think = self._checked(think or ("never" if reasoner is None else "always"))

    @classmethod
    def from_pretrained(
        cls,
        embedder: str,
        reasoner: str | None = None,
        *,
        think: Think | None = None,
        gate: ThinkGate | None = None,
        engine: Literal["transformers", "vllm"] = "transformers",
        prompts_like: str | None = None,
        settings: Sequence[str] = (),
        device: str = "auto",
        media_root: str | Path | None = None,
    ) -> EmbedRLModel:
        """Load both.

        Args:
            embedder: folder or hub id.
            reasoner: folder, hub id, or URL of an OpenAI-style server.
            prompts_like: of a server, or of T-CoTs that are given: the folder of the model, which says how it is asked.
            engine: what runs a Reasoner's folder.
            settings: hydra overrides, as for a run: "embedrl.embedder.profile=gme", "data.embedrl.prompt_style=paper",
                "embedrl.embedder.backend=server". What they do not name comes from the Reasoner's `training.json`.
            device: of both; auto: a GPU if there is one.
        """
        from embedrl_verl.model.loading import load_embedder, load_reasoner, read_settings

        read = read_settings(embedder, settings, device)
        writer = None if reasoner is None else load_reasoner(reasoner, read, engine=engine, prompts_like=prompts_like)
        asked = prompts_like or reasoner
        max_frames = read.max_frames([asked] if asked else [])
        family = read.data["embedrl"]["family"]
        return cls(
            load_embedder(read, max_frames),
            writer,
            think=think,
            gate=gate,
            evidence=read.evidence(asked),
            media_root=media_root,
            max_frames=max_frames,
            family=FAMILIES[-1] if family == "auto" else family,
        )

    def encode_query(self, inputs: Any, **options: Any) -> Any:
        """Vectors of queries. Arguments as `encode`."""
        return self.encode(inputs, "query", **options)

    def encode_document(self, inputs: Any, **options: Any) -> Any:
        """Vectors of documents, the targets of training. Arguments as `encode`."""
        return self.encode(inputs, "target", **options)

    def encode(
        self,
        inputs: Any,
        side: Side,
        *,
        prompt: str = "",
        batch_size: int = 32,
        think: Think | None = None,
        against: torch.Tensor | np.ndarray[Any, Any] | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        return_tcots: bool = False,
    ) -> Any:
        """Vectors as sentence-transformers gives them: float32 (N, D), (D,) for a single input, each of length 1.

        Args:
            inputs: one input or a sequence of inputs, as `ask_for` takes them.
            prompt: the instruction, of inputs that bring none.
            think: other than the model's.
            against: (C, D) vectors of the candidates without T-CoTs, which decide what is needed for "when_needed". A
                query that does not think is then compared with these, one that thinks (`return_tcots` tells) with the
                candidates' vectors with T-CoTs.
            convert_to_tensor: torch instead of numpy.
            return_tcots: also the T-CoTs, a list of str (None: embedded alone).

        Raises:
            EmbedderError, MediaError: of the first input without a vector. `encodings` goes on instead.
        """
        single = isinstance(inputs, (str, dict, Ask)) or not isinstance(inputs, (Sequence, np.ndarray))
        given = [inputs] if single else list(inputs)
        if against is not None:
            against = torch.as_tensor(against, dtype=torch.float32, device="cpu")
        found: list[Encoding] = []
        for one in tqdm(
            self.encodings(given, side, prompt=prompt, batch_size=batch_size, think=think, against=against),
            total=len(given),
            disable=not show_progress_bar,
        ):
            if one.vector is None:
                raise EmbedderError(f"input {len(found)} has no vector: {one.problem}")
            found.append(one)
        vectors = torch.stack([one.vector for one in found if one.vector is not None]) if found else torch.empty(0, 0)
        tcots = [one.tcot for one in found]
        if single:
            vectors, tcots = vectors[0], tcots[0]  # type: ignore[assignment]
        result = vectors if convert_to_tensor else vectors.numpy()
        return (result, tcots) if return_tcots else result

    def encodings(
        self,
        inputs: Sequence[Any],
        side: Side,
        *,
        prompt: str = "",
        batch_size: int = 32,
        think: Think | None = None,
        against: torch.Tensor | None = None,
        tcots: Sequence[Written] | None = None,
    ) -> Iterator[Encoding]:
        """Vector, T-CoT and problem of every input, in order, `batch_size` at a time; arguments as `encode`, and

        tcots: one for each input, instead of those that the Reasoner would write.
        """
        how = self._checked(think or self.think)
        if how == "when_needed" and side == "target":
            how = "always"
        if how == "when_needed" and against is None:
            raise ConfigError("think='when_needed' needs the candidates' vectors: encode_query(..., against=vectors)")
        for start in range(0, len(inputs), batch_size):
            given = None if tcots is None else tcots[start : start + batch_size]
            yield from self._batch(inputs[start : start + batch_size], side, prompt, how, against, given)

    def similarity(self, queries: Any, documents: Any) -> torch.Tensor:
        """(Q, C) cosines of encoded queries and documents."""
        ours, theirs = (torch.atleast_2d(torch.as_tensor(one, dtype=torch.float32)) for one in (queries, documents))
        return ours @ theirs.T

    def _checked(self, think: Think) -> Think:
        if think not in THINK:
            raise ConfigError(f"think must be one of {', '.join(THINK)}; got {think!r}")
        if think != "never" and self.reasoner is None:
            raise ConfigError(f"think={think!r} needs a Reasoner; name one, or think='never'")
        if think == "when_needed" and self.gate is None:
            raise ConfigError("think='when_needed' needs a gate that was fitted on validation pairs (ThinkGate.fit)")
        return think

    def _batch(
        self,
        inputs: Sequence[Any],
        side: Side,
        prompt: str,
        think: Think,
        against: torch.Tensor | None,
        tcots: Sequence[Written] | None,
    ) -> list[Encoding]:
        asks: dict[int, Ask] = {}
        found: dict[int, Encoding] = {}
        for number, one in enumerate(inputs):
            try:
                asks[number] = ask_for(
                    one, side, instruction=prompt, media_root=self.media_root, max_frames=self.max_frames
                )
            except FAILURES as error:
                found[number] = Encoding(None, problem=str(error))
        needed = list(asks)
        if tcots is None and think != "always":
            plain = self.embedder.vectors([EmbedInput(asks[number].item) for number in needed], side)
            found |= {number: _encoding(vector) for number, vector in zip(needed, plain, strict=True)}
            needed = [] if think == "never" else self._needed(found, against)
        if needed:
            found |= self._thought({number: asks[number] for number in needed}, side, tcots)
        return [found[number] for number in range(len(inputs))]

    def _needed(self, plain: dict[int, Encoding], against: torch.Tensor | None) -> list[int]:
        assert self.gate is not None and against is not None
        known = {number: one.vector for number, one in plain.items() if one.vector is not None}
        if not known:
            return []
        thinks = self.gate.thinks(torch.stack(list(known.values())) @ against.T)
        return [number for number, is_needed in zip(known, thinks.tolist(), strict=True) if is_needed]

    def _thought(self, asks: dict[int, Ask], side: Side, tcots: Sequence[Written] | None) -> dict[int, Encoding]:
        if tcots is None:
            assert self.reasoner is not None
            written = dict(zip(asks, self.reasoner.write(list(asks.values())), strict=True))
        else:
            written = {number: tcots[number] for number in asks}
        found: dict[int, Encoding] = {}
        inputs: dict[int, EmbedInput] = {}
        for number, one in written.items():
            try:
                inputs[number] = one.about(asks[number].item, self.family, self.evidence)
            except FAILURES as error:
                found[number] = replace(_encoding(error, one.text), seen_sizes=one.seen_sizes)
        vectors = self.embedder.vectors(list(inputs.values()), side)
        for (number, given), vector in zip(inputs.items(), vectors, strict=True):
            one = written[number]
            encoding = _encoding(vector, one.text, len(given.evidence))
            found[number] = replace(encoding, seen_sizes=one.seen_sizes, tcot_tokens=one.tokens)
        return found


def _encoding(vector: Vector, tcot: str | None = None, evidence: int = 0) -> Encoding:
    if isinstance(vector, EmbedRLError):
        fault = not isinstance(vector, ModelFailedError)
        return Encoding(None, tcot, evidence, str(vector), is_input_fault=fault)
    return Encoding(vector.vector, tcot, evidence, tokens=vector.tokens)
