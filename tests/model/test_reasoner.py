# SPDX-License-Identifier: Apache-2.0
"""A Reasoner outside verl is asked as the rollout is, and answers each prompt alone."""

from pathlib import Path

import pytest
import torch

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.lengths import PromptMeter
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FAMILIES
from embedrl_verl.model.reasoner import Reasoner
from embedrl_verl.model.tcots import PairSide, ask_for
from recipes.tiny_digits.canvas import TRAIN_SCANS
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.settings import tiny_reasoner
from recipes.tiny_digits.world import SOURCES, Sample, make_samples


@pytest.fixture(scope="module", params=FAMILIES)
def reasoner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return tiny_reasoner(build_tiny_model(tmp_path_factory.mktemp("reasoner"), family=request.param))


@pytest.fixture(scope="module")
def samples(reasoner: Reasoner) -> list[Sample]:
    family = reasoner.family
    return [one for source in SOURCES for one in make_samples(source, 4, scans=TRAIN_SCANS, seed=1, family=family)]


def test_prompts_are_token_by_token_those_of_the_rollout(reasoner: Reasoner, samples: list[Sample]) -> None:
    """verl's agent loop builds its prompts with this builder from the data set's messages and fitted media."""
    processor = reasoner.processor
    builder = PromptMeter(processor.tokenizer, processor, reasoner.family, {})._builder
    for prompt in (PairSide(sample.record, side) for sample in samples for side in SIDES):
        messages = prompt_messages(*prompt[:2], family=reasoner.family, style="compact", few_shot=False, max_frames=8)
        images, videos = load_prompt_media(messages, reasoner.limits, None)
        features: dict[str, torch.Tensor] = {}
        ids = builder.build_initial_tokens(messages, images=images, videos=videos, mm_inputs_out=features)
        row = reasoner.encode(prompt.ask())
        assert row.input_ids.tolist() == ids
        for name, values in row.multi_modal_inputs.items():
            assert torch.equal(values, torch.as_tensor(features[name]))


def test_generation_does_not_depend_on_the_batch(reasoner: Reasoner, samples: list[Sample]) -> None:
    asks = [PairSide(sample.record, side).ask() for sample in samples[::5] for side in SIDES]
    reasoner.max_new_tokens = 6
    together = reasoner.write(asks)
    assert together == [reasoner.write([ask])[0] for ask in asks] and all(one.text for one in together)


def test_settings_of_another_family_and_what_is_no_model_are_refused(reasoner, tmp_path):
    other = next(family for family in FAMILIES if family != reasoner.family)
    with pytest.raises(ConfigError, match=f"family must be auto or {reasoner.family}, .*got {other}"):
        Reasoner(reasoner.model.name_or_path, MediaConfig(family=other), max_new_tokens=1)
    with pytest.raises(ConfigError, match="must be a Reasoner's folder or hub id"):
        Reasoner(Path(tmp_path), MediaConfig(), max_new_tokens=1)


def test_a_prompt_beyond_the_models_positions_fails_alone(reasoner: Reasoner) -> None:
    asks = [ask_for(text, "query") for text in ("a b " * 5000, "a text")]
    long, short = reasoner.write(asks)
    assert long.text is None and "a prompt of the Reasoner may have" in long.problem and long.is_input_fault
    assert short.text is not None
