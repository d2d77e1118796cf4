# SPDX-License-Identifier: Apache-2.0
"""The Embedder loads while the agent loops start, and no step begins before it is there."""

import pytest
import verl.trainer.ppo.v1  # noqa: F401  (registers the modes)
from omegaconf import OmegaConf

from embedrl_verl.errors import EmbedderError
from embedrl_verl.trainer import egrl, setup


class VerlsLoop:
    def fit(self, agent_loop_manager):
        self.began = agent_loop_manager


class Trainer(egrl.EGRLMixin, VerlsLoop):
    def __init__(self, loads):
        self._embedder_loads, self.began = loads, None
        self.config = OmegaConf.create({"trainer": {"logger": []}})


def test_training_begins_when_every_rank_has_its_weights(monkeypatch):
    trainer = Trainer(["rank 0", "rank 1"])
    waited = []

    def get(references):
        assert trainer.began is None
        waited.extend(references)

    monkeypatch.setattr(setup.ray, "get", get)
    trainer.fit("agent loops")
    assert waited == ["rank 0", "rank 1"] and trainer.began == "agent loops"


def test_an_embedder_that_does_not_load_is_the_runs_error(monkeypatch):
    def get(_references):
        raise EmbedderError("no such weights")

    trainer = Trainer(["rank 0"])
    monkeypatch.setattr(setup.ray, "get", get)
    with pytest.raises(EmbedderError, match="no such weights"):
        trainer.fit("agent loops")
    assert trainer.began is None
