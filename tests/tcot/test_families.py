# SPDX-License-Identifier: Apache-2.0
"""Each family has its own box units and token size."""

import pytest

from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import FAMILIES, box_convention, family_of, token_side


def test_units_and_token_sides_of_the_families() -> None:
    assert {family: (box_convention(family), token_side(family)) for family in FAMILIES} == {
        "qwen2_vl": ("relative_1000", 28),
        "qwen2_5_vl": ("absolute", 28),
        "qwen3_vl": ("relative_1000", 32),
    }


def test_model_types_map_to_their_family_and_families_to_themselves() -> None:
    assert all(family_of(family) == family for family in FAMILIES)
    assert family_of("qwen3_vl_moe") == family_of("qwen3_vl_text") == "qwen3_vl"


@pytest.mark.parametrize("ask", [family_of, box_convention, token_side])
def test_an_unknown_model_type_is_an_error_that_names_the_families(ask) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="got 'llava'.*qwen2_vl, qwen2_5_vl, qwen3_vl"):
        ask("llava")
