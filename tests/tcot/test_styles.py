# SPDX-License-Identifier: Apache-2.0
"""Templates are data that is checked when it is loaded."""

from importlib import resources

import pytest
import yaml

from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FAMILIES, box_convention
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, INPUT_KINDS
from embedrl_verl.tcot import boxes_to_pixels, format_reward, parse_tcot
from embedrl_verl.tcot.styles import STYLES, load_style, parse_style


def style_text(name: str) -> str:
    return resources.files("embedrl_verl.tcot").joinpath("templates", f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_every_example_is_well_formed_and_points_into_its_input(name: str, kind: str, family: str) -> None:
    """Form, the evidence key of the kind, and boxes with an area inside the imagined images."""
    examples = load_style(name).kinds[kind].examples
    assert bool(examples) == (name == "paper")
    convention = box_convention(family)
    for example in examples:
        tcot = parse_tcot(
            example.tcot_text(convention), num_frames=example.num_frames, num_images=len(example.image_sizes) or None
        )
        assert format_reward(tcot, EVIDENCE_KEY_OF_KIND[kind]) == 1.0, tcot.problems
        for box in tcot.boxes:
            width, height = example.image_sizes[box.image - 1]
            ((x1, y1, x2, y2),) = boxes_to_pixels([box], convention=convention, width=width, height=height)
            assert x2 - x1 > 10 and y2 - y1 > 10
            assert box.x2 <= (width if convention == "absolute" else 1000)


def test_examples_show_the_same_place_in_the_units_of_each_family() -> None:
    (bus, _) = load_style("paper").kinds["query_image"].examples
    places = [
        boxes_to_pixels(parse_tcot(bus.tcot_text(units)).boxes, convention=units, width=644, height=420)[0]
        for units in ("relative_1000", "absolute")
    ]
    assert places[0] != (62, 143, 528, 881) and all(abs(a - b) <= 1 for a, b in zip(*places, strict=True))


def test_the_data_files_ship_as_yaml_with_a_licence_line() -> None:
    for name in STYLES:
        text = style_text(name)
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0") and yaml.safe_load(text)["style"] == name


def broken(path: str, value: object) -> str:
    """The paper style with one entry replaced (None: removed); path like "kinds.query_text.task"."""
    raw = yaml.safe_load(style_text("paper"))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    entry = raw
    for part in parents:
        entry = entry[part]
    if value is None:
        del entry[last]
    else:
        entry[last] = value
    return yaml.safe_dump(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("units", None, "missing keys ['units']"),
        ("note", "x", "unknown keys ['note']"),
        ("units.absolute", None, "missing keys ['absolute']"),
        ("kinds.target_page", None, "missing keys ['target_page']"),
        ("kinds.query_audio", {"task": "x", "examples": []}, "unknown keys ['query_audio']"),
        ("kinds.query_text.task", "", "query_text.task must be a non-empty string"),
        ("kinds.query_text", "x", "query_text must be a mapping"),
        ("kinds.query_text.examples", "x", "query_text.examples must be a list"),
        ("layout", "x", "layout must be a list"),
        ("layout.0", "$tsak", "$task"),
        ("layout.0", "5 $ a piece", "$$ for a dollar"),
        ("evidence.bbox_2d", "$num_pages", "$num_images"),
        ("kinds.query_text.examples.0.thinking", "No evidence.", "exactly one JSON object"),
        ("kinds.query_text.examples.0.thinking", "$evidence {}", "exactly one JSON object"),
        ("kinds.query_text.examples.0.rethink", "</rethink>", "well-formed T-CoT with text_keywords"),
        ("kinds.query_text.examples.0.evidence", {"key_frames": [1]}, "no text_keywords"),
        ("kinds.query_text.examples.0.evidence", {"boxes": [1]}, "unknown keys ['boxes']"),
        ("kinds.query_video.examples.0.num_frames", 4, "number of frames, 4"),
        ("kinds.query_video.examples.0.num_frames", "8", "num_frames must be a positive integer"),
        ("kinds.query_page.examples.0.image_sizes", [[672]], "[width, height] pairs"),
        ("kinds.query_page.examples.0.image_sizes", None, "in one of the 0 images"),
        ("kinds.query_page.examples.0.evidence.bbox_2d", [[0, 0, 5, 1001]], "four integers in 0..1000"),
        ("kinds.query_image.examples.1.evidence.bbox_2d.1.image", 3, "in one of the 2 images"),
    ],
)
def test_a_malformed_template_is_rejected_with_its_file_and_rule(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_style(broken(path, value), source="mine.yaml")
    assert str(error.value).startswith("template mine.yaml: ") and message in str(error.value)


def test_a_file_that_is_not_yaml_or_no_mapping_is_rejected() -> None:
    for text, message in (("a: [", "not YAML"), ("just words", "must be a mapping"), ("", "must be a mapping")):
        with pytest.raises(ConfigError, match=message):
            parse_style(text, source="mine.yaml")


def test_an_unknown_style_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="one of paper, compact; got 'fancy'"):
        load_style("fancy")
