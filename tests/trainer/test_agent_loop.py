# SPDX-License-Identifier: Apache-2.0
"""What the agent loop adds to verl's own."""

import asyncio
import io
import threading
from types import SimpleNamespace

import pytest
from PIL import Image
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.errors import EmbedderError
from embedrl_verl.tcot import TCoT
from embedrl_verl.trainer import agent_loop
from embedrl_verl.trainer.agent_loop import TCoTAgentLoop, _ClipClient, request_seed
from embedrl_verl.trainer.reward_stage import EMBED_PARTITION, ROW_INFO

TEXT = '<thinking>two {"text_keywords": ["a"]}</thinking><rethink>yes</rethink><answer>a</answer>'
ROW = {
    "uid": "u",
    "session_id": 3,
    "embedrl_side": "target",
    "embedrl_item": {"text": "a", "instruction": "", "images": (), "video": None, "kind": None},
}


class _FakeClient:
    async def generate(self, *, prompt_ids, **kwargs):
        return prompt_ids, kwargs


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vllm_is_asked_for_a_clip_at_its_times_and_with_ids_that_it_can_expand(family):
    metadata = {"fps": 30.0, "frames_indices": [0, 30], "total_num_frames": 60}
    given = {"request_id": "r", "video_data": [("clip", metadata)], "mm_processor_kwargs": {"min_pixels": 4}}
    times = {"video_metadata": [metadata], "do_sample_frames": False} if family == "qwen2_5_vl" else {}
    expected = {**given, "mm_processor_kwargs": {"min_pixels": 4, **times}}
    for own, sent in (([1, 2], [1, 2]), (None, [1, 9, 9, 2])):
        client = _ClipClient(_FakeClient(), family, own)
        assert asyncio.run(client.generate(prompt_ids=[1, 9, 9, 2], **given)) == (sent, expected)
    without = {"request_id": "r", "video_data": None, "mm_processor_kwargs": {}}
    assert asyncio.run(_ClipClient(_FakeClient(), family, None).generate(prompt_ids=[1], **without)) == ([1], without)


class _FakeBackend:
    """Gives a vector, or the errors that it is told to raise; remembers who prepared what."""

    def __init__(self, prepare_error=None, embed_error=None):
        self.prepare_error, self.embed_error = prepare_error, embed_error
        self.seen, self.stored = None, {}

    def prepare(self, inputs, side):
        self.seen = (threading.current_thread(), inputs.tcot.answer, side)
        if self.prepare_error:
            raise self.prepare_error
        return inputs

    async def store(self, key, partition_id, prepared):
        if self.embed_error:
            raise self.embed_error
        self.stored[(partition_id, key)] = prepared


@pytest.fixture
def run(monkeypatch):
    """`run(backend)`: one row through the agent loop; returns its info. `shown`: images as the Reasoner saw them."""

    def go(backend, text=TEXT, shown=(), family="qwen2_vl", **row):
        async def answered(self, sampling_params, **row):
            media = {"images": list(shown)} if shown else None
            return SimpleNamespace(response_ids=[1], multi_modal_data=media, extra_fields={})

        monkeypatch.setattr(SingleTurnAgentLoop, "run", answered)
        loop = object.__new__(TCoTAgentLoop)
        embedrl = SimpleNamespace(
            rollout=SimpleNamespace(request_seeds=False),
            reward=SimpleNamespace(raw_embeddings=False),
            evidence=EvidenceConfig(),
        )
        loop._settings = SimpleNamespace(
            backend=backend, embedrl=embedrl, family=family, media_root=None, max_frames=8, seed=0
        )
        loop.tokenizer = SimpleNamespace(decode=lambda ids, **_: text)

        async def one():
            loop.loop = asyncio.get_running_loop()
            return await loop.run({}, **{**ROW, **row})

        return asyncio.run(one()).extra_fields[ROW_INFO]

    return go


def test_a_vector_lies_in_the_queue_when_the_rollout_is_done(run):
    backend = _FakeBackend()
    info = run(backend)
    assert info["failure"] is None
    assert backend.stored[(EMBED_PARTITION, "u_3_0")].tcot.answer == "a"
    thread, answer, side = backend.seen
    assert thread is not threading.main_thread(), "the event loop must not decode or encode"
    assert (answer, side) == ("a", "target")


@pytest.mark.parametrize("where", ["prepare_error", "embed_error"])
def test_a_row_without_a_vector_says_why_and_stores_nothing(where, run):
    backend = _FakeBackend(**{where: EmbedderError("embedding server: timeout")})
    info = run(backend)
    assert info["failure"] == "embedding server: timeout"
    assert info["tcot"]["text"] == TEXT and backend.stored == {}


def test_a_box_in_pixels_is_cut_where_the_reasoner_saw_it(run):
    """The original has 200x100 pixels, the Reasoner saw 100x200: x is doubled and y halved."""
    picture, file = Image.new("RGB", (200, 100)), io.BytesIO()
    picture.paste((255, 0, 0), (20, 50, 120, 80))
    picture.save(file, "PNG")
    text = TEXT.replace('"text_keywords": ["a"]', '"bbox_2d": [10, 100, 60, 160]')
    item = {**ROW["embedrl_item"], "images": (file.getvalue(),)}
    backend = _FakeBackend()
    info = run(backend, text, [Image.new("RGB", (100, 200))], "qwen2_5_vl", embedrl_item=item)
    (crop,) = backend.stored[(EMBED_PARTITION, "u_3_0")].evidence
    assert (crop.size, crop.getcolors()) == ((100, 30), [(3000, (255, 0, 0))])
    assert (info["evidence"], info["num_images"]) == (1, 1)


@pytest.mark.parametrize(
    ("evidence", "images", "frames", "well_formed"),
    [
        ('"key_frames": [1, 8]', 0, 8, True),
        ('"key_frames": [1, 9]', 0, 8, False),
        ('"bbox_2d": [{"image": 2, "box": [0, 0, 9, 9]}]', 2, 0, True),
        ('"bbox_2d": [{"image": 3, "box": [0, 0, 9, 9]}]', 2, 0, False),
    ],
)
def test_evidence_of_a_frame_or_an_image_that_a_row_does_not_have_is_not_well_formed(
    evidence, images, frames, well_formed, run, monkeypatch
):
    picture = Image.new("RGB", (64, 64))
    loaded = SimpleNamespace(images=(picture,) * images, frames=(picture,) * frames)
    monkeypatch.setattr(agent_loop, "_originals", lambda *_: loaded)
    item = {**ROW["embedrl_item"], "images": (b"",) * images}
    text = TEXT.replace('"text_keywords": ["a"]', evidence)
    info = run(_FakeBackend(), text, [picture] * images, embedrl_item=item)
    assert (info["num_images"], info["num_frames"]) == (images, frames)
    assert TCoT.from_plain(info["tcot"]).is_well_formed is well_formed


PLACE = {"global_steps": 3, "embedrl_pair_id": "p", "embedrl_side": "query", "session_id": 0}


@pytest.mark.parametrize(
    "other", [{"global_steps": 4}, {"embedrl_pair_id": "q"}, {"embedrl_side": "target"}, {"session_id": 1}, {"seed": 1}]
)
def test_a_rollouts_seed_is_that_of_its_place_in_the_run_alone(other):
    seed = request_seed(0, {**PLACE, "uid": "u"})
    assert seed == request_seed(0, {**PLACE, "uid": "another run's"}) and 0 <= seed < 2**31
    assert seed != request_seed(other.get("seed", 0), {**PLACE, **other})
