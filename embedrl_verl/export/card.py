# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of an export.

It says what is known and nothing else: what a missing `training.json` would have told is "unknown". Values pass through
`public_text`, so no path of the machine is published, and cannot break the table they stand in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from embedrl_verl.embedder.profiles import EmbedderProfile
from embedrl_verl.export.checkpoint import Kind
from embedrl_verl.export.record import TrainingRecord, public_model, public_text

PAPER = "https://arxiv.org/abs/2602.13823"
UNKNOWN = "unknown"
_VIDEO = """

Videos in sentence-transformers: messages cannot carry a frame rate. Qwen2-VL does not need it; Qwen2.5-VL and Qwen3-VL
assume 24 frames a second unless it is given, for one video at a time, with frames of an even number (and for Qwen3-VL
of the size that `embedrl_verl.data.media.fit_image` gives them):

```python
metadata = {"fps": 2.0, "total_num_frames": 8, "frames_indices": list(range(8))}
vector = model.encode([messages], processing_kwargs={"video": {"video_metadata": [metadata]}})
```"""


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        name: of the exported folder.
        kind: embedder or reasoner.
        architecture: the generation class.
        parameters: how many numbers the weights have.
        dtype: of the weights, such as float32.
        base_model: name or path of the model that training began with; None = unknown.
        record: what the run says about itself; None = nothing.
        step: training step; None = unknown.
        lora: (rank, alpha) of the adapter that was merged; None = no adapter.
        cut_to: lengths below D to which its vectors can be cut, in numbers.
        profile: how the Embedder is prompted; None for a Reasoner.
        prompt: the Embedder's prompt of an image with the text "TEXT".
        dim: D, the length of the Embedder's vectors in numbers.
        image_tokens: (fewest, most) visual tokens of an image that the Embedder reads.
    """

    name: str
    kind: Kind
    architecture: str
    parameters: int
    dtype: str
    base_model: str | None
    record: TrainingRecord | None
    step: int | None = None
    lora: tuple[int, float] | None = None
    cut_to: tuple[int, ...] = ()
    profile: EmbedderProfile | None = None
    prompt: str = ""
    dim: int = 0
    image_tokens: tuple[int, int] = (0, 0)


def render_card(facts: CardFacts) -> str:
    """The text of README.md."""
    sections = [_front_matter(facts), f"# {_line(facts.name)}", _what(facts), _training(facts), _scores(facts)]
    sections.append(_use_embedder(facts) if facts.kind == "embedder" else _use_reasoner(facts))
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    embedder = facts.kind == "embedder"
    content: dict[str, Any] = {
        "library_name": "sentence-transformers" if embedder else "transformers",
        "pipeline_tag": "sentence-similarity" if embedder else "image-text-to-text",
        "tags": ["embedrl-verl", "multimodal", "retrieval"],
    }
    content["tags"] += ["sentence-transformers", "feature-extraction"] if embedder else ["reinforcement-learning"]
    if facts.base_model is not None:
        content = {"base_model": public_model(facts.base_model), **content}
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _what(facts: CardFacts) -> str:
    if facts.kind == "embedder":
        role = (
            "An Embedder: it turns text, images, document pages and videos, each with or without a chain of thought "
            f"(T-CoT) and its evidence, into vectors of {facts.dim} numbers and length 1, compared by cosine."
        )
    else:
        role = (
            "A Reasoner: for a query or a candidate (text, images, document pages, video) it writes a short chain of "
            "thought with evidence (T-CoT) that an Embedder reads along with the input."
        )
    lora = "" if facts.lora is None else f" A LoRA adapter (rank {facts.lora[0]}, alpha {facts.lora[1]:g}) is merged."
    return (
        f"{role} Trained with embedrl-verl, Embedder-guided reinforcement learning after "
        f"[Embed-RL]({PAPER}).\n\n`{facts.architecture}`, {facts.parameters:,} parameters, {facts.dtype}.{lora}"
    )


def _training(facts: CardFacts) -> str:
    record = facts.record or TrainingRecord()
    base = UNKNOWN if facts.base_model is None else public_model(facts.base_model)
    lines = [
        "## Training",
        "",
        f"- Base model: {_line(base)}",
        f"- Stage: {_line(record.stage or UNKNOWN)}",
        f"- Step: {UNKNOWN if facts.step is None else facts.step}",
    ]
    if not record.data:
        lines.append(f"- Data: {UNKNOWN}")
    for source, pairs in record.data:
        lines.append(f"- Data: {_line(source)}" + ("" if pairs is None else f" ({pairs:,} pairs)"))
    if not record.settings:
        return "\n".join([*lines, f"- Settings: {UNKNOWN}"])
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in record.settings.items()]
    return "\n".join([*lines, "", "| setting | value |", "|---|---|", *rows])


def _scores(facts: CardFacts) -> str:
    scores = facts.record.scores if facts.record is not None else {}
    if not scores:
        return f"## Scores\n\nThe scores of this model are {UNKNOWN}."
    rows = [f"| {_cell(name)} | {value:.4g} |" for name, value in scores.items()]
    return "\n".join(["## Scores", "", "| score | value |", "|---|---|", *rows])


def _use_embedder(facts: CardFacts) -> str:
    assert facts.profile is not None
    low, high = facts.image_tokens
    cut = ""
    if facts.cut_to:
        cut = (
            f"\n\nTrained to be cut too: the first {', '.join(map(str, facts.cut_to))} numbers, at length 1 again, are "
            "vectors of their own (`truncate_dim` in sentence-transformers, `dimensions` in vLLM's API)."
        )
    chosen = "" if facts.profile.name == "embed_rl" else f', profile="{facts.profile.name}"'
    serve = "" if facts.profile.name == "embed_rl" else f" --profile {facts.profile.name}"
    frames = " Frames of a video are given as images." if facts.profile.frames_as_images else _VIDEO
    return f"""## Use

