# SPDX-License-Identifier: Apache-2.0
"""The cold start trains on the data set's own prompts, labels what it should, and stops where it is told."""

from pathlib import Path

import pytest
import torch

from embedrl_verl.families import FAMILIES
from embedrl_verl.model.reasoner import Reasoner
from embedrl_verl.model.tcots import PairSide
from embedrl_verl.tcot import parse_tcot
from recipes.tiny_digits.canvas import TRAIN_SCANS
from recipes.tiny_digits.cold_start import IGNORED, digit_accuracy, make_lesson, train_cold_start
from recipes.tiny_digits.models import END, build_tiny_model
from recipes.tiny_digits.settings import tiny_reasoner
from recipes.tiny_digits.world import SOURCES, Sample, cut_short, make_samples


@pytest.fixture(scope="module", params=FAMILIES)
def reasoner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return tiny_reasoner(build_tiny_model(tmp_path_factory.mktemp("reasoner"), family=request.param))


@pytest.fixture(scope="module")
def samples(reasoner: Reasoner) -> list[Sample]:
    family = reasoner.family
    return [one for source in SOURCES for one in make_samples(source, 4, scans=TRAIN_SCANS, seed=1, family=family)]


@pytest.mark.parametrize("terse", [False, True])
def test_labels_are_the_tcot_and_the_digits_of_visual_tokens(reasoner, samples, terse):
    tokenizer = reasoner.processor.tokenizer
    for sample in samples:
        row, labels = make_lesson(reasoner, PairSide(sample.record, "query"), sample.query, terse=terse)
        ids = row.input_ids
        visual = (ids == reasoner.model.config.image_token_id) | (ids == reasoner.model.config.video_token_id)
        shown = [str(cell) for cell in sample.query.cells if cell >= 0]
        assert tokenizer.convert_ids_to_tokens(labels[visual & (labels != IGNORED)].tolist()) == shown
        written = labels[~visual & (labels != IGNORED)]
        taught = sample.query.lesson or sample.query.tcot
        assert tokenizer.decode(written) == (cut_short(taught) if terse else taught) + END
        assert torch.equal(labels[-len(written) - 1 : -1], ids[-len(written) :]), "labels name the next token"


def a_text_and_a_picture() -> list[Sample]:
    return make_samples("digits_t2i", 4, scans=TRAIN_SCANS, seed=1)[:2]


def test_training_learns_the_lessons_and_stops_at_the_asked_accuracy(tmp_path, capsys):
    reasoner = tiny_reasoner(build_tiny_model(tmp_path / "model", seed=1))
    lessons = a_text_and_a_picture()
    options = {"batch_size": 4, "warmup": 5, "check_every": 20, "habit_steps": 0}
    accuracy = train_cold_start(reasoner, lessons, lessons, max_steps=200, **options)
    assert accuracy >= 0.9 and "step 200" not in capsys.readouterr().out
    reasoner.save(tmp_path / "trained")
    again = tiny_reasoner(tmp_path / "trained")
    prompts = [PairSide(s.record, "target") for s in lessons]
    assert digit_accuracy(again, [(one, s.target) for one, s in zip(prompts, lessons, strict=True)]) == accuracy
    answers = [
        parse_tcot(text).answer for text in [one.text or "" for one in again.write([one.ask() for one in prompts])]
    ]
    wanted = [parse_tcot(s.target.tcot).answer for s in lessons]
    assert sum(map(str.__eq__, "".join(answers), "".join(wanted))) >= 8, "of ten digits"


@pytest.mark.nightly
def test_a_terse_habit_is_learnt_and_does_not_hide_the_digits(tmp_path: Path) -> None:
    """Greedy answers are short, and still the reader is known to read the digits that it leaves out."""
    reasoner = tiny_reasoner(build_tiny_model(tmp_path, seed=1))
    lessons = a_text_and_a_picture()
    options = {"batch_size": 4, "warmup": 5, "check_every": 250, "habit_steps": 60, "terse_share": 0.8}
    assert train_cold_start(reasoner, lessons, lessons, max_steps=250, **options) >= 0.8
    for side, digits in (("target", 1), ("query", 5)):  # what is given as text is copied in full
        texts = [one.text or "" for one in reasoner.write([PairSide(s.record, side).ask() for s in lessons])]
        assert [len(parse_tcot(text).answer) for text in texts] == [digits, digits]
