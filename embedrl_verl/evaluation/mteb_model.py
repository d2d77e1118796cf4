# SPDX-License-Identifier: Apache-2.0
"""Reasoner and Embedder as a model of mteb (2.26): its tasks are run on the pair, or on the Embedder alone.

    python -m embedrl_verl.evaluation.mteb_model --embedder FOLDER --reasoner FOLDER --tcots tcots \\
        run -t VidoreArxivQARetrieval --output-folder results

or, in Python:

    meta = model_meta("runs/tiny_cpu/seed0/embedder", "runs/tiny_cpu/seed0/reasoner", tcots="tcots")
    mteb.evaluate(meta.load_model(), mteb.get_tasks(["VidoreArxivQARetrieval"]))

mteb knows models by a registry in its own package and has no entry point for others, so the command enters the pair
there and then hands over to mteb's own command line (docs/mteb.md).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from embedrl_verl.data.model_files import model_digest, weights_of
from embedrl_verl.data.schema import Side
from embedrl_verl.embedder.loading import load_config
from embedrl_verl.errors import ConfigError, EmbedderError, EmbedRLError
from embedrl_verl.evaluation.mteb_inputs import asks_of, count_of, has_pages, with_files
from embedrl_verl.model import EmbedRLModel
from embedrl_verl.model.kept import KeptTcots
from embedrl_verl.model.loading import Engine, Settings, folder_of, read_settings
from embedrl_verl.model.pair import Encoding

MtebThink = Literal["always", "never"]
COMMANDS = ("run", "mock-run")
UNIT = 1e-3
"""How far the length of a vector may be from 1."""


class MtebModel:
    """`EmbedRLModel` by mteb's `EncoderProtocol`.

    Queries are embedded as queries, documents as targets, and inputs of tasks that know no sides as queries. The task's
    instruction goes to queries; documents get one only where the task (or `prompts`) has one for documents.

    Args:
        model: think "always" or "never".
        prompts: instructions in place of mteb's, by task name, task type or prompt type ("query", "document"), or two
            of them joined ("NQ-query"), the more special first; "" takes an instruction away.
    """

    def __init__(self, model: EmbedRLModel, prompts: Mapping[str, str] | None = None) -> None:
        if model.think == "when_needed":
            raise ConfigError("think must be always or never with mteb, which gives queries without their candidates")
        self.model, self.prompts = model, dict(prompts or {})
        self.mteb_model_meta: Any = None
        """mteb's `ModelMeta`; `ModelMeta.load_model` sets it."""

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray[Any, Any]:
        """Vectors of the inputs of a data loader, in its batches: float32 (N, D), each of length 1.

        Raises:
            EmbedderError: names the first input without a vector; none is left out or made up.
            ConfigError: the inputs have sound, or a precision is asked for.
        """
        if options.get("precision") not in (None, "float32"):
            raise ConfigError(f"precision must be float32; got {options['precision']!r}")
        side: Side = "target" if prompt_type is not None and prompt_type.value == "document" else "query"
        label = {"subset": hf_subset, "split": hf_split, "side": side}
        instruction = self.instruction(task_metadata, prompt_type)
        vectors: list[np.ndarray[Any, Any]] = []
        for batch in tqdm(with_files(inputs), disable=not options.get("show_progress_bar"), desc="Encoding"):
            count = count_of(batch)
            ids = _ids(batch, count)
            names = [
                f"{task_metadata.name}, {hf_subset}, {hf_split}, {prompt_type.value if prompt_type else 'input'} "
                + (f"number {len(vectors) + number}" if own is None else repr(own))
                for number, own in enumerate(ids)
            ]
            asks = asks_of(
                batch,
                names,
                side,
                instruction=instruction,
                is_page=has_pages(task_metadata),
                max_frames=self.model.max_frames,
            )
            if isinstance(self.model.reasoner, KeptTcots):
                labels = [{} if own is None else {"id": own, **label} for own in ids]
                self.model.reasoner.about(task_metadata.name, labels)
            encodings = self.model.encodings([ask.item for ask in asks], side, batch_size=max(count, 1))
            vectors += [_checked(name, one) for name, one in zip(names, encodings, strict=True)]
        return np.stack(vectors) if vectors else np.empty((0, 0), dtype=np.float32)

    def instruction(self, task_metadata: Any, prompt_type: Any) -> str:
        """The instruction of one side of a task; "" for none."""
        from mteb.abstasks.abstask import get_abstask_prompt
        from mteb.models.abs_encoder import get_prompt_name

        own = get_prompt_name(self.prompts, task_metadata, prompt_type)
        if own is not None:
            return self.prompts[own]
        is_document = prompt_type is not None and prompt_type.value == "document"
        prompt = task_metadata.prompt
        if isinstance(prompt, dict):
            return str(prompt.get("document" if is_document else "query") or "")
        if is_document:
            return ""
        return str(prompt or get_abstask_prompt(task_metadata.name))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(N, M) cosines."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(N,) cosines of row and row."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def _ids(batch: Mapping[str, Any], count: int) -> list[str | None]:
    """mteb's own names of the inputs; None where a task has none."""
    if "id" not in batch:
        return [None] * count
    return [str(one.item() if hasattr(one, "item") else one) for one in batch["id"]]


