# SPDX-License-Identifier: Apache-2.0
"""Every kind of input has one evidence key."""

from typing import get_args

from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, EVIDENCE_KEYS, INPUT_KINDS, EvidenceKey, InputKind


def test_every_kind_calls_for_the_evidence_of_its_main_input() -> None:
    assert set(EVIDENCE_KEY_OF_KIND) == set(INPUT_KINDS) == set(get_args(InputKind))
    assert get_args(EvidenceKey) == EVIDENCE_KEYS
    for kind, key in EVIDENCE_KEY_OF_KIND.items():
        medium = kind.rpartition("_")[2]
        expected = {"text": "text_keywords", "image": "bbox_2d", "page": "bbox_2d", "video": "key_frames"}[medium]
        assert key == ("text_keywords" if kind == "query_text_to_video" else expected)
