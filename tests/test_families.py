# SPDX-License-Identifier: Apache-2.0
"""Each family has its own box units and token size."""

import ast
from pathlib import Path

import pytest

from embedrl_verl.errors import ConfigError
from embedrl_verl.families import (
    BOX_CONVENTIONS,
    BOX_UNITS,
    FACTS,
    FAMILIES,
    box_convention,
    family_of,
    resolve_family,
    token_side,
)
from embedrl_verl.tcot.evidence.boxes import boxes_to_pixels, example_box


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


# Released models and their sizes, and patches of modules that are named after a family.
MAY_NAME = {"families.py", "embedder/profiles.py", "platforms/footprint.py", "platforms/patches.py"}
DEFAULTS = {"cli/data.py", "cli/options.py"}


def test_no_other_file_asks_for_a_family_by_its_name() -> None:
    """A new family is a record; code asks for a fact of it."""
    package = Path(__file__).resolve().parents[1] / "embedrl_verl"
    named = set()
    for file in package.rglob("*.py"):
        constants = (node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
        if set(FAMILIES) & {value for value in constants if isinstance(value, str)}:
            named.add(file.relative_to(package).as_posix())
    assert named == MAY_NAME | DEFAULTS


def test_no_other_file_asks_for_a_convention_of_boxes_by_its_name() -> None:
    """A new convention is a record too."""
    package = Path(__file__).resolve().parents[1] / "embedrl_verl"
    texts = {file.relative_to(package).as_posix(): ast.parse(file.read_text()) for file in package.rglob("*.py")}
    compared = {
        name
        for name, tree in texts.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for one in ast.walk(node)
        if isinstance(one, ast.Constant) and one.value in BOX_CONVENTIONS
    }
    assert not compared and set(BOX_UNITS) == set(BOX_CONVENTIONS)


@pytest.mark.parametrize("convention", BOX_CONVENTIONS)
def test_the_example_of_every_convention_is_cut_where_it_points(convention) -> None:  # type: ignore[no-untyped-def]
    box = example_box((100, 200, 500, 900), (400, 800), convention)
    cut = boxes_to_pixels([box], convention=convention, width=800, height=1600, resized_width=400, resized_height=800)
    assert cut == [(80, 320, 400, 1440)]


def test_every_family_has_a_record_and_a_time_axis() -> None:
    assert set(FACTS) == set(FAMILIES)
    times = {family: facts.clip_time for family, facts in FACTS.items()}
    assert times == {"qwen2_vl": "patches", "qwen2_5_vl": "seconds", "qwen3_vl": "stamps"}


def test_family_is_named_or_that_of_the_processor() -> None:
    class Qwen3VLProcessor:
        pass

    assert resolve_family("auto", Qwen3VLProcessor()) == "qwen3_vl"
    assert resolve_family("qwen2_vl", Qwen3VLProcessor()) == "qwen2_vl"
    with pytest.raises(ConfigError, match="got NoneType. Train a Qwen-VL model"):
        resolve_family("auto", None)