def _checked(name: str, encoding: Encoding) -> np.ndarray[Any, Any]:
    if encoding.vector is None:
        raise EmbedderError(f"{name}: there is no vector: {encoding.problem}")
    vector = encoding.vector.float().cpu()
    length = float(vector.norm())
    if not abs(length - 1) <= UNIT:  # also of NaN
        raise EmbedderError(f"{name}: the vector must be finite and of length 1; its length is {length}")
    found: np.ndarray[Any, Any] = vector.numpy()
    return found


def load(
    model_name: str,
    revision: str | None = None,
    *,
    device: str | int | None = None,
    embedder: str,
    reasoner: str | None = None,
    think: MtebThink | None = None,
    engine: Engine = "transformers",
    prompts_like: str | None = None,
    settings: Sequence[str] = (),
    tcots: str | None = None,
    prompts: Mapping[str, str] | None = None,
) -> MtebModel:
    """mteb's loader of what `model_meta` describes; the arguments are those of `model_meta`, but for the first three,
    which mteb gives. `device`: of torch, or the number of a GPU."""
    where = "auto" if device is None else f"cuda:{device}" if isinstance(device, int) else str(device)
    model = EmbedRLModel.from_pretrained(
        embedder, reasoner, think=think, engine=engine, prompts_like=prompts_like, settings=settings, device=where
    )
    if tcots is not None and model.reasoner is not None:
        assert reasoner is not None
        read = read_settings(embedder, settings, where)
        model.reasoner = KeptTcots(model.reasoner, tcots, _asked_by(reasoner, prompts_like, read))
    return MtebModel(model, prompts)


