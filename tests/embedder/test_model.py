# SPDX-License-Identifier: Apache-2.0
"""The forward pass: what the Embedder sees, where it is read, and that rows do not feel their neighbours."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from embedrl_verl.embedder import Embedder, EmbedInput
from embedrl_verl.embedder.batching import pack_rows
from embedrl_verl.embedder.model import embed_packed
from embedrl_verl.errors import EmbedderError, MediaError
from embedrl_verl.tcot import cut_evidence, parse_tcot
from tests.embedder.inputs import LIMITS, TCOT, item, mixed_inputs, picture


def test_a_vector_does_not_depend_on_the_rows_beside_it_nor_on_their_order(each_embedder):
    inputs = mixed_inputs(40)
    alone = each_embedder.embed(inputs, batch_size=1)
    together = each_embedder.embed(inputs, batch_size=32)
    backwards = each_embedder.embed(inputs[::-1], max_batch_tokens=60).flip(0)  # many windows of several batches
    assert (alone - together).abs().max() < 1e-5
    assert (alone - backwards).abs().max() < 1e-5
    assert torch.allclose(alone.norm(dim=1), torch.ones(40), atol=1e-5)
    assert torch.pdist(alone).min() > 1e-4, "the inputs must differ, or the test shows nothing"


def test_the_vector_is_the_state_after_the_final_norm_at_the_embedding_token(each_embedder):
    """Against transformers' own forward pass of one unpadded row with the same positions."""
    inner = each_embedder.model.model
    for one in mixed_inputs(12):
        row = each_embedder.processor.encode(one)
        seen = []
        hook = inner.language_model.norm.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        with torch.no_grad():
            inner(
                input_ids=row.input_ids[None],
                position_ids=row.position_ids[1:, None],
                use_cache=False,
                **row.multi_modal_inputs,
            )
        hook.remove()
        last = seen[0][0, int((row.input_ids == each_embedder.processor.tokenizer.get_vocab()["<emb>"]).nonzero()[-1])]
        assert (each_embedder.embed([one])[0] - last / last.norm()).abs().max() < 1e-5


def change_of(embedder: Embedder, one: EmbedInput, other: EmbedInput) -> float:
    first, second = embedder.embed([one, other])
    return float((first - second).abs().max())


def test_one_changed_pixel_changes_the_embedding(each_embedder):
    side = each_embedder.processor.limits.token_side
    image = picture(0, 2 * side, 4 * side)
    changed = image.copy()
    changed.putpixel((5, 9), tuple(255 - value for value in image.getpixel((5, 9))))
    assert change_of(each_embedder, EmbedInput(item("a", (image,))), EmbedInput(item("a", (changed,)))) > 1e-5
    frames, other = (image, picture(1, 2 * side, 4 * side)), (changed, picture(1, 2 * side, 4 * side))
    assert change_of(each_embedder, EmbedInput(item("a", frames=frames)), EmbedInput(item("a", frames=other))) > 1e-5


def test_one_changed_box_changes_the_embedding_through_the_evidence_alone(each_embedder):
    image = picture(0, 200, 300)
    crops = []
    for text in (TCOT, TCOT.replace("[0, 0, 500, 1000]", "[0, 0, 500, 900]")):
        tcot = parse_tcot(text)
        crops.append(cut_evidence(tcot, images=(image,), frames=(), family="qwen2_vl").images)
    assert len(crops[0]) == len(crops[1]) == 1
    same_words = EmbedInput(item("a", (image,)), parse_tcot(TCOT), crops[0])
    assert change_of(each_embedder, same_words, dataclasses.replace(same_words, evidence=crops[1])) > 1e-5
    assert change_of(each_embedder, same_words, dataclasses.replace(same_words, evidence=())) > 1e-5


def test_one_changed_word_of_the_tcot_changes_the_embedding(each_embedder):
    one = EmbedInput(item("a", (picture(0),)), parse_tcot(TCOT))
    for old, new in (("left", "right"), ("both", "one"), ("4 2", "4 3")):
        other = dataclasses.replace(one, tcot=parse_tcot(TCOT.replace(old, new)))
        assert change_of(each_embedder, one, other) > 1e-5
    assert change_of(each_embedder, one, dataclasses.replace(one, tcot=None)) > 1e-5


def test_a_batch_without_media_is_the_same_whether_or_not_the_vision_model_runs_along(each_embedder):
    rows = pack_rows([each_embedder.processor.encode(one) for one in mixed_inputs(5)[::4]])
    with torch.no_grad():
        plain = embed_packed(each_embedder.model.model, rows)
        along = embed_packed(each_embedder.model.model, rows, always_run_vision=True)
    assert not rows.media and torch.equal(plain, along)


def test_bfloat16_is_close_to_float32(checkpoint, embedder):
    rough = Embedder.from_pretrained(checkpoint("qwen2_vl"), limits=LIMITS["qwen2_vl"], dtype=torch.bfloat16)
    inputs = mixed_inputs(12)
    assert rough.processor.encode(inputs[1]).multi_modal_inputs["pixel_values"].dtype == torch.bfloat16
    cosine = (rough.embed(inputs) * embedder("qwen2_vl").embed(inputs)).sum(dim=1)
    assert cosine.min() > 0.99 and not torch.equal(cosine, torch.ones(12))


def test_placeholders_without_their_media_are_an_error_and_never_a_shifted_picture(embedder):
    rows = [embedder("qwen2_vl").processor.encode(one) for one in mixed_inputs(3)[1:]]
    fewer = dataclasses.replace(rows[0], multi_modal_inputs={})
    with pytest.raises(MediaError, match="visual tokens need as many placeholders"):
        embedder("qwen2_vl").embed_encoded([fewer, rows[1]])


def test_a_vector_that_is_not_finite_is_an_error_and_never_zeros(checkpoint):
    broken = Embedder.from_pretrained(checkpoint("qwen2_vl"), limits=LIMITS["qwen2_vl"])
    inputs = mixed_inputs(4)
    broken.model.model.visual.patch_embed.proj.weight.data[0, 0] = float("nan")
    vectors = broken.embed_encoded([broken.processor.encode(one) for one in inputs])
    assert vectors.isnan().all(dim=1).tolist() == [False, True, True, True]
    with pytest.raises(EmbedderError, match=r"3 of 4 vectors are not finite \(inputs \[1, 2, 3\]\)"):
        broken.embed(inputs)
    broken.model.model.language_model.norm.weight.data.zero_()
    assert broken.embed_encoded([broken.processor.encode(inputs[0])]).isnan().all()


def test_importing_the_package_does_not_import_verl():
    code = "import sys, embedrl_verl.embedder; sys.exit(any(name in sys.modules for name in ('verl', 'ray', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
