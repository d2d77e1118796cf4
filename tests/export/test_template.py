# SPDX-License-Identifier: Apache-2.0
"""The exported chat template gives the string of `render_prompt` for any input, wherever it is rendered, and
sentence-transformers pools no row at some word."""

from __future__ import annotations

import dataclasses
import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from jinja2 import TemplateError
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor
from vllm.renderers.hf import safe_apply_chat_template

from embedrl_verl.embedder import PROFILES, EmbedInput, EmbedProcessor, build_messages, render_prompt
from embedrl_verl.embedder.messages import embedding_template
from tests.embedder.inputs import item, mixed_inputs, picture

# What texts of other models hold, pieces that become tokens when joined, and words that `\w` knows and ASCII does not.
PIECES = (
    *("<|eot_id|>", "<|im_end|>", "<|image_pad|>", "<|start_header_id|>", "<emb>", "</s>", "[INST]", "<start_of_turn>"),
    *("<|", "|>", "<", ">", "|", "<|<|", "|>|>", "<e", "mb>", "<emb", "<||>", "<|_|>", "<|a b|>", "<|a-b|>", "<|é|>"),
    *("<|end▁of▁sentence|>", "<｜end｜>", "<|²|>", "<|字|>", "<|\u0301|>", "<|٣|>", "<|𝔸|>", "a", "_", " ", "\n", "\t"),
    *(".", "。", "!", "हिन्दी", "fin…", "𐤟", "\u00a0", "<tool_call>", "{{ 1 }}", "{%", "\\n", "'", '"', "< emb >"),
)
CLOSED = (
    *("Find it.", "見つけて。", "見つけて！", "Trouve-la ?", "Encore…"),
    *("ابحث؟", "खोजो।", "(a page)", '"a page"', "x𐤟"),
)
OPEN = ("Find it", "見つける", "हिन्दी", "খুঁজি", "cafe\u0301", "5 €", "a + b <", "x²", "ابحث", "🙂")


@pytest.fixture(scope="module")
def processors(saved_model) -> Callable[[str], EmbedProcessor]:
    """The processor of a profile."""
    made: dict[str, EmbedProcessor] = {}

    def make(name: str) -> EmbedProcessor:
        if name not in made:
            family = "qwen3_vl" if PROFILES[name].families == ("qwen3_vl",) else "qwen2_vl"
            made[name] = EmbedProcessor.from_pretrained(saved_model(family) / "huggingface", PROFILES[name])
        return made[name]

    return make


def template_of(processor: EmbedProcessor, longest: int = 0) -> str:
    return embedding_template(processor.profile, processor.limits, processor.family, longest)


def render(processor: EmbedProcessor, messages: list[dict[str, Any]], longest: int = 0) -> str:
    template = template_of(processor, longest)
    return processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def plain(text: str, instruction: str = "", *media: tuple[str, Any]) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": [{"type": "text", "text": instruction}]}] if instruction else []
    words = [{"type": "text", "text": text}] if text else []
    return [*system, {"role": "user", "content": [*({"type": kind, kind: one} for kind, one in media), *words]}]


@pytest.mark.parametrize("name", PROFILES)
def test_any_text_gives_one_prompt_in_the_embedder_in_transformers_and_in_vllm(name, processors):
    processor, image, draw = processors(name), picture(0), random.Random(0)
    profile = processor.profile
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 8))) for _ in range(400)]
    for number, text in enumerate([*texts, *PIECES]):
        asked = text.strip() if number % 3 == 0 else ""
        one = item(text, (image,) if number % 2 else (), instruction=asked)
        expected = render_prompt(build_messages(one, profile=profile), chat=profile.chat)
        messages = plain(text, asked, *[("image", image)] * (number % 2))
        assert render(processor, messages, 4096) == expected, text
        assert "<emb>" not in expected.removesuffix(profile.tail)
        if number % 20:
            continue
        template, tokenizer = template_of(processor), processor.tokenizer
        served = safe_apply_chat_template(
            None, tokenizer, messages, chat_template=template, tokenize=False, add_generation_prompt=False
        )
        assert served == expected


@pytest.mark.parametrize("name", PROFILES)
def test_complete_messages_and_plain_media_are_rendered_as_render_prompt_does(name, saved_model):
    profile = PROFILES[name]
    folder = saved_model("qwen3_vl" if profile.families == ("qwen3_vl",) else "qwen2_vl") / "huggingface"
    processor, hugging_face = EmbedProcessor.from_pretrained(folder, profile), AutoProcessor.from_pretrained(folder)
    template = template_of(processor, processor.max_length)
    asked = [*mixed_inputs(24), EmbedInput(item()), EmbedInput(item("x\ny ", instruction="no stop"))]
    unasked = [dataclasses.replace(one, item=dataclasses.replace(one.item, instruction="")) for one in asked]
    for one in [*asked, *unasked]:
        complete = build_messages(one.item, one.tcot, one.evidence, profile=profile)
        images, frames = [("image", image) for image in one.item.images], list(one.item.frames)
        if frames and profile.frames_as_images:
            images += [("image", frame) for frame in frames]
        elif frames:
            images.insert(0, ("video", frames))
        forms = [complete]
        if not (one.tcot or one.evidence):
            forms.append(plain(one.item.text, one.item.instruction, *images))
        for messages in forms:
            rendered = hugging_face.apply_chat_template(messages, chat_template=template, tokenize=False)
            assert rendered == render_prompt(complete, chat=profile.chat)


