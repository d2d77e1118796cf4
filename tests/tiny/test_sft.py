# SPDX-License-Identifier: Apache-2.0
"""The cold start trains on the data set's own prompts, labels what it should, and stops where it is told."""

from pathlib import Path

import pytest
import torch

from embedrl_verl.data.lengths import PromptMeter
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import ConfigError
from embedrl_verl.tiny.digits import SFT_SCANS, SOURCES, Sample, Truth, make_samples
from embedrl_verl.tiny.models import build_tiny_model
from embedrl_verl.tiny.reasoner import END, TINY_LIMITS, Prompt, Reasoner
from embedrl_verl.tiny.sft import IGNORED, SftConfig, digit_accuracy, make_lesson, train_sft


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return Reasoner.from_pretrained(build_tiny_model(tmp_path_factory.mktemp("reasoner")))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [sample for source in SOURCES for sample in make_samples(source, 4, scans=SFT_SCANS, seed=1)]


def test_prompts_are_token_by_token_those_of_the_rollout(reasoner: Reasoner, samples: list[Sample]) -> None:
    """verl's agent loop builds its prompts with this builder from the data set's messages and fitted media."""
    processor = reasoner.processor
    builder = PromptMeter(processor.tokenizer, processor, "qwen2_vl", {})._builder
    for sample in samples:
        for side in SIDES:
            messages = prompt_messages(
                sample.record, side, family="qwen2_vl", style="compact", few_shot=False, max_frames=8
            )
            images, videos = load_prompt_media(messages, TINY_LIMITS, None)
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


def test_training_learns_the_lessons_and_stops_at_the_asked_accuracy(tmp_path: Path, samples: list[Sample]) -> None:
    reasoner = Reasoner.from_pretrained(build_tiny_model(tmp_path / "model", seed=1))
    lessons = samples[8:10]  # digits_t2i: a text and a picture
    config = SftConfig(max_steps=200, batch_size=4, warmup=5, check_every=20, stop_accuracy=0.9)
    accuracy = train_sft(reasoner, lessons, lessons, config)
    assert accuracy >= 0.9
    reasoner.save(tmp_path / "trained")
    again = Reasoner.from_pretrained(tmp_path / "trained")
    prompts, truths = [Prompt(s.record, "target") for s in lessons], [s.target for s in lessons]
    assert digit_accuracy(again.generate(prompts), truths)[0] == accuracy


def test_digits_are_compared_place_by_place() -> None:
    truths = [Truth("<thinking>{}</thinking><rethink>ok</rethink><answer>parcel 3071</answer>")] * 3
    answers = ["parcel 3071", "parcel 3079", ""]
    written = [f"<thinking>{{}}</thinking><rethink>ok</rethink><answer>{answer}</answer>" for answer in answers]
    digits, exact = digit_accuracy(written, truths)
    assert digits == pytest.approx(7 / 12) and exact == pytest.approx(1 / 3)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="stop_accuracy in"):
        SftConfig(stop_accuracy=1.5)
    with pytest.raises(ConfigError, match="at least 1"):
        SftConfig(batch_size=0)