def model_meta(
    embedder: str,
    reasoner: str | None = None,
    *,
    name: str | None = None,
    languages: Sequence[str] | None = None,
    think: MtebThink | None = None,
    engine: Engine = "transformers",
    prompts_like: str | None = None,
    settings: Sequence[str] = (),
    tcots: str | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Any:
    """mteb's `ModelMeta` of a pair, or of an Embedder alone; `.load_model()` loads it, `mteb.evaluate` takes it as it
    is. What training data it saw is unknown to mteb (None).

    Args:
        embedder, reasoner, think, engine, prompts_like, settings: as of `EmbedRLModel.from_pretrained`.
        name: "owner/model"; None: "embedrl/" and the names of the folders.
        languages: mteb's codes ("eng-Latn"); None: unknown.
        tcots: folder where T-CoTs are kept, and taken from in a second run.
        prompts: see `MtebModel`.

    Raises:
        ConfigError: mteb is not installed, or a model has no files.
    """
    if importlib.util.find_spec("mteb") is None:
        raise ConfigError("mteb must be installed to run its tasks: pip install 'embedrl-verl[eval]'")
    from mteb.models import ModelMeta

    own = dict(prompts or {})
    _check_prompts(own)
    read = read_settings(embedder, settings, "cpu")
    config = read.embedrl.embedder
    dims = None
    if config.backend != "sentence_transformers":
        dims = load_config(embedder).get_text_config().hidden_size  # and a hub id is in the local cache from here on
    folders = [embedder, *([] if reasoner is None else [folder_of(reasoner, prompts_like)])]
    counted = [one for one in map(weights_of, folders) if one is not None]
    is_known = len(counted) == len(folders)
    asked_by = None if reasoner is None or think == "never" else _asked_by(reasoner, prompts_like, read)
    facts = [model_digest(embedder) or embedder, asked_by, engine, sorted(settings), sorted(own.items())]
    arguments = {
        **{"embedder": embedder, "reasoner": reasoner, "think": think, "engine": engine, "prompts_like": prompts_like},
        **{"settings": tuple(settings), "tcots": tcots, "prompts": own},
    }
    return ModelMeta(
        loader=load,
        loader_kwargs=arguments,
        name=name or "embedrl/" + "+".join(Path(one).expanduser().resolve().name for one in folders),
        # mteb keeps results by it: whatever changes vectors must change it.
        revision=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40],
        release_date=None,
        languages=None if languages is None else list(languages),
        n_parameters=sum(count for count, _ in counted) if is_known else None,
        memory_usage_mb=round(sum(size for _, size in counted) / 2**20) if is_known else None,
        max_tokens=config.max_text_tokens,
        embed_dim=dims,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers"],
        similarity_fn_name="cosine",
        use_instructions=True,
        training_datasets=None,
        modalities=["text", "image", *(["video"] if _has_torchcodec() else [])],
    )


def _check_prompts(prompts: dict[str, str]) -> None:
    from mteb.models.abs_encoder import AbsEncoder

    try:
        AbsEncoder.validate_task_to_prompt_name(prompts)
    except KeyError as error:
        raise ConfigError(f"prompts must be by task name, task type or prompt type of mteb: {error.args[0]}") from error


def _has_torchcodec() -> bool:
    """mteb loads no model that reads video without it; this package reads videos with PyAV."""
    try:
        importlib.metadata.version("torchcodec")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _asked_by(reasoner: str, prompts_like: str | None, read: Settings) -> str:
    """Tells a Reasoner and how it is asked from every other; of servers as far as the folder and the URL tell."""
    folder = folder_of(reasoner, prompts_like)
    media, length = read.asked(folder)
    server = reasoner if folder != reasoner else None
    facts = [model_digest(folder) or folder, server, asdict(media), length, read.embedrl.embedder.dtype]
    return json.dumps(facts, sort_keys=True, default=str)


def main(words: Sequence[str] | None = None) -> int:
    """The command of the module's docstring; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m embedrl_verl.evaluation.mteb_model",
        description="mteb's own command line (run, mock-run) for a pair; what follows the command is mteb's.",
    )
    parser.add_argument("--embedder", required=True, help="folder or hub id")
    parser.add_argument("--reasoner", help="folder, hub id, or URL of an OpenAI-style server; none: Embedder alone")
    parser.add_argument("--prompts-like", help="of a server: folder of the model that it serves")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--name", help='"owner/model", as results name it')
    parser.add_argument("--language", action="append", help='mteb\'s code, as "eng-Latn"; may be repeated')
    parser.add_argument("--tcots", help="folder where T-CoTs are kept and taken from")
    parser.add_argument("--prompts", type=Path, help="JSON file of instructions by mteb's keys")
    parser.add_argument("--set", action="append", default=[], help="hydra override of a run; may be repeated")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="mteb's own arguments")
    given = parser.parse_args(words)
    try:
        meta = model_meta(
            given.embedder,
            given.reasoner,
            name=given.name,
            languages=given.language,
            engine=given.engine,
            prompts_like=given.prompts_like,
            settings=given.set,
            tcots=given.tcots,
            prompts=None if given.prompts is None else json.loads(given.prompts.read_text(encoding="utf-8")),
        )
        from mteb.cli.build_cli import build_cli
        from mteb.models.model_implementations import MODEL_REGISTRY

        MODEL_REGISTRY[meta.name] = meta
        arguments = build_cli().parse_args([given.command, "--model", meta.name, *given.rest])
        arguments.func(arguments)
    except EmbedRLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