With sentence-transformers (6.2 or later). Plain input is completed to the model's prompt; `prompt` is the instruction.
embedrl_verl turns pictures upright and puts transparent ones on white by itself; here that is yours to do, as below:

```python
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{facts.name}")
query = model.encode(["a heron on one leg"], prompt="Find the photo that matches the text.")
photo = ImageOps.exif_transpose(Image.open("heron.jpg"))
images = model.encode([{{"image": photo}}], prompt="Find the caption of this photo.")
print(model.similarity(query, images))
```

With embedrl_verl, which also takes T-CoTs and evidence, and cuts long texts (480 tokens) as in training:

```python
from embedrl_verl.data.media import load_item
from embedrl_verl.data.schema import Item
from embedrl_verl.embedder import Embedder, EmbedInput, build_messages
from embedrl_verl.tcot import parse_tcot

embedder = Embedder.from_pretrained("{facts.name}"{chosen})
item = load_item(Item(text="a heron", images=("heron.jpg",)), media_root=".")
tcot, evidence = parse_tcot("<thinking>A bird.</thinking><rethink>Yes.</rethink><answer>a heron</answer>"), ()
vectors = embedder.embed([EmbedInput(item, tcot, evidence)])
# the same from sentence-transformers:
vectors = model.encode([build_messages(item, tcot, evidence, profile=embedder.processor.profile)])
```

With transformers. The vector is the last hidden state of the last token, at length 1:

```python
import torch
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{facts.name}")
model = AutoModel.from_pretrained("{facts.name}")
prompt = {facts.prompt!r}
inputs = processor(text=[prompt], images=[photo], return_tensors="pt")
with torch.no_grad():
    vector = torch.nn.functional.normalize(model(**inputs).last_hidden_state[:, -1], dim=-1)
```

As a server (stock vLLM): `embedrl serve-embedder {facts.name}{serve}`. Plain text gets its prompt:

```
curl http://127.0.0.1:8000/v1/embeddings -H "Content-Type: application/json" -d '{{"input": "a heron on one leg"}}'
```

An instruction, images and videos are given as chat messages (`messages`; the instruction as a system message).

With vLLM, as a pooling model (last token, length 1). `EmbedProcessor.prepare` gives prompt and media as the model knows
them; a bare text, and the model's own chat template, give other vectors:

```python
from vllm import LLM
from embedrl_verl.embedder import EmbedProcessor

llm = LLM("{facts.name}", runner="pooling", convert="embed")
prepared = EmbedProcessor.from_pretrained("{facts.name}"{chosen.replace("profile=", "")}).prepare(EmbedInput(item))
request = {{"prompt": prepared.prompt, "multi_modal_data": {{"image": list(prepared.images)}}}}
vector = llm.embed([request])[0].outputs.embedding
```

Images are read at {low} to {high} visual tokens; embedrl_verl and sentence-transformers see to it, for transformers and
vLLM give images of such sizes.{frames}{cut}"""


def _use_reasoner(facts: CardFacts) -> str:
    return f"""## Use

With transformers; the prompts that it was trained on come from `embedrl_verl.tcot`:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{facts.name}")
model = AutoModelForImageTextToText.from_pretrained("{facts.name}")
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=2048)[:, inputs["input_ids"].shape[1] :]
answer = processor.batch_decode(tokens, skip_special_tokens=True)[0]
```

With vLLM:

```python
from vllm import LLM, SamplingParams

llm = LLM("{facts.name}")
answer = llm.chat(messages, SamplingParams(max_tokens=2048))[0].outputs[0].text
```

With embedrl_verl it goes on in training (`actor_rollout_ref.model.path`), and `parse_tcot` reads its answers:

```python
from embedrl_verl.tcot import parse_tcot

tcot = parse_tcot(answer)
```

An answer can only be as good as the Embedder that rewarded it: use both together."""


def _line(value: object) -> str:
    """One line of public text."""
    return re.sub(r"\s+", " ", public_text(value))


def _cell(value: object) -> str:
    """Public text that stays within a table's cell."""
    return _line(value).replace("|", "\\|")
