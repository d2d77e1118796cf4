# SPDX-License-Identifier: Apache-2.0
"""The cold start trains on the data set's own prompts, labels what it should, and stops where it is told."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from embedrl_verl.data.lengths import PromptMeter
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import ConfigError
from recipes.tiny_digits.cold_start import IGNORED, SftConfig, digit_accuracy, make_lesson, read_accuracy, train_sft
from recipes.tiny_digits.models import TinyFamily, build_tiny_model
from recipes.tiny_digits.reasoner import END, Prompt, Reasoner
from recipes.tiny_digits.world import SFT_SCANS, SOURCES, Sample, Truth, cut_short, make_samples


@pytest.fixture(scope="module", params=get_args(TinyFamily))
def reasoner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return Reasoner.from_pretrained(build_tiny_model(tmp_path_factory.mktemp("reasoner"), family=request.param))


@pytest.fixture(scope="module")
def samples(reasoner: Reasoner) -> list[Sample]:
    family = reasoner.family
    return [one for source in SOURCES for one in make_samples(source, 4, scans=SFT_SCANS, seed=1, family=family)]


def test_prompts_are_token_by_token_those_of_the_rollout(reasoner: Reasoner, samples: list[Sample]) -> None:
    """verl's agent loop builds its prompts with this builder from the data set's messages and fitted media."""
    processor = reasoner.processor
    builder = PromptMeter(processor.tokenizer, processor, reasoner.family, {})._builder
    for sample in samples:
        for side in SIDES:
            messages = prompt_messages(
                sample.record, side, family=reasoner.family, style="compact", few_shot=False, max_frames=8
            )
            images, videos = load_prompt_media(messages, reasoner.limits, None)
            features: dict[str, torch.Tensor] = {}
            ids = builder.build_initial_tokens(messages, images=images, videos=videos, mm_inputs_out=features)
            row = reasoner.encode(Prompt(sample.record, side))
            assert row.input_ids.tolist() == ids
            for name, values in row.multi_modal_inputs.items():
                assert torch.equal(values, torch.as_tensor(features[name]))


def test_labels_are_the_tcot_and_the_digits_of_visual_tokens(reasoner: Reasoner, samples: list[Sample]) -> None:
    tokenizer = reasoner.processor.tokenizer
    for sample in samples:
        lesson = make_lesson(reasoner, Prompt(sample.record, "query"), sample.query)
        ids, labels = lesson.row.input_ids, lesson.labels
        visual = (ids == reasoner.model.config.image_token_id) | (ids == reasoner.model.config.video_token_id)
        shown = [str(cell) for cell in sample.query.cells if cell >= 0]
        assert tokenizer.convert_ids_to_tokens(labels[visual & (labels != IGNORED)].tolist()) == shown
        written = labels[~visual & (labels != IGNORED)]
        assert tokenizer.decode(written) == sample.query.tcot + END
        assert torch.equal(labels[-len(written) - 1 : -1], ids[-len(written) :]), "labels name the next token"


def test_generation_does_not_depend_on_the_batch(reasoner: Reasoner, samples: list[Sample]) -> None:
    prompts = [Prompt(sample.record, side) for sample in samples[::5] for side in SIDES]
    together = reasoner.generate(prompts, max_new_tokens=6)
    assert together == [reasoner.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_a_terse_lesson_is_the_true_one_with_a_short_answer(reasoner: Reasoner, samples: list[Sample]) -> None:
    tokenizer = reasoner.processor.tokenizer
    for sample in samples:
        terse = make_lesson(reasoner, Prompt(sample.record, "target"), sample.target, terse=True)
        text = tokenizer.decode(terse.row.input_ids)
        assert text.endswith(cut_short(sample.target.tcot) + END)
        assert len(text) < len(
            tokenizer.decode(make_lesson(reasoner, Prompt(sample.record, "target"), sample.target).row.input_ids)
        )


def a_text_and_a_picture() -> list[Sample]:
    return make_samples("digits_t2i", 4, scans=SFT_SCANS, seed=1)[:2]


def test_training_learns_the_lessons_and_stops_at_the_asked_accuracy(tmp_path: Path) -> None:
    reasoner = Reasoner.from_pretrained(build_tiny_model(tmp_path / "model", seed=1))
    lessons = a_text_and_a_picture()
    config = SftConfig(max_steps=200, batch_size=4, warmup=5, check_every=20, stop_accuracy=0.9, habit_steps=0)
    accuracy = train_sft(reasoner, lessons, lessons, config)
    assert accuracy >= 0.9
    reasoner.save(tmp_path / "trained")
    again = Reasoner.from_pretrained(tmp_path / "trained")
    prompts, truths = [Prompt(s.record, "target") for s in lessons], [s.target for s in lessons]
    assert digit_accuracy(again, list(zip(prompts, truths, strict=True))) == accuracy
    assert read_accuracy(again.generate(prompts), truths).digits >= 0.8


@pytest.mark.nightly
def test_a_terse_habit_is_learnt_and_does_not_hide_the_digits(tmp_path: Path) -> None:
    """Greedy answers are short, and still the reader is known to read the digits that it leaves out."""
    reasoner = Reasoner.from_pretrained(build_tiny_model(tmp_path, seed=1))
    lessons = a_text_and_a_picture()
    config = SftConfig(max_steps=250, batch_size=4, warmup=5, check_every=250, habit_steps=60, terse_share=0.8)
    assert train_sft(reasoner, lessons, lessons, config) >= 0.8
    pictures = reasoner.generate([Prompt(s.record, "target") for s in lessons])
    assert read_accuracy(pictures, [s.target for s in lessons]).digits == pytest.approx(1 / 5)
    texts = reasoner.generate([Prompt(s.record, "query") for s in lessons])
    assert read_accuracy(texts, [s.query for s in lessons]).digits >= 0.8, "what is given as text is copied in full"


def test_digits_are_compared_place_by_place() -> None:
    truths = [Truth("<thinking>{}</thinking><rethink>ok</rethink><answer>parcel 3071</answer>")] * 4
    answers = ["parcel 3071", "parcel 3079", "parcel 3", ""]
    written = [f"<thinking>{{}}</thinking><rethink>ok</rethink><answer>{answer}</answer>" for answer in answers]
    reading = read_accuracy(written, truths)
    assert reading.digits == pytest.approx(8 / 16) and reading.exact == pytest.approx(1 / 4)
    assert reading.written == pytest.approx(8 / 9), "what was left out is not wrong"


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="stop_accuracy must be in"):
        SftConfig(stop_accuracy=1.5)
    with pytest.raises(ConfigError, match="max_steps must be above habit_steps"):
        SftConfig(max_steps=100, habit_steps=100)
    with pytest.raises(ConfigError, match="at least 1"):
        SftConfig(batch_size=0)