def test_the_parts_of_a_message_cannot_be_joined_to_a_control_token(processors):
    processor = processors("embed_rl")
    for first, second in (("<|im_", "end|>"), ("<", "|image_pad|>"), ("<em", "b>"), ("a<|x", "|>b")):
        for role in ("user", "system"):
            rest = plain("t") if role == "system" else []
            apart, joined = (
                render(
                    processor,
                    [{"role": role, "content": [{"type": "text", "text": text} for text in texts]}, *rest],
                )
                for texts in ([first, second], [first + second])
            )
            assert apart == joined
            assert first + second not in apart.removeprefix("<|im_start|>user").split("<|im_end|>", 1)[0]


@pytest.mark.parametrize("instruction", [*CLOSED, *OPEN])
def test_an_instruction_gets_a_stop_unless_it_ends_in_punctuation_of_any_script(instruction, processors):
    processor = processors("qwen3_vl_embedding")
    system = build_messages(item("t", instruction=instruction), profile=processor.profile)[0]["content"][0]["text"]
    assert system == (instruction if instruction in CLOSED else instruction + ".")
    assert render(processor, plain("t", instruction)).startswith(f"<|im_start|>system\n{system}<|im_end|>")


def test_the_templates_list_of_punctuation_is_unicodes(processors):
    template = template_of(processors("qwen3_vl_embedding"))
    (line,) = (line for line in template.splitlines() if line.startswith("{%- set punctuation"))
    found = set(line.split('"', 1)[1].rsplit('"', 1)[0])
    assert found == {chr(i) for i in range(0x110000) if unicodedata.category(chr(i)).startswith("P")}
    assert "\U0001091f" in found and 'punctuation = ""' in template_of(processors("embed_rl"))


@pytest.fixture(scope="module")
def models(exported) -> Callable[[str], SentenceTransformer]:
    """The export of a family in sentence-transformers."""
    made: dict[str, SentenceTransformer] = {}

    def make(family: str = "qwen2_vl") -> SentenceTransformer:
        if family not in made:
            made[family] = SentenceTransformer(str(exported(family)), device="cpu")
        return made[family]

    return make


WORDS = "1 2 3 4 5 6 7 8 9 " * 500
LARGE, SMALL = Image.new("RGB", (1400, 1400), (255, 0, 0)), Image.new("RGB", (280, 280))
END = "\nSummarize the above content in one word:<|im_end|>\n<|im_start|>assistant\n<emb>"


@pytest.mark.parametrize(
    "given",
    [
        {"image": SMALL, "text": WORDS},
        {"image": [LARGE] * 5, "text": "a heron"},  # 3,845 tokens and the prompt's: only the words around would be cut
        {"video": [SMALL] * 8, "text": "字" * 1500},
        [*plain("a", "", ("image", SMALL)), {"role": "user", "content": WORDS}],
        build_messages(item(WORDS, (SMALL,))),
        build_messages(item(WORDS)),
    ],
)
def test_a_row_that_could_lose_its_end_is_refused_with_rule_value_and_fix(given, models):
    with pytest.raises(TemplateError, match=r"at most 4096 tokens by a safe .*has \d+: .*Shorten the text"):
        models().preprocess([given])


@pytest.mark.parametrize("given", [WORDS, {"text": WORDS}, plain(WORDS, "Find it."), "字" * 9000])
def test_a_text_alone_is_cut_and_keeps_the_end_of_the_prompt(given, models):
    ids = models().preprocess([given])["input_ids"][0]
    assert len(ids) == models().max_seq_length == 4096 and models().tokenizer.decode(ids).endswith(END)


def test_a_row_that_fits_is_read_whole_beside_media_and_counted_ones_are_trusted(models):
    fits: list[Any] = [{"image": [SMALL] * 20, "text": "a heron " * 10}, {"video": [SMALL] * 8, "text": "字" * 600}]
    counted = [dict(message) for message in build_messages(item("the heron stands " * 300, (SMALL,)))]
    with pytest.raises(TemplateError):
        models().preprocess([counted])
    counted[0]["fitted"] = True
    for given in (*fits, counted):
        ids = models().preprocess([given])["input_ids"][0]
        assert len(ids) < 4096 and models().tokenizer.decode(ids).endswith(END)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_the_template_counts_for_media_is_no_less_than_what_is_made_of_them(family, models, saved_model):
    processor, draw = EmbedProcessor.from_pretrained(saved_model(family) / "huggingface"), random.Random(1)
    for number in range(24):
        sides = [draw.choice((1, 20, 200, 900)) + draw.randint(0, 60) for _ in range(2)]
        if max(sides) > 190 * min(sides):
            continue
        image = Image.new("RGB", (max(sides[0], 32), max(sides[1], 32)) if number % 3 == 0 else tuple(sides))
        given = {"video": [image] * draw.randint(1, 9)} if number % 3 == 0 else {"image": image}
        tokens = int(models(family).preprocess([given])["attention_mask"].sum())
        with pytest.raises(TemplateError, match="this one has") as refused:
            render(processor, plain("", "", *given.items()), 1)
        bound = int(str(refused.value).split("this one has ")[1].split(":")[0])
        assert tokens <= bound <= 2 * tokens + 600
